"""Complete runs of the forest search, started as a user starts them."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import alive, attempt, ranks_of, record, wait_until

pytestmark = pytest.mark.slow

GRID = ("search.grid.n_estimators=[5,20]", "search.grid.min_samples_leaf=[1,2]", "search.grid.min_samples_split=[2,4]")
QUICK = ("wine", "data=sample", *GRID, "search.cv=3", "search.importance_repeats=1")


def expected(cv=3):
    """Return a fitted GridSearchCV over the same grid and data."""
    from sklearn.datasets import load_diabetes
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.model_selection import GridSearchCV

    grid = {"n_estimators": [5, 20], "min_samples_leaf": [1, 2], "min_samples_split": [2, 4]}
    return GridSearchCV(RandomForestRegressor(random_state=0), grid, cv=cv).fit(*load_diabetes(return_X_y=True))


def results_table(run: Path) -> list[dict[str, str]]:
    with open(run / "cv_results.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_same(run: Path, search) -> None:
    """Assert that the run has the results of `search`, except the times."""
    rows, results = results_table(run), search.cv_results_
    assert list(rows[0]) == list(results)
    for key, values in results.items():
        if "time" not in key and key != "params":
            assert [float(row[key]) for row in rows] == [float(value) for value in values], key
    assert [row["params"] for row in rows] == [str(params) for params in results["params"]]


def test_a_search_gives_the_table_and_the_model_of_gridsearchcv(launch):
    from sklearn.datasets import load_diabetes

    from trainers.forest import load_forest

    done = launch(*QUICK, "--cpus", 2, "--wandb", "offline")
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "a process leaked something or gave a warning"
    run, search = launch.run(), expected()
    assert_same(run, search)
    kept = record(run)
    assert (kept["state"], kept["step"], kept["total"]) == ("finished", 24, 24)
    assert kept["metrics"]["r2"] == search.best_score_
    results = json.loads((run / "results.json").read_text())
    assert results["best"]["params"] == search.best_params_ and len(results["importance"]) == 10
    assert "no two rows have the same features" in results["folds"]["why"]
    assert sorted(path.name for path in (run / "figures").iterdir()) == ["heat_map.png", "importance.png", "n_estimators.png"]
    X, _ = load_diabetes(return_X_y=True)
    assert np.array_equal(load_forest(run / "model.npz").predict(X), search.predict(X))
    assert len(list((run / "pieces").glob("*.json"))) == 3 * 3  # with leaves of 2 rows, min_samples_split 2 and 4 mean the same
    assert "fit 24/24" in done.stdout and "9 pieces" in done.stdout
    assert list(run.glob("wandb/offline-run-*/files/media/table/cv_results*.table.json"))


def test_a_resumed_search_fits_only_the_missing_pieces(launch):
    slow = [*QUICK[:2], "search.grid.n_estimators=[5,20,400]", *GRID[1:], *QUICK[5:]]
    process = launch.start(*slow, "--cpus", 1)
    (run,) = wait_until(lambda: [run for run in launch.runs() if len(list(run.glob("pieces/*.json"))) >= 2], process=process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    before = {path.name: path.stat().st_mtime_ns for path in run.glob("pieces/*.json")}
    assert record(run)["state"] == "preempted" and 0 < record(run)["step"] < 36
    assert f"stopped after {record(run)['step']} of 36 fits, which are kept" in out
    assert "finished pieces are kept" in launch("explain", run.name).stdout

    process = launch.start("resume", run.name)
    wait_until(lambda: len(list(run.glob("pieces/*.json"))) > len(before), process=process)
    (rank,) = ranks_of(process.pid)
    workers = [pid for pid in ranks_of(rank) if "loky" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not any(map(alive, [rank, *workers])), timeout_s=20)

    done = launch("resume", run.name)
    assert done.returncode == 0, done.stderr
    after = {path.name: path.stat().st_mtime_ns for path in run.glob("pieces/*.json")}
    assert len(after) == 9 and {name: after[name] for name in before} == before
    assert attempt(run, 3)["threads"] == 1 and record(run)["state"] == "finished"


def test_two_ranks_share_the_pieces(launch):
    done = launch(*QUICK, "--procs", 2, "--cpus", 1)
    assert done.returncode == 0, done.stderr
    run = launch.run()
    assert_same(run, expected())
    assert len(list(run.glob("attempts/1/claims/*"))) == 9
    # If all pieces exist, a resumed run only writes the table again and fits nothing.
    (run / "run.json").write_text(json.dumps({**record(run), "state": "failed"}))
    before = {path: path.stat().st_mtime_ns for path in run.glob("pieces/*.json")}
    (run / "cv_results.csv").unlink()
    assert launch("resume", run.name).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in run.glob("pieces/*.json")}
    assert not list(run.glob("attempts/2/claims/*"))
    assert_same(run, expected())


def test_a_mistake_of_the_user_gives_a_short_error(launch):
    for args, message in (
        (["wine", "data=sample", "search.grid.n_estimatorss=[1]"], "`n_estimatorss` is not a parameter"),
        (["wine", "data=sample", "search.cv=500"], "fewer than the 500 folds"),
        (["wine", "data=nowhere.csv"], "does not exist"),
        (["wine", "data=sample", "train.epochs=3"], "`train` is not a key of this spec"),
        (["wine", "data=sample", "--gpus", 1], "this task computes on CPUs"),
    ):
        done = launch(*args)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") <= 2
    refused = launch("cifar10", "data=sample", "--cpus", 2)
    assert refused.returncode == 2 and "`--cpus` is for search tasks" in refused.stderr


def test_debug_uses_one_rank_and_one_core(launch):
    done = launch(*QUICK, "--debug")
    assert done.returncode == 0, done.stderr
    assert "1 rank(s) x 1 core(s)" in done.stdout
    assert_same(launch.run(), expected())
