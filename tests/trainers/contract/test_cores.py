"""The number of cores that a process may use, by its affinity and by the CPU quota of its cgroup."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainers.contract.cores import threads_asked_for, usable_cores


@pytest.fixture(autouse=True)
def sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))


def files(root: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def version_1(group: str, quota: int) -> dict[str, str]:
    """The files of a cgroup of version 1, with a quota in microseconds of each 100,000."""
    folder = f"sys/fs/cgroup/cpu{group}"
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": "100000\n"}


CASES = {
    "version 2, in a container": ("0::/\n", {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
    "version 2, of a parent": ("0::/a/b\n", {"sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
                                             "sys/fs/cgroup/a/cpu.max": "350000 100000\n"}, 4),
    "version 2, outside of the namespace": ("0::/../x\n", {"sys/fs/cgroup/cpu.max": "300000 100000\n"}, 16),
    "version 1": ("4:memory:/c\n2:cpu,cpuacct:/c\n", {**version_1("/c", 50_000), **version_1("", -1)}, 1),
    "version 1, where the mount is the container": ("2:cpu:/docker/c0ffee\n", version_1("", 600_000), 6),
    "more than the affinity": ("0::/\n", {"sys/fs/cgroup/cpu.max": "6400000 100000\n"}, 16),
    "no quota": ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
    "of another controller": ("4:memory:/c\n", version_1("/c", 50_000), 16),
    "unreadable": ("0::/\n", {"sys/fs/cgroup/cpu.max": "\n"}, 16),
}


@pytest.mark.parametrize("name", CASES)
def test_a_quota_counts(tmp_path: Path, name: str) -> None:
    groups, texts, cores = CASES[name]
    assert usable_cores(files(tmp_path, {"proc/self/cgroup": groups, **texts})) == cores


def test_without_cgroups_the_affinity_counts(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == 16


@pytest.mark.parametrize("text, threads", [("4", 4), ("4,2", 4), (" 8 ", 8), ("", None), ("0", None), ("-1", None), ("²", None),
                                           ("abc", None), ("9" * 20, None)])
def test_omp_num_threads(text: str, threads: int | None) -> None:
    assert threads_asked_for({"OMP_NUM_THREADS": text}) == threads


def test_threads_of_ranks_heed_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.cluster.resources import Wanted, local_resources
    from trainers.runner import Place

    monkeypatch.setattr("launch.cluster.resources.usable_cores", lambda: 6)
    monkeypatch.setattr("trainers.runner.usable_cores", lambda: 3)
    assert local_resources(Wanted(procs=2), {}).threads == 3
    assert Place.from_env({}).cores == 3
