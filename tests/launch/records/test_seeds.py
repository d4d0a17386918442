"""Mean and deviation over seeds: which runs and values count, and how they are told."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from made import make_run

from launch.records.read import list_runs
from launch.records.seeds import lines, means
from trainers.contract.files import replace_json


def make_sweep(root: Path, runs: list[tuple[list[str], str, dict]], seed_key: str | None = "train.seed") -> list[dict]:
    """Make a sweep of runs, each (overrides, state, metrics), and return its means."""
    points = [{"run": f"s-{index}", "overrides": overrides} for index, (overrides, _, _) in enumerate(runs)]
    (root / "s").mkdir()
    replace_json(root / "s" / "sweep.json", {"id": "s", "points": points} | ({"seed_key": seed_key} if seed_key else {}))
    for point, (_, state, metrics) in zip(points, runs):
        make_run(root / point["run"], state=state, metrics=metrics)
    return means(root, "s", list_runs(root, "s"))


def test_the_deviation_is_the_samples_and_only_finished_runs_count(tmp_path):
    [point] = make_sweep(tmp_path, [(["train.seed=0"], "finished", {"top1": 0.5, "class/ship": 1}),
                                    (["train.seed=1"], "failed", {"top1": 0.1}),
                                    (["train.seed=2"], "finished", {"top1": 0.7, "class/ship": 0})])
    assert (point["overrides"], point["runs"], point["finished"]) == ([], 3, 2)
    assert point["metrics"]["top1"] == {"mean": pytest.approx(0.6), "deviation": pytest.approx(math.sqrt(0.02)), "n": 2}
    assert point["metrics"]["class/ship"]["mean"] == 0.5
    assert lines([point])[1:] == ["2 of 3 runs  top1 0.6 ± 0.1414"]


def test_each_point_of_a_grid_has_its_own_mean(tmp_path):
    points = make_sweep(tmp_path, [([f"optim.lr={lr}", f"train.seed={seed}"], "finished", {"loss": lr + seed, "nan": nan})
                                   for lr in (1, 2) for seed, nan in ((0, 3.0), (2, None))])
    assert [(point["overrides"], point["metrics"]["loss"]["mean"]) for point in points] == [
        (["optim.lr=1"], 2.0), (["optim.lr=2"], 3.0)]
    assert lines(points)[1] == "optim.lr=1  2 of 2 runs  loss 2 ± 1.414  nan 3 (n = 1)"


def test_without_finished_runs_or_without_seeds_there_is_nothing_to_average(tmp_path):
    [point] = make_sweep(tmp_path, [(["train.seed=0"], "failed", {"top1": 0.5}), (["train.seed=1"], "submitted", {})])
    assert lines([point])[1:] == ["0 of 2 runs"]
    (tmp_path / "old").mkdir()
    assert make_sweep(tmp_path / "old", [(["train.seed=0"], "finished", {})], seed_key=None) == lines([]) == []
