"""Where in which job a node process is, and what its node is like."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from launch.cluster import slurm
from launch.supervise.rendezvous import NodeGroup
from trainers.contract.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where in which job this process is, by SLURM's variables."""

    job: str             # "101", an array's element "101_3", a step of an allocation "101.0"
    restart: int         # how often SLURM has begun this job anew
    node: int
    nodes: int
    element: int | None

    @classmethod
    def from_env(cls, env: Mapping[str, str], here: bool) -> Place:
        element = env.get("SLURM_ARRAY_TASK_ID")
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{element}" if element is not None and not here else env["SLURM_JOB_ID"]
        if here:  # in an allocation that is not ours
            job, element = f"{job}.{env['SLURM_STEP_ID']}", None
        return cls(job, int(env.get("SLURM_RESTART_COUNT", 0)), int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]),
                   int(element) if element is not None else None)


def kill_wait_s() -> float | None:
    """From SLURM's SIGTERM to its SIGKILL; None where it cannot be asked."""
    try:
        return slurm.kill_wait_s()
    except UserError:
        return None


def hosts_of(place: Place) -> list[str]:
    """The names of the job's nodes, in the order of its tasks."""
    listed = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    return slurm.expand(listed) if listed else [socket.gethostname()]


def node_variables(group: NodeGroup) -> dict[str, str]:
    """gloo looks for an address by the host's name, which may have none that others reach: it is told."""
    return {"GLOO_SOCKET_IFNAME": group.interface} if group.interface else {}
