"""The node processes that follow the head's words."""

from __future__ import annotations

import select
from dataclasses import asdict
from typing import Any

from launch.execute.node.place import Place, kill_wait_s, node_variables
from launch.plan.submission import Submission, plan_of
from launch.supervise.rank import Failure, Outcome
from launch.supervise.rendezvous import NodeGroup
from launch.supervise.signals import StopSignals
from launch.supervise.supervisor import supervise
from launch.supervise.terminal import View
from trainers.contract import exit_codes
from trainers.contract.paths import RunPaths


def follow(submission: Submission, place: Place, paths: RunPaths, group: NodeGroup, stop: StopSignals, view: View) -> int:
    while True:
        word = _next_word(group, view)
        if "end" in word:
            group.close()
            group.links.clear()  # the head goes now, and is not missed
            return word["end"]
        if "begin" not in word:
            return exit_codes.FAILED
        plan = plan_of(submission, paths, word["begin"])
        try:
            outcome = supervise(plan, paths, view, node=place.node, address=group.address, port=word["port"], peers=group,
                                stop=stop, more=node_variables(group), kill_wait_s=kill_wait_s())
        except OSError as error:
            outcome = Outcome("failed", Failure(None, None, None, f"ranks cannot be started: {error}", None, None, True))
            group.tell({"failure": outcome.failure.as_dict()})
        group.tell({"ended": asdict(outcome)})


def _next_word(group: NodeGroup, view: View) -> dict[str, Any]:
    """The head's next word on what to do, or that it has gone."""
    while True:
        select.select(group.sockets(), [], [], 1.0)
        words = group.heard()
        for place, word in enumerate(words):
            if "begin" in word or "end" in word:
                group.keep(words[place + 1:])
                return word
        if not group.whole:
            view.notice("the head node's process is gone")
            return {}
