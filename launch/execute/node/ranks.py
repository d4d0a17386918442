"""The ranks of one node in one attempt."""

from __future__ import annotations

from launch.execute.node.place import Place, kill_wait_s, node_variables
from launch.plan.plan import Plan
from launch.supervise.group import NodeGroup
from launch.supervise.rank import Failure, Outcome
from launch.supervise.signals import StopSignals
from launch.supervise.supervisor import supervise
from launch.supervise.terminal import View
from trainers.contract.paths import RunPaths


def run_ranks(plan: Plan, place: Place, paths: RunPaths, group: NodeGroup, port: int, stop: StopSignals, view: View) -> Outcome:
    """Run this node's ranks of one attempt, and return how they ended. Ranks that cannot be started are a failure like others.

    The cause may pass: the host may have too many processes or open files for a moment.
    """
    try:
        return supervise(plan, paths, view, node=place.node, address=group.address, port=port, peers=group, stop=stop,
                         more=node_variables(group), kill_wait_s=kill_wait_s())
    except OSError as error:
        failure = Failure(None, None, None, f"ranks cannot be started: {error}", None, None, True)
        group.send({"failure": failure.as_dict()})
        return Outcome("failed", failure)
