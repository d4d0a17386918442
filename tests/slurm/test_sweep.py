"""Sweeps on a real cluster. A sweep is one job array, and SLURM requeues each element on its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BLOBS, attempt, environment, record, rows, set_pause, wait_until
from slurm.conftest import LoginCommand, write_cluster

from launch.records import read as runs
from launch.records.run import read_run
from launch.records.seeds import means

WORK = """
import os, signal, sys, time
word, is_retry = sys.argv[1], os.environ["LAUNCH_ATTEMPT"] != "1"
print("this is", word, flush=True)
if word == "wait" and not is_retry:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("up", flush=True)
    time.sleep(600)
sys.exit(3 if word == "fail" and not is_retry else 0)
"""
WHERE = ("--cluster", "here", "--procs", 1)


@pytest.fixture
def script(slurm_launch) -> LoginCommand:
    """`launch` in a folder with the script `work.py`."""
    (slurm_launch.folder / "work.py").write_text(WORK)
    return slurm_launch


def submit(launch, *words) -> dict:
    """Submit a sweep and return the JSON that `launch sweep` prints."""
    done = launch("sweep", *words, *WHERE, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def states(launch, sweep: dict) -> list[str]:
    return [record(launch.folder / "runs" / run)["state"] for run in sweep["runs"]]


def wait_for_end(launch, sweep: dict) -> None:
    wait_until(lambda: set(states(launch, sweep)) <= {"finished", "failed", "cancelled"})
    assert set(states(launch, sweep)) == {"finished"}, job_logs(launch)


def job_logs(launch) -> str:
    return "\n".join(log.read_text() for log in sorted(launch.folder.glob("runs/*/submissions/*/*_log.out")))


def losses(run: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(run)]


@pytest.mark.slow
def test_a_requeued_element_continues_and_the_others_are_not_touched(slurm, slurm_launch, monkeypatch):
    words = ("train.steps=100", "checkpoint.every=50", "eval.every=50", "run.grace_s=10")
    dry = slurm_launch("sweep", BLOBS, "--seeds", "1,2,3", *words, "model.pause_s=0.05", *WHERE, "--max-parallel", 2,
                       "--dry-run", "--json")
    sweep = submit(slurm_launch, BLOBS, "--seeds", "1,2,3", *words, "model.pause_s=0.05", "--max-parallel", 2)
    (job,), root = sweep["jobs"], slurm_launch.folder / "runs"
    folder, run_2 = root / sweep["id"], root / sweep["runs"][1]
    most_running = 0

    def is_at_step_40() -> bool:
        nonlocal most_running
        most_running = max(most_running, len(slurm.run("squeue", "-h", "-r", "-t", "RUNNING").splitlines()))
        return (run_2 / "metrics.jsonl").exists() and len(rows(run_2)) >= 40

    wait_until(is_at_step_40)
    set_pause(run_2, 0.5)  # slow, so that the run cannot finish before the requeue
    slurm.run("scontrol", "requeue", f"{job}_1")
    wait_until(lambda: attempt(run_2, 1)["outcome"] != "running")
    assert attempt(run_2, 1)["outcome"] == "preempted" and record(run_2)["step"] == record(run_2)["checkpoint"] < 100
    set_pause(run_2, 0)
    wait_for_end(slurm_launch, sweep)
    assert most_running == 2

    alone = json.loads(slurm_launch(BLOBS, "train.seed=2", *words, *WHERE, "--json").stdout)["id"]
    wait_until(lambda: record(root / alone)["state"] == "finished")
    assert losses(run_2) == losses(root / alone) and len(losses(run_2)) == 100
    assert losses(root / sweep["runs"][0]) != losses(run_2)
    assert [record(root / run)["attempt"] for run in sweep["runs"]] == [1, 2, 1]
    assert [record(root / run)["job"]["ids"] for run in sweep["runs"]] == [[f"{job}_{element}"] for element in range(3)]
    assert [attempt(run_2, number)["job"] for number in (1, 2)] == [f"{job}_1"] * 2
    assert attempt(run_2, 2)["restart"] == 1

    # The dry run showed what was submitted, byte for byte.
    plan = json.loads(dry.stdout)
    text = plan["job"]["script"].replace(plan["id"], sweep["id"])
    assert (folder / "submissions/1/job.sh").read_text() == text and "--array=0-2%2\n" in text
    for file, text in plan["files"].items():
        assert (folder / file).read_text() == text.replace(plan["id"], sweep["id"])
    for point, run in zip(plan["plans"], sweep["runs"]):
        assert (root / run / "run.yaml").read_text() == point["files"]["run.yaml"].replace(plan["id"], sweep["id"])

    # All runs share one copy of the code and one folder of job logs.
    assert (folder / "code/snapshot.json").exists() and not (run_2 / "code").exists()
    assert str(folder / "code") in (run_2 / "run.yaml").read_text()
    assert sorted(path.name for path in (folder / "submissions/1").glob("*_log.out")) == [
        f"{job}_{element}_0_log.out" for element in range(3)]
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    table = runs.list_runs(root, sweep=sweep["id"])
    assert [row["overrides"] for row in table] == [["train.seed=1"], ["train.seed=2"], ["train.seed=3"]]
    assert [run.removeprefix(sweep["id"]) for run in sweep["runs"]] == ["-seed1", "-seed2", "-seed3"]
    [point] = means(root, sweep["id"], table)
    assert point["metrics"]["loss"]["mean"] == pytest.approx(sum(row["metrics"]["loss"] for row in table) / 3)
    assert [log.job for log in runs.node_logs(read_run(run_2))] == [f"{job}_1"]


def test_resume_submits_the_runs_that_have_failed(slurm, script):
    sweep = submit(script, "work.py", "args=[one],[fail],[wait]", "run.max_restarts=0", "--max-parallel", 3)
    wait_until(lambda: states(script, sweep) == ["finished", "failed", "running"])
    wait_until(lambda: len(slurm.run("squeue", "-h", "-r").splitlines()) == 1)

    resumed = script("sweep", "--resume", sweep["id"])
    assert resumed.returncode == 0, resumed.stderr
    assert "1 run running or waiting, left alone" in resumed.stdout and ": 1 run of 1 CPU rank(s)" in resumed.stdout
    folder = script.folder / "runs" / sweep["id"]
    assert "#SBATCH --array=1%3\n" in (folder / "submissions/2/job.sh").read_text()
    wait_until(lambda: states(script, sweep) == ["finished", "finished", "running"])
    (second,) = json.loads((folder / "sweep.json").read_text())["job"]["ids"]
    failed = script.folder / "runs" / sweep["runs"][1]
    assert record(failed)["job"]["ids"] == [f"{second}_1"] and attempt(failed, 2)["submission"] == 2

    waiting = script.folder / "runs" / sweep["runs"][2]
    assert script("cancel", waiting.name).returncode == 0
    assert states(script, sweep) == ["finished", "finished", "cancelled"]
    alone = script("resume", waiting.name, "--json")  # in its own job, with the sweep's copy of the code
    assert alone.returncode == 0, alone.stderr
    wait_for_end(script, sweep)
    assert attempt(waiting, 2)["submission"] == 3  # the run's submissions are counted together with its sweep's
    assert f"LAUNCH_CODE={folder}/code/" in (waiting / "submissions/3/job.sh").read_text()
    assert "nothing to resume" in script("sweep", "--resume", sweep["id"]).stdout


DIES = """
import os, sys
from launch.cli.main import main
from launch.execute import sweep
def update_json(*_, **__): {how}
sweep.update_json = update_json
sys.exit(main(sys.argv[1:]))
"""


def run_dying_command(launch: LoginCommand, how: str, *words) -> int:
    """Run a command that dies after `sbatch`, before it can record a job's id, and return its exit code."""
    env = environment(**launch.slurm.env, XDG_CONFIG_HOME=str(launch.folder / "config"))
    words = [sys.executable, "-P", "-c", DIES.format(how=how), *map(str, words)]
    return subprocess.run(words, env=env, cwd=launch.folder, capture_output=True, timeout=60).returncode


