"""One private SLURM cluster for all tests here, and `launch` on its login node."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Command
from slurm.cluster import Cluster, cluster, missing, outside

from launch.records.run import read_run
from launch.report.explain import explain, told


@pytest.fixture(scope="session")
def needs_slurm() -> None:
    """Skips where SLURM is not installed; in CI that is a failure."""
    if lacking := missing():
        told = f"not installed: {', '.join(lacking)} (Debian: slurm-wlm, munge)"
        if os.environ.get("CI"):
            pytest.fail(told, pytrace=False)
        pytest.skip(told)


@pytest.fixture(scope="session")
def shared_cluster(needs_slurm: None) -> Iterator[Cluster]:
    """Nodes n1, n2, n3 of 16 CPUs and eight stand-in GPUs each."""
    with cluster() as slurm:
        yield slurm


@pytest.fixture
def slurm(shared_cluster: Cluster) -> Iterator[Cluster]:
    """The session's cluster, to do anything with: afterwards its jobs are cancelled and its nodes made whole."""
    yield shared_cluster
    shared_cluster.clean()


@pytest.fixture
def own_cluster(needs_slurm: None) -> Iterator[Callable[..., Cluster]]:
    """Starts a cluster of the test's own, with the arguments of `cluster`; 32 small nodes take about a second."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(cluster(**options))


@dataclass
class LoginCommand(Command):
    """`launch` as on a cluster's login node: it finds the cluster, and nothing of an enclosing job."""

    slurm: Cluster

    def start(self, *args: object, ignoring: tuple[int, ...] = (), **env: str) -> subprocess.Popen:
        config = {"XDG_CONFIG_HOME": str(self.folder / "config")}
        return super().start(*args, ignoring=ignoring, **self.slurm.env | config | env)


@pytest.fixture(scope="session")
def login(shared_cluster: Cluster) -> Callable[[Path], LoginCommand]:
    """`launch` in a folder, with a config `here` of the test cluster."""

    def at(folder: Path) -> LoginCommand:
        write_cluster(folder)
        return LoginCommand(folder, shared_cluster)

    return at


@pytest.fixture
def slurm_launch(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoginCommand:
    """`launch` in a folder of its own. Variables given to a call win over all else."""
    for name in set(os.environ) - set(outside(os.environ)):
        monkeypatch.delenv(name)
    write_cluster(tmp_path)
    return LoginCommand(tmp_path, slurm)


def explained(run: Path) -> dict:
    """What `launch explain` says of a run; shown, too."""
    found = explain(read_run(run))
    print(told(found))
    assert json.loads(json.dumps(found)) == found
    return found


def write_cluster(folder: Path, **more: object) -> None:
    """The config `here` of the test cluster in `folder`, where LoginCommand looks for it."""
    values = {"kind": "slurm", "device": "cpu", "interface": "lo", "gpus_per_node": 8, "cpus_per_gpu": 1, "time": "30m", **more}
    path = folder / "config/launch/clusters/here.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))  # JSON is YAML
