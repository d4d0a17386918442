"""Fixtures: one private SLURM cluster for all tests of this folder, and `launch` as on its login node."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Command
from slurm.cluster import Cluster, cluster, missing_programs, without_slurm_variables

from launch.records.run import read_run
from launch.report.explain import explain, told


@pytest.fixture(scope="session")
def needs_slurm() -> None:
    """Skip the test where SLURM is not installed. In CI the test fails instead."""
    if lacking := missing_programs():
        message = f"not installed: {', '.join(lacking)} (Debian: slurm-wlm, munge)"
        if os.environ.get("CI"):
            pytest.fail(message, pytrace=False)
        pytest.skip(message)


@pytest.fixture(scope="session")
def shared_cluster(needs_slurm: None) -> Iterator[Cluster]:
    """A cluster of nodes n1, n2, n3, each with 16 CPUs and eight stand-in GPUs."""
    with cluster() as slurm:
        yield slurm


@pytest.fixture
def slurm(shared_cluster: Cluster) -> Iterator[Cluster]:
    """The shared cluster. A test may break it: after the test all jobs are cancelled and all daemons run again."""
    yield shared_cluster
    shared_cluster.clean()


@pytest.fixture
def start_cluster(needs_slurm: None) -> Iterator[Callable[..., Cluster]]:
    """A function that starts a cluster for this test alone. It takes the arguments of `cluster`; 32 nodes take about a second."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(cluster(**options))


@dataclass
class LoginCommand(Command):
    """`launch` as on the cluster's login node: it finds the cluster and the cluster file `here`."""

    slurm: Cluster

    def start(self, *args: object, ignoring: tuple[int, ...] = (), **env: str) -> subprocess.Popen:
        config = {"XDG_CONFIG_HOME": str(self.folder / "config")}
        return super().start(*args, ignoring=ignoring, **self.slurm.env | config | env)


@pytest.fixture(scope="session")
def launch_in(shared_cluster: Cluster) -> Callable[[Path], LoginCommand]:
    """A function that gives `launch` in a folder, with the cluster file `here` of the test cluster."""

    def make(folder: Path) -> LoginCommand:
        write_cluster(folder)
        return LoginCommand(folder, shared_cluster)

    return make


@pytest.fixture
def slurm_launch(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoginCommand:
    """`launch` in the test's own folder, without the variables of an enclosing job.

    Variables given to a call override all others.
    """
    for name in set(os.environ) - set(without_slurm_variables(os.environ)):
        monkeypatch.delenv(name)
    write_cluster(tmp_path)
    return LoginCommand(tmp_path, slurm)


def explanation_of(run: Path) -> dict:
    """Return the JSON of `launch explain` for a run, and print the text of `launch explain`."""
    # A command names a run by the shorter of its absolute and its relative path. From /usr/lib the absolute path is shorter.
    with chdir("/usr/lib"):
        explanation = explain(read_run(run))
    print(told(explanation))
    assert json.loads(json.dumps(explanation)) == explanation
    return explanation


def write_cluster(folder: Path, **more: object) -> None:
    """Write the cluster file `here` of the test cluster to the place in `folder` where LoginCommand looks for it."""
    values = {"kind": "slurm", "device": "cpu", "interface": "lo", "gpus_per_node": 8, "cpus_per_gpu": 1, "time": "30m", **more}
    path = folder / "config/launch/clusters/here.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))  # JSON is YAML