def test_resume_finds_the_jobs_of_an_interrupted_submission(slurm, script):
    assert run_dying_command(script, "os._exit(9)", "sweep", "work.py", "args=[one],[two]", *WHERE) == 9
    assert len(slurm.run("squeue", "-h", "-r").splitlines()) == 2
    (file,) = script.folder.glob("runs/*/sweep.json")
    points = json.loads(file.read_text())["points"]
    sweep = {"id": file.parent.name, "runs": [point["run"] for point in points]}
    assert states(script, sweep) == ["submitted", "submitted"]
    assert all(record(script.folder / "runs" / run)["job"]["ids"] == [] for run in sweep["runs"])

    done = script("sweep", "--resume", sweep["id"])
    assert done.returncode == 0 and "2 runs running or waiting, left alone" in done.stdout, done.stderr
    wait_for_end(script, sweep)
    assert all(record(script.folder / "runs" / run)["attempt"] == 1 for run in sweep["runs"])
    (job,) = json.loads(file.read_text())["job"]["ids"]
    assert [record(script.folder / "runs" / run)["job"]["ids"] for run in sweep["runs"]] == [[f"{job}_0"], [f"{job}_1"]]
    assert not [other for other in slurm.jobs() if other.get("ArrayJobId") != job and sweep["id"] in other["Command"]]


