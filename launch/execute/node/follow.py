"""A node process that is not the head: it runs its node's ranks when the head says so."""

from __future__ import annotations

import select
from dataclasses import asdict
from typing import Any

from launch.execute.node.place import Place, silence_s
from launch.execute.node.ranks import run_ranks
from launch.plan.submission import Submission, plan_of
from launch.records.life_sign import LifeSign
from launch.supervise.group import NodeGroup
from launch.supervise.signals import StopSignals
from launch.supervise.terminal import View
from trainers.contract import exit_codes
from trainers.contract.paths import RunPaths


def follow(submission: Submission, place: Place, paths: RunPaths, group: NodeGroup, stop: StopSignals, view: View) -> int:
    """Run this node's ranks of each attempt that the head begins, and report how they ended. Returns the exit code."""
    sign: LifeSign | None = None
    while True:
        order = _next_order(group, view, sign)
        if "end" in order:
            group.close()
            group.links.clear()  # the head leaves now: its end must not look like a failure
            return order["end"]
        if "begin" not in order:
            return exit_codes.FAILED
        plan = plan_of(submission, paths, order["begin"])
        group.silence_s = silence_s(plan)
        sign = LifeSign(paths.life_sign(plan.attempt, place.node))
        group.send({"ended": asdict(run_ranks(plan, place, paths, group, order["port"], stop, view))})


def _next_order(group: NodeGroup, view: View, sign: LifeSign | None) -> dict[str, Any]:
    """Wait for the head's next order: to begin an attempt, or to end. Empty if the head's process is gone.

    Args:
        sign: this node's, of the last attempt: on other nodes, ranks of a script may still work.
    """
    while True:
        if sign:
            sign.turn(None)
        select.select(group.sockets(), [], [], 1.0)
        messages = group.receive()
        for index, message in enumerate(messages):
            if "begin" in message or "end" in message:
                group.put_back(messages[index + 1:])
                return message
        if not group.complete:
            view.notice("the head node's process "
                        + ("gives no sign of life" if any(link.silent for link in group.links.values()) else "is gone"))
            return {}
