"""`launch doctor` on a healthy cluster and on broken clusters."""

from __future__ import annotations

import os

import pytest
from slurm.cluster import cluster
from slurm.conftest import write_cluster

from launch.cluster.config import ClusterConfig, load_cluster
from launch.report.doctor.check import line
from launch.report.doctor.checks import doctor

pytestmark = pytest.mark.slow  # each test is fast, the file is slow


@pytest.fixture
def examine(slurm, slurm_launch, monkeypatch):
    """A function that runs doctor with changes to the cluster file and returns the checks by name."""
    folder = slurm_launch.folder
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    monkeypatch.chdir(folder)
    monkeypatch.setattr("launch.report.doctor.trial_job.TROUBLE_S", 2.0)

    def run_doctor(job=False, nodes=None, **changes):
        write_cluster(folder, **changes)
        notes: list[str] = []
        checks: dict[str, list] = {}
        for check in doctor(load_cluster("here"), folder / "runs", job, nodes, notes.append):
            print(line(check))
            checks.setdefault(check.name, []).append(check)
        print(*notes, sep="\n")
        return checks

    return run_doctor


def test_a_healthy_cluster(examine, slurm_launch):
    checks = examine()
    assert {name: results[0].ok for name, results in checks.items()} == dict.fromkeys(
        ("packages", "runs", "slurm", "partition", "nodes", "sbatch", "accounting", "requeue", "grace", "W&B"), "ok")
    assert checks["nodes"][0].what == "all 3 take jobs"
    assert checks["sbatch"][0].what == "accepts 1 GPU(s) on 1 node(s) and 8 GPU(s) on 1 node(s)"
    assert "a preempted job is killed after 20 s" in checks["grace"][0].what
    assert not list(slurm_launch.folder.glob("runs/*"))


def test_jobs_that_sbatch_refuses(examine):
    checks = examine(gpus_per_node=9, time="2d")
    (small, whole) = checks["sbatch"]
    assert small.what == "the smallest job: the time limit is 2-00:00:00; partition `main` allows 1-00:00:00"
    assert whole.what == "a whole node: SLURM refuses this job: Requested node configuration is not available"
    assert "has 3 node(s) of 16 cores, 62 GiB and 8 GPU(s)" in whole.fix
    (refused, _) = examine(partition="man")["sbatch"]
    assert refused.fix.startswith("did you mean sbatch.partition=main?")


def test_nodes_that_take_no_jobs(slurm, examine):
    slurm.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=bad fan")
    (check,) = examine()["nodes"]
    assert (check.ok, check.what) == ("warning", "1 of 3 take no jobs: n2 (drained, bad fan)")
    slurm.run("scontrol", "update", "NodeName=n[1,3]", "State=DOWN", "Reason=power")
    assert examine()["nodes"][0].ok == "error"


@pytest.mark.slow
def test_a_controller_that_does_not_answer(slurm, examine, monkeypatch, tmp_path):
    """SLURM's commands are installed and find slurm.conf, but slurmctld does not run at that port."""
    text = slurm.conf.read_text()
    port = next(line for line in text.splitlines() if line.startswith("SlurmctldPort="))
    (tmp_path / "slurm.conf").write_text(text.replace(port, "SlurmctldPort=1"))
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    checks = list(doctor(load_cluster("here"), tmp_path / "runs", job=True))
    (failed,) = [check for check in checks if check.ok == "error"]
    assert failed.name == "slurm" and failed.what.endswith("is DOWN") and failed.fix.startswith("SLURM's controller is down")


@pytest.mark.slow
def test_a_trial_job(examine, slurm_launch):
    checks = examine(job=True)
    (job,) = checks["job"]
    assert job.ok == "ok" and job.what.startswith("2 rank(s) on n1, n2; rank 0: torch: ")
    assert "all-reduce: over gloo, 2 rank(s)" in job.what
    assert not list(slurm_launch.folder.glob("runs/*"))


@pytest.mark.slow
def test_the_node_whose_torch_is_broken_is_named(examine, slurm_launch):
    folder = slurm_launch.folder
    (folder / "broken").mkdir()
    (folder / "broken/torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    wrapper = folder / "wrapper.sh"
    wrapper.write_text(f'#!/bin/sh\n[ "$SLURM_PROCID" = 1 ] && export PYTHONPATH={folder}/broken:$PYTHONPATH\nexec "$@"\n')
    wrapper.chmod(0o755)
    job, summary = examine(job=True, prefix=[str(wrapper)])["job"]
    assert job.ok == "error" and job.what == ("node n2: torch: rank 1: ImportError: libcudart.so.13: cannot open shared "
                                              "object file")
    (run,) = folder.glob("runs/doctor-*")
    assert summary.what == "failed on n2" and f"launch explain {run}" in summary.fix
    status = slurm_launch("status", run)
    assert "failed" in status.stdout
    explained = slurm_launch("explain", run).stdout
    assert ": rank 1 on node n2 ended with exit code 1: torch failed: ImportError: libcudart" in explained


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can hide a folder from a node")
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_the_node_that_cannot_see_the_folder_of_runs_is_named(slurm, examine, tmp_path, node):
    slurm.kill_slurmd(node)
    slurm.start_slurmd(node, "unshare", "-m", "--propagation", "private", "sh", "-c",
                       f'mount -t tmpfs tmpfs {tmp_path} && exec "$@"', "sh")
    job, summary = examine(job=True)["job"]
    assert summary.what == f"failed on {node}"
    assert job.ok == "error" and job.what.startswith(f"node {node}: folder: it could not write to {tmp_path}/runs/doctor-")
    assert not slurm.run("squeue", "-h")


@pytest.mark.parametrize("changes, node, reason", [
    ({"python": "/nonexistent/python3"}, "n1", "slurmstepd-n1: error: execve(): /nonexistent/python3: No such file or directory"),
    ({"setup": ["cd /nonexistent || exit 7"]}, "n1", "cd: /nonexistent: No such file or directory"),
    ({"interface": "ib7"}, "n1", "error: this host has no interface `ib7` with an IPv4 address"),
])
def test_the_reason_why_a_node_could_not_start_is_shown(examine, changes, node, reason):
    job = examine(job=True, **changes)["job"][0]
    assert job.ok == "error" and job.what.startswith(f"node {node}: start: ") and reason in job.what


def test_a_trial_job_that_does_not_start(examine, slurm, slurm_launch, monkeypatch):
    monkeypatch.setattr("launch.report.doctor.trial_job.START_S", 1.0)
    (job,) = examine(job=True, sbatch={"begin": "now+1hour"})["job"]
    assert job.ok == "warning" and "has not started within 1 s: its start time has not come" in job.what
    assert not slurm.run("squeue", "-h") and not list(slurm_launch.folder.glob("runs/*"))


def test_a_site_that_does_not_requeue_by_default(needs_slurm, monkeypatch, tmp_path):
    with cluster(nodes=1, gpus=0, cpus=1, extra="JobRequeue=0\nMinJobAge=60") as slurm:
        monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
        checks = {check.name: check for check in doctor(ClusterConfig(name="here", kind="slurm", device="cpu"), tmp_path)}
        assert "shared" not in checks  # the only node is this host, so every folder is shared
    assert checks["requeue"].what == ("jobs are requeued after time limits and preemption; SLURM requeues only jobs that ask "
                                     "for it, and launch's jobs do")
    assert "SLURM knows how a job ended for 60 sec" in checks["accounting"].what
