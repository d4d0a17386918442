"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launch.cluster import slurm
from launch.cluster.config import ClusterConfig


@dataclass(frozen=True)
class Check:
    name: str
    ok: Literal["ok", "warning", "error"]
    what: str                # was found
    mend: str | None = None


def line(check: Check) -> str:
    """A check for a person."""
    mend = f"\n{'':<21}{check.mend}" if check.mend and check.ok != "ok" else ""
    return f"{check.ok:<9}{check.name:<12}{check.what}{mend}"


def partitions_of(cluster: ClusterConfig) -> list[slurm.Partition]:
    """Those that its jobs may go to. Raises: UserError."""
    wanted = (cluster.partition or "").split(",")
    return [part for part in slurm.partitions() if part.name in wanted or not cluster.partition and part.default]
