"""The result of one check of `launch doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launch.cluster import slurm
from launch.cluster.config import ClusterConfig


@dataclass(frozen=True)
class Check:
    """The result of one check. The names of its fields are keys of `launch doctor --json`."""

    name: str
    ok: Literal["ok", "warning", "error"]
    what: str               # the finding
    fix: str | None = None  # what to do about it


def line(check: Check) -> str:
    """A check as text for a person, with the fix on a second line."""
    fix = f"\n{'':<21}{check.fix}" if check.fix and check.ok != "ok" else ""
    return f"{check.ok:<9}{check.name:<12}{check.what}{fix}"


def partitions_of(cluster: ClusterConfig) -> list[slurm.Partition]:
    """The partitions that the cluster's jobs may go to.

    Raises:
        UserError: SLURM does not answer.
    """
    names = (cluster.partition or "").split(",")
    return [part for part in slurm.partitions() if part.name in names or not cluster.partition and part.default]
