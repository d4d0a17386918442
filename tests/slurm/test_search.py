"""A grid search on several nodes gives the same table as on one machine, and no piece is computed twice."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path

import pytest
from conftest import attempt, record, wait_until
from slurm.conftest import write_cluster

pytestmark = pytest.mark.slow

# A piece takes about a second, so an interruption finds some pieces finished and some not.
KEYS = ("wine", "data=sample", "search.grid.n_estimators=[20,60]", "search.grid.min_samples_leaf=[1,2,3,5]",
        "search.importance_repeats=2", "run.grace_s=10")
WHERE = ("--cluster", "here", "--nodes", 2, "--cpus", 1)


def submit(launch, *args) -> tuple[Path, str]:
    """Submit a run and return (the run's folder, its job's id)."""
    done = launch(*args, "--json")
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)
    return launch.folder / "runs" / output["id"], output["jobs"][0]


def wait_for_end(run: Path) -> None:
    wait_until(lambda: record(run)["state"] in ("finished", "failed", "cancelled"), timeout_s=300)
    log = "\n".join(path.read_text() for path in sorted(run.glob("submissions/*/*_log.out")))
    assert record(run)["state"] == "finished", log


def table(run: Path) -> list[dict]:
    """Return the rows of the table of results, without the columns of times."""
    with open(run / "cv_results.csv", newline="") as file:
        return [{key: value for key, value in row.items() if "time" not in key} for row in csv.DictReader(file)]


def pieces(run: Path) -> dict[str, int]:
    """Return the time in ns at which each finished piece was written, by file name."""
    return {path.name: path.stat().st_mtime_ns for path in run.glob("pieces/*.json")}


def claims(run: Path, number: int) -> set[str]:
    """Return the pieces that ranks of an attempt started."""
    return {path.name for path in run.glob(f"attempts/{number}/claims/*")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[dict]:
    """The table of the same search, computed in this process by GridSearchCV."""
    from sklearn.datasets import load_diabetes
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.model_selection import GridSearchCV

    X, y = load_diabetes(return_X_y=True)
    grid = {"n_estimators": [20, 60], "min_samples_leaf": [1, 2, 3, 5], "min_samples_split": [2, 4, 8]}
    results = GridSearchCV(RandomForestRegressor(random_state=0), grid, cv=5, refit=False).fit(X, y).cv_results_
    return [{key: str(dict(values[row]) if key == "params" else values[row]) for key, values in results.items()
             if "time" not in key} for row in range(24)]


def test_a_requeue_and_a_killed_rank_on_two_nodes(slurm, slurm_launch, whole):
    write_cluster(slurm_launch.folder, cpus_per_node=16)
    run, job = submit(slurm_launch, *KEYS, *WHERE)
    wait_until(lambda: len(pieces(run)) >= 8 or record(run)["state"] == "failed", timeout_s=240)
    slurm.run("scontrol", "requeue", job)
    wait_until(lambda: attempt(run, 1)["outcome"] != "running", timeout_s=60)
    before = pieces(run)
    print(f"requeued: {attempt(run, 1)['outcome']} with {len(before)} of 40 pieces: {record(run)['step']} fits")
    assert attempt(run, 1)["outcome"] == "preempted" and attempt(run, 1)["exit_code"] == 75
    assert record(run)["step"] >= 2 * len(before) and record(run)["total"] == 24 * 5

    wait_until(lambda: len(pieces(run)) >= len(before) + 6, timeout_s=240)
    (rank,) = wait_until(lambda: ranks(run, "1"), timeout_s=30)
    os.kill(rank, signal.SIGKILL)
    wait_for_end(run)
    assert attempt(run, 2)["outcome"] == "failed" and attempt(run, 2)["failure"]["signal"] == "SIGKILL"
    after = pieces(run)
    assert len(after) == 40 and {name: after[name] for name in before} == before
    claimed = [claims(run, number) for number in (1, 2, 3)]
    finished = {name.removesuffix(".json") for name in before}
    assert not claimed[1] & finished and not claimed[2] & finished and claimed[0] >= finished
    assert table(run) == whole
    print(f"pieces started by attempt: {[len(names) for names in claimed]}")


def ranks(run: Path, number: str) -> list[int]:
    """Return the pids of a rank of a run."""
    pids = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            env = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"trainers.run" in words and str(run).encode() in words and b"RANK=" + number.encode() in env:
            pids.append(int(entry))
    return pids


def test_both_nodes_compute_and_the_plan_shows_their_resources(slurm, slurm_launch, whole):
    write_cluster(slurm_launch.folder, cpus_per_node=2)
    plan = json.loads(slurm_launch(*KEYS, "--slurm", "--cluster", "here", "--nodes", 2, "--dry-run", "--json").stdout)
    assert plan["resources"] == {"device": "cpu", "ranks": 2, "nodes": 2, "threads": 2, "gpus": 0}
    assert "--cpus-per-task=2" in plan["job"]["script"]
    run, _ = submit(slurm_launch, *KEYS, "--cluster", "here", "--nodes", 2)
    wait_for_end(run)
    assert table(run) == whole and len(pieces(run)) == 40 == len(claims(run, 1))
    logs = [(run / f"attempts/1/logs/{rank}.log").exists() for rank in (0, 1)]
    assert all(logs) and attempt(run, 1)["nodes"] == ["n1", "n2"]
    refused = slurm_launch("wine", "data=sample", "--cluster", "here", "--gpus", 2)
    assert refused.returncode == 2 and "this task computes on CPUs" in refused.stderr
    refused = slurm_launch("wine", "data=sample", "--cluster", "here", "--nodes", 2, "--cpus", 3)
    assert refused.returncode == 2 and "has 2 cores" in refused.stderr
