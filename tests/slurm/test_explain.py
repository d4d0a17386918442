"""What `launch explain` says of what really happened to runs on the cluster. (Of a dead node: test_interruptions.py.)"""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
from conftest import BLOBS, attempt, record, wait_until
from slurm.cluster import descendants
from slurm.conftest import explained, write_cluster

SLOWLY = (BLOBS, "train.steps=2000", "eval.every=never", "checkpoint.every=10", "run.grace_s=10", "model.pause_s=0.03")
TWO_NODES = ("--cluster", "here", "--gpus", 2, "--nodes", 2)


@pytest.fixture
def submit(slurm, slurm_launch, monkeypatch):
    """Submits, and gives (the run's folder, its job's id)."""
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))

    def one(*args):
        done = slurm_launch(*args, "--json")
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        return slurm_launch.folder / "runs" / said["id"], said["jobs"][0]

    return one


def steps(run) -> int:
    try:
        return (run / "metrics.jsonl").read_text().count('"train"')
    except FileNotFoundError:
        return 0


def state(run) -> str:
    return record(run)["state"]


def process(slurm, run, *words: bytes, **variables: str) -> int:
    """The process of a run on the cluster with such words in its command and such variables."""
    found = []
    for pid in descendants(slurm.keeper.pid):
        try:
            command = open(f"/proc/{pid}/cmdline", "rb").read().split(b"\0")
            env = open(f"/proc/{pid}/environ", "rb").read().split(b"\0")
        except OSError:
            continue
        ours = any(word.startswith(bytes(run)) for word in command) and not command[0].endswith(b"srun")
        if ours and {*words} <= {*command} and all(f"{key}={value}".encode() in env for key, value in variables.items()):
            found.append(pid)
    (pid,) = found
    return pid


def commands(found) -> list[str]:
    return [step["command"] for step in found["next"]]


@pytest.mark.slow
def test_a_killed_rank(slurm, submit):
    run, job = submit(*SLOWLY, "run.max_restarts=1", *TWO_NODES)
    wait_until(lambda: steps(run) >= 15)
    going = explained(run)
    assert re.fullmatch(r"attempt 1 is at step \d+ of 2000, [\d,]+ samples/s, with [\d:]+ to go; nothing is wrong",
                        going["sentence"])
    for number in (1, 2):
        wait_until(lambda: steps(run) >= 15 * number and (run / f"attempts/{number}").exists())
        os.kill(process(slurm, run, b"trainers.run", RANK="1", LAUNCH_ATTEMPT=number), signal.SIGKILL)
        wait_until(lambda: attempt(run, number)["outcome"] != "running")
    wait_until(lambda: state(run) == "failed")
    slurm.wait(job)

    found = explained(run)
    first, second = found["attempts"]
    assert found["sentence"] == f"failed at step {second['to_step']} in attempt 2: rank 1 on node n2 was ended by SIGKILL"
    assert (found["cause"]["rank"], found["cause"]["node"], found["cause"]["signal"]) == (1, "n2", "SIGKILL")
    assert found["cause"]["log"] == str(run / "attempts/2/logs/1.log")
    assert first["why"] == "rank 1 on node n2 was ended by SIGKILL" and first["from_step"] == 0
    assert first["next_step"] == second["from_step"] == first["to_step"] - first["lost_steps"]
    assert 0 <= first["lost_steps"] <= 15 and second["to_step"] >= second["from_step"] > 0
    assert [ended["state"] for ended in found["slurm"]["jobs"]] == ["FAILED"]
    name = str(run)
    assert commands(found)[0] == f"launch resume {name}" and f"launch resume {name} sbatch.exclude=n2" in commands(found)
    assert found["next"][0]["why"].startswith(f"it goes on from its checkpoint of step {record(run)['checkpoint']}")


@pytest.mark.slow
def test_a_killed_node_process(slurm, submit):
    run, job = submit(*SLOWLY, "run.max_restarts=0", *TWO_NODES)
    wait_until(lambda: steps(run) >= 5)
    os.kill(process(slurm, run, b"launch.execute.node_process", SLURM_PROCID="1"), signal.SIGKILL)
    wait_until(lambda: state(run) == "failed")
    slurm.wait(job)
    found = explained(run)
    at = found["attempts"][0]["to_step"]
    assert found["sentence"] == f"failed at step {at} in attempt 1: the node process on n2 is gone"
    assert found["cause"]["meaning"].startswith("something killed launch's own process there")
    assert "srun: error: n2: task 1: Killed" in found["slurm"]["said"]
    assert f"launch resume {run} sbatch.exclude=n2" in commands(found)


