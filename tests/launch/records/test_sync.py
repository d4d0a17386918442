"""`launch sync`, with a script in place of wandb."""

from __future__ import annotations

import json

import pytest

from launch.records.run import Run
from launch.records.sync import has_key, sync
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths

STAND_IN = """
import json, os, sys
from pathlib import Path
Path(os.environ["RECORD"]).write_text(json.dumps(sys.argv[1:]))
if os.environ["DOES"] == "upload":
    for folder in sys.argv[4:]:
        next(Path(folder).glob("*.wandb")).with_suffix(".wandb.synced").touch()
sys.exit(3 if os.environ["DOES"] == "fail" else 0)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with two offline attempts; a script replaces wandb."""
    package = tmp_path / "stand_in" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RECORD", str(tmp_path / "argv.json"))
    monkeypatch.setenv("DOES", "upload")
    paths = RunPaths(tmp_path / "runs" / "r-1")
    for name in ("offline-run-20260102_000000-r-1", "offline-run-20260101_000000-r-1", "run-20260101_000000-r-1"):
        (paths.root / "wandb" / name).mkdir(parents=True)
        (paths.root / "wandb" / name / "run-r-1.wandb").touch()
    return Run(paths, {"id": "r-1", "task": "r", "state": "finished", "job": None})


def test_uploads_each_attempt_once_in_order(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    lines = []
    folders = [str(run.paths.root / "wandb" / f"offline-run-2026010{day}_000000-r-1") for day in (1, 2)]
    assert sync(run, lines.append) == 0
    assert json.loads((tmp_path / "argv.json").read_text()) == ["sync", "--id", "r-1", *folders]
    assert lines == []

    (tmp_path / "argv.json").unlink()
    assert sync(run, lines.append) == 0
    assert not (tmp_path / "argv.json").exists()
    assert lines == [f"already synced: offline-run-2026010{day}_000000-r-1" for day in (1, 2)]

    (run.paths.root / "wandb" / "offline-run-20260102_000000-r-1" / "run-r-1.wandb.synced").unlink()
    assert sync(run, lines.append) == 0
    assert json.loads((tmp_path / "argv.json").read_text()) == ["sync", "--id", "r-1", folders[1]]


@pytest.mark.parametrize(("does", "code"), [("fail", 3), ("nothing", 1)])
def test_a_failure_is_seen_even_if_wandb_ends_with_0(run, monkeypatch, does, code):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("DOES", does)
    assert sync(run) == code


def test_refuses_before_it_starts_wandb(run, tmp_path):
    with pytest.raises(UserError, match="no W&B API key for https://api.wandb.ai") as caught:
        sync(run)
    assert "WANDB_API_KEY" in caught.value.hint
    with pytest.raises(UserError, match="is running"):
        sync(Run(run.paths, {**run.record, "state": "running"}))
    with pytest.raises(UserError, match="no offline W&B folder"):
        sync(Run(RunPaths(tmp_path / "runs" / "r-2"), {**run.record, "id": "r-2"}))
    assert not (tmp_path / "argv.json").exists()


def test_places_where_a_key_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not has_key({})
    assert has_key({"WANDB_API_KEY": "k"})
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password k\n")
    assert has_key({})
    assert not has_key({"WANDB_BASE_URL": "https://wandb.example.org"})
    other = tmp_path / "other"
    other.write_text("machine wandb.example.org login user password k\n")
    assert has_key({"WANDB_BASE_URL": "https://wandb.example.org", "NETRC": str(other)})
    settings = tmp_path / "config" / "settings"
    settings.parent.mkdir()
    settings.write_text("[default]\nbase_url = https://wandb.example.org\n")
    assert has_key({"WANDB_CONFIG_DIR": str(settings.parent), "NETRC": str(other)})
    other.write_text("machine\n")
    assert not has_key({"NETRC": str(other)})
