"""`launch checkpoint`: list, verify and prune."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from made import flip, make_checkpoint, make_run

from launch.cli.main import main
from launch.records.process import identity
from trainers.contract.files import update_json

SPEC = "checkpoint: {keep_last: 1, keep_best: 1, keep_every: 40, metric: f1}\n"


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """A run with checkpoints of steps 10 to 50; step 20 is the best."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    paths = make_run(tmp_path / "runs/r-1", SPEC)
    for step, f1 in [(10, 0.3), (20, 0.9), (30, 0.5), (40, 0.6), (50, 0.7)]:
        make_checkpoint(paths, step, {"models/model/w": torch.arange(step)}, ranks=3, metrics={"f1": f1})
    return paths


def test_list(paths, capsys):
    flip(paths.checkpoint(10) / "manifest.json")
    os.truncate(paths.checkpoint(30) / "index.json", 3)
    flip(paths.checkpoint(40) / "index.json")  # the size stays the same, and `list` checks only sizes
    assert main(["checkpoint", "list", "r-1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["STEP", "WHEN", "SIZE", "STRATEGY", "RANKS", "KEPT", "AS", "METRICS"]
    assert [line.split()[0] for line in lines[1:]] == ["50", "40", "30", "20", "10", "best"]
    assert lines[-1] == "best by f1 (highest)"
    assert "zero3" in lines[1] and "last" in lines[1] and lines[1].endswith("f1 0.7") and "every" in lines[2]
    assert "index.json has 3 bytes" in lines[3] and "best" in lines[4] and "broken: manifest.json" in lines[5]
    assert main(["checkpoint", "list", "r-1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["kept"] for row in rows] == [["last"], ["every"], [], ["best"], []]
    assert rows[0] == {
        "step": 50, "created": "2026-01-02T00:30:00+00:00", "strategy": "zero3", "world_size": 3, "metrics": {"f1": 0.7},
        "bytes": sum(file.stat().st_size for file in paths.checkpoint(50).iterdir()
                     if file.name not in ("manifest.json", "evaluation.json")),
        "kept": ["last"], "problem": None, "path": str(paths.checkpoint(50))}
    assert rows[4]["bytes"] is None and "manifest.json" in rows[4]["problem"]


def test_metrics_of_older_versions_are_in_the_manifest(paths, capsys):
    make_checkpoint(paths, 60, {"models/model/w": torch.arange(9)}, metrics={"f1": 0.95}, old=True)
    assert main(["checkpoint", "list", "r-1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["metrics"]["f1"], row["kept"]) for row in rows[:2]] == [(60, 0.95, ["last", "best"]), (50, 0.7, [])]
    assert main(["export", "r-1", "--step", "best"]) == 0
    assert "export/step_60/" in capsys.readouterr().out


def test_verify(paths, capsys):
    assert main(["checkpoint", "verify", "r-1"]) == 0
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"step_{step}: ok" for step in (50, 40, 30, 20, 10)]
    flip(paths.checkpoint(30) / "1.safetensors")
    (paths.checkpoint(10) / "state.json").unlink()
    assert main(["checkpoint", "verify", "r-1", "--json"]) == 1
    assert {row["step"]: row["problem"] for row in json.loads(capsys.readouterr().out)} == {
        50: None, 40: None, 30: "1.safetensors has changed since it was written (sha256)", 20: None,
        10: "state.json is missing"}
    for step, code in [("30", 1), ("20", 0)]:
        assert main(["checkpoint", "verify", "r-1", "--step", step]) == code
    capsys.readouterr()
    assert main(["checkpoint", "verify", "r-1", "--step", "31"]) == 2
    assert capsys.readouterr().err == ("error: `r-1` has no checkpoint of step 31\n"
                                       "hint: the run has step 10, step 20, step 30, step 40, step 50\n")


def test_prune_follows_the_runs_own_retention(paths, capsys):
    for name in ("step_3.tmp", "step_20.old", "step_5.broken", "mine"):
        (paths.checkpoints / name).mkdir()
    before = sorted(os.listdir(paths.checkpoints))
    assert main(["checkpoint", "prune", "r-1", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("would delete step_10, step_30, step_20.old, step_3.tmp, step_5.broken: ")
    assert out.endswith("kept step_20 (best), step_40 (every), step_50 (last)\n")
    assert sorted(os.listdir(paths.checkpoints)) == before
    assert main(["checkpoint", "prune", "r-1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["deleted"] == [10, 30] and found["bytes"] > 0 and found["kept"]["50"] == ["last"]
    assert sorted(os.listdir(paths.checkpoints)) == ["mine", "step_20", "step_40", "step_50"]
    assert main(["checkpoint", "prune", "r-1", "--keep-last", "1"]) == 0
    assert capsys.readouterr().out.startswith("deleted nothing\n")


def test_prune_keeps_another_number_of_checkpoints(paths, capsys):
    assert main(["checkpoint", "prune", "r-1", "--keep-last", "3"]) == 0
    assert paths.checkpoint_steps() == [20, 30, 40, 50]


def test_prune_never_deletes_the_last_whole_one(paths, capsys):
    for step in (50, 40, 20):  # all checkpoints that retention keeps
        flip(paths.checkpoint(step) / "0.safetensors")
    assert main(["checkpoint", "prune", "r-1"]) == 0
    assert "kept step_20 (best), step_30 (whole), step_40" in capsys.readouterr().out
    assert paths.checkpoint_steps() == [20, 30, 40, 50]
    shutil.copytree(paths.checkpoint(30), paths.checkpoint(60))
    flip(paths.checkpoint(30) / "0.safetensors")
    assert main(["checkpoint", "prune", "r-1", "--keep-last", "1"]) == 2
    assert "no checkpoint of `r-1` is whole: nothing is deleted" in capsys.readouterr().err
    assert paths.checkpoint_steps() == [20, 30, 40, 50, 60]


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_prune_refuses_while_the_run_is_running(paths, capsys, where):
    host = os.uname().nodename if where == "here" else "n1"
    job = {"kind": "local", "host": host, "pid": os.getpid(), "started": identity(os.getpid())}
    update_json(paths.record, state="running", job=job)
    assert main(["checkpoint", "prune", "r-1"]) == 2
    assert "`r-1` is running" in capsys.readouterr().err and len(paths.checkpoint_steps()) == 5


def test_a_run_without_checkpoints(tmp_path, capsys):
    make_run(tmp_path / "r-2")
    runs = ["--runs", str(tmp_path)]
    assert main(["checkpoint", "list", "r-2", *runs]) == 0 and capsys.readouterr().out == "no checkpoints\n"
    for words in (["checkpoint", "verify"], ["checkpoint", "prune"], ["export"]):
        assert main([*words, "r-2", *runs]) == 2
        assert capsys.readouterr().err.startswith("error: `r-2` has no checkpoint\nhint: looked in ")
