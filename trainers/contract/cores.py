"""The number of CPU cores that a process may use, and of threads that it is asked to use. Imports no torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

# Where cgroups are mounted, below the root folder: version 2 (alone, or beside version 1), and the `cpu` part of version 1.
MOUNTS = ("sys/fs/cgroup", "sys/fs/cgroup/unified"), ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct")


def threads_asked_for(env: Mapping[str, str]) -> int | None:
    """Return the threads that OMP_NUM_THREADS asks for; None if it is not set, or is not a number that OpenMP accepts."""
    # OpenMP also reads a list, `4,2`: the second number is for parallel regions inside of parallel regions.
    match = re.fullmatch(r"([1-9][0-9]{0,4})(,.*)?", env.get("OMP_NUM_THREADS", "").strip())
    return int(match[1]) if match else None


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: those of its affinity, at most its CPU quota, rounded up.

    A container with a limit on CPUs (`docker run --cpus 2`, Kubernetes) sees all cores of its host. More threads than its
    quota allows only wait for each other.
    """
    return max(1, min(len(os.sched_getaffinity(0)), math.ceil(min(_quotas(root), default=1e9))))


def _quotas(root: Path) -> list[float]:
    """Return the CPU quota, in cores, of each cgroup with a quota that holds this process."""
    try:
        rows = [row.split(":", 2) for row in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    quotas = []
    for _, controllers, path in rows:
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in MOUNTS[bool(controllers)]:
            # In a container, the mount may begin at the container's own cgroup, while the path is the host's: try all parts.
            folders = [root / mount / path.lstrip("/")]
            while folders[-1] != root / mount and ".." not in folders[-1].parts:
                folders.append(folders[-1].parent)
            quotas += [quota for quota in map(_quota, folders) if quota is not None]
    return quotas


def _quota(folder: Path) -> float | None:
    """Return the CPU quota of a cgroup, in cores; None if it has no quota."""
    try:
        if (version_2 := folder / "cpu.max").exists():
            used, _, period = version_2.read_text().partition(" ")
        else:
            used, period = (folder / "cpu.cfs_quota_us").read_text(), (folder / "cpu.cfs_period_us").read_text()
        return int(used) / int(period) if int(used) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # "max": no quota
        return None