def test_a_run_that_waits(slurm, submit):
    run, job = submit(BLOBS, "--cluster", "here", "--gpus", 1, "sbatch.begin=now+1hour")
    wait_until(lambda: slurm.job(job)["Reason"] == "BeginTime")
    found = explained(run)
    assert re.match(r"waits in SLURM's queue since [\d: -]{19}: its start time has not come .*; by SLURM's estimate it starts ",
                    found["sentence"])
    assert found["cause"] is None and commands(found) == [f"launch logs {run} --follow", f"launch cancel {run}"]
    slurm.run("scontrol", "uhold", job)
    found = explained(run)
    assert "it was held by its owner" in found["sentence"] and commands(found)[0] == f"scontrol release {job}"


def test_a_setup_line_that_fails(slurm, slurm_launch, submit):
    write_cluster(slurm_launch.folder, setup=["cd /nonexistent || exit 7"])
    run, job = submit(BLOBS, "--cluster", "here", "--gpus", 1)
    slurm.wait(job)
    found = explained(run)
    assert found["sentence"] == ("failed before its first attempt: a line of `setup:` in the file of cluster here failed: "
                                 "cd: /nonexistent: No such file or directory")
    assert found["slurm"]["jobs"][0]["exit_code"] == 7 and found["cause"]["log"] == str(run / f"submissions/1/{job}_0_log.out")


def test_no_python_on_the_nodes(slurm, slurm_launch, submit):
    write_cluster(slurm_launch.folder, python="/nonexistent/python3")
    run, job = submit(BLOBS, "--cluster", "here", "--gpus", 1)
    slurm.wait(job)
    found = explained(run)
    assert found["sentence"] == ("failed before its first attempt: there is no `/nonexistent/python3` on the node, or it may "
                                 "not be run")
    assert commands(found)[0] == "launch doctor --cluster here --job"


@pytest.fixture
def hide(slurm, tmp_path):
    """Starts a node's slurmd anew where it cannot see the folder of this test."""

    def one(node: str) -> None:
        slurm.kill_slurmd(node)
        slurm.start_slurmd(node, "unshare", "-m", "--propagation", "private", "sh", "-c",
                           f'mount -t tmpfs tmpfs {tmp_path} && exec "$@"', "sh")

    if os.geteuid():
        pytest.skip("only root can hide a folder from a node")
    return one


def test_a_run_folder_that_the_head_node_cannot_see(slurm, submit, hide):
    hide("n1")
    run, job = submit(BLOBS, "--cluster", "here", "--gpus", 1, "sbatch.nodelist=n1")
    slurm.wait(job)
    found = explained(run)
    assert found["sentence"].startswith(f"failed before its first attempt: a node could not write into {run}")
    assert found["slurm"]["jobs"][0]["signal"] == 53 and "no node could write" in found["cause"]["log_end"][0]
    assert commands(found)[0] == "launch doctor --cluster here --job"
    assert commands(found)[1].endswith("run.yaml --gpus 1 --nodes 1 --cluster here --runs DIR")


def test_a_run_folder_that_another_node_cannot_see(slurm, submit, hide):
    hide("n2")
    run, job = submit(BLOBS, *TWO_NODES, "sbatch.nodelist=n[1-2]")
    wait_until(lambda: "launch failed" in "".join(log.read_text() for log in run.glob("submissions/1/*_0_log.out")))
    found = explained(run)
    assert found["sentence"].startswith(f"job {job} has started on n1, n2, but a node could not write into {run}")
    assert "srun: error: task 1 launch failed: Slurmd could not connect IO" in found["slurm"]["said"]


@pytest.mark.slow
def test_a_node_whose_slurmd_was_killed(slurm, submit):
    """Its ranks live on; SLURM takes the node for dead and begins the job anew elsewhere."""
    run, job = submit(*SLOWLY, *TWO_NODES)
    wait_until(lambda: steps(run) >= 15)
    slurm.kill_slurmd("n2")
    slurm.wait_requeued(job)
    found = explained(run)
    at = record(run)["checkpoint"]
    assert found["sentence"].endswith(f"; it stopped with a checkpoint at step {at} in attempt 1: node n2 went down (DOWN, Not "
                                      "responding)")
    assert "srun: error: Node failure on n2" in found["slurm"]["said"]
    slurm.start_now(job)
    wait_until(lambda: steps(run) > at)
    first, second = explained(run)["attempts"]
    assert (first["lost_steps"], second["from_step"], second["nodes"]) == (0, at, ["n1", "n3"])
