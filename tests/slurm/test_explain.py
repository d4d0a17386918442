"""`launch explain` for runs that failed on a real cluster. A dead node is tested in test_interruptions.py."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
from conftest import BLOBS, attempt, record, wait_until
from slurm.cluster import descendants
from slurm.conftest import explanation_of, write_cluster

SLOWLY = (BLOBS, "train.steps=2000", "eval.every=never", "checkpoint.every=10", "run.grace_s=10", "model.pause_s=0.03")
TWO_NODES = ("--cluster", "here", "--gpus", 2, "--nodes", 2)


@pytest.fixture
def submit(slurm, slurm_launch, monkeypatch):
    """A function that submits a run and returns (the run's folder, its job's id)."""
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))

    def submit_run(*args):
        done = slurm_launch(*args, "--json")
        assert done.returncode == 0, done.stderr
        output = json.loads(done.stdout)
        return slurm_launch.folder / "runs" / output["id"], output["jobs"][0]

    return submit_run


def steps(run) -> int:
    try:
        return (run / "metrics.jsonl").read_text().count('"train"')
    except FileNotFoundError:
        return 0


def state(run) -> str:
    return record(run)["state"]


def find_process(slurm, run, *words: bytes, **variables: str) -> int:
    """Return the pid of the only process of a run that has these words in its command and these variables."""
    pids = []
    for pid in descendants(slurm.keeper.pid):
        try:
            command = open(f"/proc/{pid}/cmdline", "rb").read().split(b"\0")
            env = open(f"/proc/{pid}/environ", "rb").read().split(b"\0")
        except OSError:
            continue
        of_run = any(word.startswith(bytes(run)) for word in command) and not command[0].endswith(b"srun")
        if of_run and {*words} <= {*command} and all(f"{key}={value}".encode() in env for key, value in variables.items()):
            pids.append(pid)
    (pid,) = pids
    return pid


def commands(explanation) -> list[str]:
    return [step["command"] for step in explanation["next"]]


@pytest.mark.slow
def test_a_killed_rank(slurm, submit):
    run, job = submit(*SLOWLY, "run.max_restarts=1", *TWO_NODES)
    wait_until(lambda: steps(run) >= 15)
    explanation = explanation_of(run)
    assert re.fullmatch(r"attempt 1 is at step \d+ of 2000, [\d,]+ samples/s, with [\d:]+ to go; nothing is wrong",
                        explanation["sentence"])
    for number in (1, 2):
        wait_until(lambda: steps(run) >= 15 * number and (run / f"attempts/{number}").exists())
        os.kill(find_process(slurm, run, b"trainers.run", RANK="1", LAUNCH_ATTEMPT=number), signal.SIGKILL)
        wait_until(lambda: attempt(run, number)["outcome"] != "running")
    wait_until(lambda: state(run) == "failed")
    slurm.wait(job)

    explanation = explanation_of(run)
    first, second = explanation["attempts"]
    assert explanation["sentence"] == f"failed at step {second['to_step']} in attempt 2: rank 1 on node n2 was ended by SIGKILL"
    assert (explanation["cause"]["rank"], explanation["cause"]["node"], explanation["cause"]["signal"]) == (1, "n2", "SIGKILL")
    assert explanation["cause"]["log"] == str(run / "attempts/2/logs/1.log")
    assert first["why"] == "rank 1 on node n2 was ended by SIGKILL" and first["from_step"] == 0
    assert first["next_step"] == second["from_step"] == first["to_step"] - first["lost_steps"]
    assert 0 <= first["lost_steps"] <= 15 and second["to_step"] >= second["from_step"] > 0
    assert [job["state"] for job in explanation["slurm"]["jobs"]] == ["FAILED"]
    name = str(run)
    assert commands(explanation)[0] == f"launch resume {name}"
    assert f"launch resume {name} sbatch.exclude=n2" in commands(explanation)
    assert explanation["next"][0]["why"].startswith(f"it continues from its checkpoint of step {record(run)['checkpoint']}")


@pytest.mark.slow
def test_a_killed_node_process(slurm, submit):
    run, job = submit(*SLOWLY, "run.max_restarts=0", *TWO_NODES)
    wait_until(lambda: steps(run) >= 5)
    os.kill(find_process(slurm, run, b"launch.execute.node_process", SLURM_PROCID="1"), signal.SIGKILL)
    wait_until(lambda: state(run) == "failed")
    slurm.wait(job)
    explanation = explanation_of(run)
    at = explanation["attempts"][0]["to_step"]
    assert explanation["sentence"] == f"failed at step {at} in attempt 1: the node process on n2 is gone"
    assert explanation["cause"]["meaning"].startswith("something killed launch's own process on that node")
    assert "srun: error: n2: task 1: Killed" in explanation["slurm"]["said"]
    assert f"launch resume {run} sbatch.exclude=n2" in commands(explanation)


def test_a_run_that_waits(slurm, submit):
    run, job = submit(BLOBS, "--cluster", "here", "--gpus", 1, "sbatch.begin=now+1hour")
    wait_until(lambda: slurm.job(job)["Reason"] == "BeginTime")
    explanation = explanation_of(run)
    assert re.match(r"waits in SLURM's queue since [\d: -]{19}: its start time has not come .*; SLURM expects it to start at ",
                    explanation["sentence"])
    assert explanation["cause"] is None and commands(explanation) == [f"launch logs {run} --follow", f"launch cancel {run}"]
    slurm.run("scontrol", "uhold", job)
    explanation = explanation_of(run)
    assert "it was held by its owner" in explanation["sentence"] and commands(explanation)[0] == f"scontrol release {job}"


def test_a_setup_line_that_fails(slurm, slurm_launch, submit):
    write_cluster(slurm_launch.folder, setup=["cd /nonexistent || exit 7"])
    run, job = submit(BLOBS, "--cluster", "here", "--gpus", 1)
    slurm.wait(job)
    explanation = explanation_of(run)
    assert explanation["sentence"] == ("failed before its first attempt: a line of `setup:` in the file of cluster here failed: "
                                       "cd: /nonexistent: No such file or directory")
    assert explanation["slurm"]["jobs"][0]["exit_code"] == 7
    assert explanation["cause"]["log"] == str(run / f"submissions/1/{job}_0_log.out")


def test_no_python_on_the_nodes(slurm, slurm_launch, submit):
    write_cluster(slurm_launch.folder, python="/nonexistent/python3")
    run, job = submit(BLOBS, "--cluster", "here", "--gpus", 1)
    slurm.wait(job)
    explanation = explanation_of(run)
    assert explanation["sentence"] == ("failed before its first attempt: `/nonexistent/python3` does not exist on the node, or "
                                       "cannot be executed there")
    assert commands(explanation)[0] == "launch doctor --cluster here --job"


@pytest.fixture
def hide(slurm, tmp_path):
    """A function that restarts a node's slurmd such that the slurmd cannot see this test's folder."""

    def hide_from(node: str) -> None:
        slurm.kill_slurmd(node)
        slurm.start_slurmd(node, "unshare", "-m", "--propagation", "private", "sh", "-c",
                           f'mount -t tmpfs tmpfs {tmp_path} && exec "$@"', "sh")

    if os.geteuid():
        pytest.skip("only root can hide a folder from a node")
    return hide_from


def test_a_run_folder_that_the_head_node_cannot_see(slurm, submit, hide):
    hide("n1")
    run, job = submit(BLOBS, "--cluster", "here", "--gpus", 1, "sbatch.nodelist=n1")
    slurm.wait(job)
    explanation = explanation_of(run)
    assert explanation["sentence"].startswith(f"failed before its first attempt: a node could not write to {run}")
    assert explanation["slurm"]["jobs"][0]["signal"] == 53 and "no node could write" in explanation["cause"]["log_end"][0]
    assert commands(explanation)[0] == "launch doctor --cluster here --job"
    assert commands(explanation)[1].endswith("run.yaml --gpus 1 --nodes 1 --cluster here --runs DIR")


def test_a_run_folder_that_another_node_cannot_see(slurm, submit, hide):
    hide("n2")
    run, job = submit(BLOBS, *TWO_NODES, "sbatch.nodelist=n[1-2]")
    wait_until(lambda: "launch failed" in "".join(log.read_text() for log in run.glob("submissions/1/*_0_log.out")))
    explanation = explanation_of(run)
    assert explanation["sentence"].startswith(f"job {job} has started on n1, n2, but a node could not write to {run}")
    assert "srun: error: task 1 launch failed: Slurmd could not connect IO" in explanation["slurm"]["said"]


@pytest.mark.slow
def test_a_node_whose_slurmd_was_killed(slurm, submit):
    """Its ranks stay alive. SLURM considers the node dead and starts the job again on other nodes."""
    run, job = submit(*SLOWLY, *TWO_NODES)
    wait_until(lambda: steps(run) >= 15)
    slurm.kill_slurmd("n2")
    slurm.wait_until_requeued(job)
    explanation = explanation_of(run)
    at = record(run)["checkpoint"]
    assert explanation["sentence"].endswith(f"; it stopped with a checkpoint at step {at} in attempt 1: node n2 went down "
                                            "(DOWN, Not responding)")
    assert "srun: error: Node failure on n2" in explanation["slurm"]["said"]
    slurm.start_now(job)
    wait_until(lambda: steps(run) > at)
    first, second = explanation_of(run)["attempts"]
    assert (first["lost_steps"], second["from_step"], second["nodes"]) == (0, at, ["n1", "n3"])