def test_a_submission_stopped_by_ctrl_c_leaves_nothing(slurm, script):
    assert run_dying_command(script, "raise KeyboardInterrupt", "sweep", "work.py", "args=[one],[two]", *WHERE) == 130
    assert not list(script.folder.glob("runs/*"))
    wait_until(lambda: not slurm.run("squeue", "-h"))


def test_where_jobs_cannot_be_requeued_each_run_gets_a_chain_of_jobs(slurm, script):
    write_cluster(script.folder, requeue=False, chain=2)
    sweep = submit(script, "work.py", "args=[one],[wait]")
    assert len(sweep["jobs"]) == 4
    folders = [script.folder / "runs" / run for run in sweep["runs"]]
    assert [record(folder)["job"]["ids"] for folder in folders] == [sweep["jobs"][:2], sweep["jobs"][2:]]
    log = folders[1] / "attempts/1/logs/0.log"
    wait_until(lambda: states(script, sweep) == ["finished", "running"] and log.exists() and "up" in log.read_text())
    slurm.run("scancel", "--signal=USR2", sweep["jobs"][2])  # as before a time limit: the next job continues
    wait_for_end(script, sweep)
    assert [record(folder)["attempt"] for folder in folders] == [1, 2]
    assert attempt(folders[1], 2)["job"] == sweep["jobs"][3]
    wait_until(lambda: not slurm.run("squeue", "-h"))


def test_a_sweep_that_slurm_refuses_leaves_no_files(script):
    done = script("sweep", "work.py", "args=[one],[two]", *WHERE, "sbatch.partition=nope")
    assert done.returncode == 2 and "SLURM refuses this job" in done.stderr
    assert not list(script.folder.glob("runs/*"))


def test_more_points_than_the_cluster_allows_in_an_array(start_cluster, tmp_path):
    write_cluster(tmp_path)
    launch = LoginCommand(tmp_path, start_cluster(nodes=1, gpus=0, extra="MaxArraySize=3"))
    (tmp_path / "work.py").write_text(WORK)
    done = launch("sweep", "work.py", "args=[a],[b],[c],[d]", *WHERE)
    assert done.returncode == 2 and "4 points are more than an array may have" in done.stderr
    assert not list(tmp_path.glob("runs/*"))
