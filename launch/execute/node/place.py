"""The place of a node process in its SLURM job, and what its supervisor must know about the job's nodes."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from launch.cluster import slurm
from launch.plan.plan import Plan
from launch.supervise.group import SILENCE_S, NodeGroup
from trainers.contract.errors import UserError

LEAST_SILENCE_S = 30.0  # a node process may have to wait for SLURM, or for a slow disk


@dataclass(frozen=True)
class Place:
    """The job, and the node of the job, that a node process runs on."""

    job: str             # "101"; an element of an array is "101_3", a step of the user's own allocation "101.0"
    restart: int         # how often SLURM has restarted this job
    node: int            # from 0, the head
    nodes: int
    element: int | None  # of an array

    @classmethod
    def from_env(cls, env: Mapping[str, str], here: bool) -> Place:
        """The place that SLURM's variables describe. `here`: in an allocation that the user made."""
        element = env.get("SLURM_ARRAY_TASK_ID")
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{element}" if element is not None and not here else env["SLURM_JOB_ID"]
        if here:
            job, element = f"{job}.{env['SLURM_STEP_ID']}", None
        return cls(job, int(env.get("SLURM_RESTART_COUNT", 0)), int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]),
                   int(element) if element is not None else None)


def hosts_of(place: Place) -> list[str]:
    """The names of the job's nodes, in the order of its tasks."""
    node_list = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    return slurm.expand(node_list) if node_list else [socket.gethostname()]


def node_variables(group: NodeGroup) -> dict[str, str]:
    """Environment variables for the ranks of this node.

    By default gloo uses the address of the host's name, which other nodes may be unable to reach.
    """
    return {"GLOO_SOCKET_IFNAME": group.interface} if group.interface else {}


def silence_s(plan: Plan) -> float:
    """For how many seconds a node process may send nothing in this attempt, before it counts as lost."""
    return SILENCE_S if plan.hang_s is None else max(LEAST_SILENCE_S, plan.hang_s)


@cache
def kill_wait_s() -> float | None:
    """Seconds from SLURM's SIGTERM to its SIGKILL; None where SLURM cannot be asked."""
    try:
        return slurm.kill_wait_s()
    except UserError:
        return None
