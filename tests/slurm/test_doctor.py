"""`launch doctor` on the cluster, whole and broken."""

from __future__ import annotations

import os

import pytest
from slurm.cluster import cluster
from slurm.conftest import write_cluster

from launch.cluster.config import ClusterConfig, load_cluster
from launch.report.doctor.check import line
from launch.report.doctor.checks import doctor

pytestmark = pytest.mark.slow  # not each, but together


@pytest.fixture
def examine(slurm, slurm_launch, monkeypatch):
    """All that doctor finds, by name, with a cluster file that says more."""
    folder = slurm_launch.folder
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    monkeypatch.chdir(folder)
    monkeypatch.setattr("launch.report.doctor.trial_job.TROUBLE_S", 2.0)

    def one(job=False, nodes=None, **more):
        write_cluster(folder, **more)
        said: list[str] = []
        found: dict[str, list] = {}
        for check in doctor(load_cluster("here"), folder / "runs", job, nodes, said.append):
            print(line(check))
            found.setdefault(check.name, []).append(check)
        print(*said, sep="\n")
        return found

    return one


def test_a_cluster_in_order(examine, slurm_launch):
    found = examine()
    assert {name: checks[0].ok for name, checks in found.items()} == dict.fromkeys(
        ("packages", "runs", "slurm", "partition", "nodes", "sbatch", "accounting", "requeue", "grace", "W&B"), "ok")
    assert found["nodes"][0].what == "all 3 are in order"
    assert found["sbatch"][0].what == "would take 1 GPU(s) on 1 node(s) and 8 GPU(s) on 1 node(s)"
    assert "preempted, a job is killed after 20 s" in found["grace"][0].what
    assert not list(slurm_launch.folder.glob("runs/*"))


def test_what_sbatch_refuses(examine):
    found = examine(gpus_per_node=9, time="2d")
    (small, whole) = found["sbatch"]
    assert small.what == "the smallest job: the time limit is 2-00:00:00; partition `main` allows 1-00:00:00"
    assert whole.what == "a whole node: SLURM refuses this job: Requested node configuration is not available"
    assert "has 3 node(s) of 16 cores, 62 GiB and 8 GPU(s)" in whole.mend
    (refused, _) = examine(partition="man")["sbatch"]
    assert refused.mend.startswith("did you mean sbatch.partition=main?")


def test_nodes_that_take_no_jobs(slurm, examine):
    slurm.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=bad fan")
    (check,) = examine()["nodes"]
    assert (check.ok, check.what) == ("warning", "1 of 3 take no jobs: n2 (drained, bad fan)")
    slurm.run("scontrol", "update", "NodeName=n[1,3]", "State=DOWN", "Reason=power")
    assert examine()["nodes"][0].ok == "error"


@pytest.mark.slow
def test_no_controller(slurm, examine, monkeypatch, tmp_path):
    """The commands are here and find a cluster file; nobody answers."""
    text = slurm.conf.read_text()
    port = next(line for line in text.splitlines() if line.startswith("SlurmctldPort="))
    (tmp_path / "slurm.conf").write_text(text.replace(port, "SlurmctldPort=1"))
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    checks = list(doctor(load_cluster("here"), tmp_path / "runs", job=True))
    (found,) = [check for check in checks if check.ok == "error"]
    assert found.name == "slurm" and found.what.endswith("is DOWN") and found.mend.startswith("SLURM's controller is down")


@pytest.mark.slow
def test_the_job(examine, slurm_launch):
    found = examine(job=True)
    (job,) = found["job"]
    assert job.ok == "ok" and job.what.startswith("2 rank(s) on n1, n2; of rank 0: torch: ")
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
    job, all = examine(job=True, prefix=[str(wrapper)])["job"]
    assert job.ok == "error" and job.what == ("node n2: torch: rank 1: ImportError: libcudart.so.13: cannot open shared "
                                              "object file")
    (run,) = folder.glob("runs/doctor-*")
    assert all.what == "failed on n2" and f"launch explain {run}" in all.mend
    told = slurm_launch("status", run)
    assert "failed" in told.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can hide a folder from a node")
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_the_node_that_cannot_see_the_folder_of_runs_is_named(slurm, examine, tmp_path, node):
    slurm.kill_slurmd(node)
    slurm.start_slurmd(node, "unshare", "-m", "--propagation", "private", "sh", "-c",
                       f'mount -t tmpfs tmpfs {tmp_path} && exec "$@"', "sh")
    job, all = examine(job=True)["job"]
    assert all.what == f"failed on {node}"
    assert job.ok == "error" and job.what.startswith(f"node {node}: folder: it could write nothing into {tmp_path}/runs/doctor-")
    assert not slurm.run("squeue", "-h")


@pytest.mark.parametrize("more, node, what", [
    ({"python": "/nonexistent/python3"}, "n1", "slurmstepd-n1: error: execve(): /nonexistent/python3: No such file or directory"),
    ({"setup": ["cd /nonexistent || exit 7"]}, "n1", "cd: /nonexistent: No such file or directory"),
    ({"interface": "ib7"}, "n1", "error: this host has no interface `ib7` with an IPv4 address"),
])
def test_why_nodes_could_not_start_is_told(examine, more, node, what):
    job = examine(job=True, **more)["job"][0]
    assert job.ok == "error" and job.what.startswith(f"node {node}: start: ") and what in job.what


def test_a_job_that_does_not_start(examine, slurm, slurm_launch, monkeypatch):
    monkeypatch.setattr("launch.report.doctor.trial_job.START_S", 1.0)
    (job,) = examine(job=True, sbatch={"begin": "now+1hour"})["job"]
    assert job.ok == "warning" and "has not started within 1 s: its start time has not come" in job.what
    assert not slurm.run("squeue", "-h") and not list(slurm_launch.folder.glob("runs/*"))


def test_a_site_that_does_not_requeue_by_default(needs_slurm, monkeypatch, tmp_path):
    with cluster(nodes=1, gpus=0, cpus=1, extra="JobRequeue=0\nMinJobAge=60") as slurm:
        monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
        found = {check.name: check for check in doctor(ClusterConfig(name="here", kind="slurm", device="cpu"), tmp_path)}
        assert "shared" not in found  # its only node is this host
    assert found["requeue"].what == "jobs come back after time limits and preemption; not by default here, but jobs ask for it"
    assert "known for 60 sec" in found["accounting"].what
