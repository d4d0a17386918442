"""Tests of the test cluster itself: it has several nodes, its nodes die as real nodes do, and it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import alive, wait_until
from slurm.cluster import cluster, descendants

pytestmark = pytest.mark.slow  # each test is fast, the file is slow

TESTS = Path(__file__).parent.parent
STUBBORN = "trap : TERM; while :; do sleep 0.1; done"  # only SIGKILL ends it


def submit(slurm, *args: object, script: str) -> str:
    return slurm.run("sbatch", "--parsable", "--output", slurm.folder / "%j.out", *args, "--wrap", script).strip()


def output(slurm, job: str) -> str:
    return (slurm.folder / f"{job}.out").read_text()


def test_two_nodes_of_eight_gpus(slurm):
    job = submit(slurm, "-N2", "--ntasks-per-node=1", "--gpus-per-node=8",
                 script="srun sh -c 'echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES'")
    assert slurm.wait(job)["JobState"] == "COMPLETED"
    assert sorted(output(slurm, job).split("\n")[:2]) == ["n1 0,1,2,3,4,5,6,7", "n2 0,1,2,3,4,5,6,7"]
    assert slurm.try_run("sbatch", "--gpus-per-node=9", "--wrap", "true").returncode == 1
    assert slurm.job("999999") == {}


def test_a_requeued_job_waits_until_it_may_start(start_cluster):
    slurm = start_cluster(nodes=1, requeue_wait_s=100)
    job = submit(slurm, "--requeue", script="echo start $SLURM_RESTART_COUNT; exec sleep 60")
    slurm.wait(job, "RUNNING")
    slurm.run("scontrol", "requeue", job)
    slurm.wait_until_requeued(job)
    started = time.monotonic()
    slurm.start_now(job)
    assert slurm.wait(job, "RUNNING")["Restarts"] == "1"
    assert time.monotonic() - started < 90, "the job started late, when cred_expire had passed, and not because of start_now"
    wait_until(lambda: "start 1\n" in output(slurm, job))


def test_a_slurmd_is_killed_with_or_without_its_job_steps(slurm):
    job = submit(slurm, "-w", "n2", script=STUBBORN)
    slurm.wait(job, "RUNNING")
    (stepd,) = wait_until(lambda: [pid for pid in slurm.stepds("n2") if descendants(pid)])
    task = descendants(stepd)[0]
    slurm.kill_slurmd("n2")
    assert alive(stepd) and alive(task), "processes that slurmd started must outlive slurmd"
    slurm.start_slurmd("n2")
    assert slurm.stepds("n2") == [stepd] and slurm.job(job)["JobState"] == "RUNNING"
    slurm.kill_slurmd("n2", steps=True)
    assert not alive(stepd) and not alive(task)
    slurm.clean()
    assert {slurm.node(name)["State"] for name in slurm.nodes} == {"IDLE"} and not slurm.stepds("n2")


def test_clean_does_not_wait_for_killwait(start_cluster):
    """Also with a controller that is down."""
    slurm = start_cluster(extra="KillWait=100")
    job = submit(slurm, "-N3", "--ntasks-per-node=1", script=f"srun bash -c '{STUBBORN}'")
    slurm.wait(job, "RUNNING")
    slurm.run("scancel", job)
    slurm.kill_slurmctld()
    started = time.monotonic()
    slurm.clean()
    assert time.monotonic() - started < 90


def test_a_cluster_that_cannot_start_raises_an_error_and_leaves_nothing(needs_slurm):
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
    with pytest.raises(RuntimeError, match="(?s)slurmctld ended.*NoSuchKey"), cluster(extra="NoSuchKey=1", folder=folder):
        pass
    assert not folder.exists()


def test_a_cluster_ended_by_ctrl_c_leaves_nothing(needs_slurm):
    with pytest.raises(KeyboardInterrupt), cluster() as slurm:
        slurm.wait(submit(slurm, script=STUBBORN), "RUNNING")
        family = descendants(slurm.keeper.pid)
        raise KeyboardInterrupt
    assert slurm.keeper.poll() == 0 and not slurm.folder.exists()
    assert set(slurm.pids.values()) < set(family) and not any(map(alive, family))


def test_a_killed_test_run_leaves_nothing(needs_slurm):
    """The process that holds the cluster is killed by SIGKILL. Its job ignores SIGTERM and has left its session."""
    script = (
        "import time; from slurm.cluster import cluster\n"
        "with cluster(nodes=2) as slurm:\n"
        f"    job = slurm.run('sbatch', '--parsable', '-N2', '--wrap', {f'setsid bash -c {STUBBORN!r}'!r}).strip()\n"
        "    slurm.wait(job, 'RUNNING')\n"
        "    print(slurm.folder, slurm.keeper.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], cwd=TESTS, stdout=subprocess.PIPE, text=True)
    folder, keeper = holder.stdout.readline().split()
    wait_until(lambda: any("setsid" in _command(pid) or "trap" in _command(pid) for pid in descendants(int(keeper))))
    family = [int(keeper), *descendants(int(keeper))]
    assert len(family) > 6  # munged, slurmctld, two slurmd, the job
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    wait_until(lambda: not any(map(alive, family)))
    assert not Path(folder).exists()


def test_without_slurm_tests_are_skipped_and_in_ci_they_fail(tmp_path):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", f"{__file__}::test_two_nodes_of_eight_gpus"]
    env = {k: v for k, v in os.environ.items() if k != "CI"} | {"PATH": str(tmp_path)}
    outside_ci = subprocess.run(command, cwd=TESTS.parent, env=env, capture_output=True, text=True)
    assert outside_ci.returncode == 0 and "1 skipped" in outside_ci.stdout, outside_ci.stdout
    assert "not installed: sbatch" in outside_ci.stdout, outside_ci.stdout
    in_ci = subprocess.run(command, cwd=TESTS.parent, env=env | {"CI": "true"}, capture_output=True, text=True)
    assert in_ci.returncode == 1 and "1 error" in in_ci.stdout and "not installed: sbatch" in in_ci.stdout, in_ci.stdout


def test_thirty_two_nodes(start_cluster):
    started = time.monotonic()
    slurm = start_cluster(nodes=32, gpus=0, cpus=1)
    up = time.monotonic()
    job = submit(slurm, "-N32", "--ntasks-per-node=1", script="srun sh -c 'echo $SLURMD_NODENAME'")
    assert slurm.wait(job)["JobState"] == "COMPLETED"
    assert sorted(output(slurm, job).split()) == sorted(slurm.nodes)
    print(f"32 nodes up in {up - started:.1f} s, a task on each after {time.monotonic() - up:.1f} s")


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
