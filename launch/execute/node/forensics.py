"""How attempts ended: by what all nodes say, and by what is left of those that said nothing."""

from __future__ import annotations

import select
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.execute.node.exclusion import down_nodes
from launch.execute.node.place import Place
from launch.plan.plan import Plan
from launch.plan.submission import Submission
from launch.supervise.rank import Failure, Outcome
from launch.supervise.rendezvous import NodeGroup
from trainers.config.micro_batch import gave_way
from trainers.contract.files import read_json, replace_json
from trainers.contract.paths import RunPaths

COLLECT_S = 60.0     # beyond the grace: for the other nodes to say how their ranks ended
REASONS = {"SIGUSR2": "time limit", "SIGTERM": "requeued, preempted or cancelled by SLURM"}
CAUSES = ("SIGKILL", "SIGSEGV", "SIGBUS", "SIGILL")  # a rank that lost its peers ends in other ways


def joint_outcome(mine: Outcome, group: NodeGroup, plan: Plan, hosts: list[str]) -> Outcome:
    """One outcome of all nodes'."""
    deadline = time.monotonic() + plan.grace_s + COLLECT_S
    while True:
        outcomes = {0: mine, **{word["node"]: Outcome(**word["ended"]) for word in group.said if "ended" in word}}
        waited_for = [node for node, link in group.links.items() if link.open and node not in outcomes]
        if not waited_for or time.monotonic() > deadline:
            break
        select.select(group.sockets(), [], [], 0.2)
        group.heard()
    failures = [(word["node"], Failure(**word["failure"])) for word in group.said if "failure" in word]
    if mine.failure:
        failures.insert(0, (0, mine.failure))
    silent = [node for node in range(len(hosts)) if node not in outcomes]
    name = next((outcome.signal for outcome in outcomes.values() if outcome.signal), None)
    slowest = mine.checkpoint_s
    if silent:
        for node in silent:  # one that hangs is as good as gone
            group.links[node].leave()
        names = ", ".join(hosts[node] for node in silent)
        what = "is gone" if len(silent) == 1 else "are gone"
        failure = Failure(None, None, None, f"the node process on {names} {what}",
                          "its node failed, or somebody, or the kernel for want of memory, killed it", None, True, names)
        return Outcome("failed", failure, name, slowest)
    if failures:
        # In the order in which they came; but one that was killed is likelier the cause than one that lost a peer.
        node, failure = min(failures, key=lambda found: found[1].signal not in CAUSES and found[1].hint is None)
        if failure.rank is not None:  # the head says which rank hung, and that may be another node's
            node = plan.resources.node_of(failure.rank)
        return Outcome("failed", Failure(**{**failure.as_dict(), "node": hosts[node]}), name, slowest)
    kinds = {outcome.kind for outcome in outcomes.values()}
    return Outcome("finished" if kinds == {"finished"} else "preempted", None, name, slowest)


def count_failures(paths: RunPaths, submission: Submission) -> int:
    """How many attempts of this submission have failed, or were killed. SLURM's own doings do not count, nor do those
    that made way for one with a smaller micro-batch."""
    def failed(attempt: dict[str, Any] | None) -> bool:
        if attempt is None:  # it could not even be recorded
            return True
        counts = attempt["outcome"] == "failed" or attempt["outcome"] == "lost" and attempt["failure"]["retry"]
        return counts and attempt.get("submission") == submission.number

    return sum(failed(_attempt(paths, number)) and not gave_way(paths, number) for number in paths.attempt_numbers())


def _attempt(paths: RunPaths, number: int) -> dict[str, Any] | None:
    try:
        return read_json(paths.attempt_record(number))
    except (OSError, ValueError):
        return None


def close_lost(paths: RunPaths, place: Place, folder: Path) -> None:
    """Say of attempts that never said how they ended what can be known of it."""
    again = (folder / f"again-{place.job}-{place.restart - 1}").exists()  # the batch shell was there to the end
    for number in paths.attempt_numbers():
        attempt = _attempt(paths, number)
        if attempt is None or attempt["outcome"] != "running" and not _died_with_node(attempt):
            continue
        nodes = attempt.get("nodes", [])
        down = down_nodes(nodes)
        if down:
            said = ", ".join(f"node {node} went down ({why})" for node, why in down.items())
        elif again:
            said = f"the node process on {nodes[0] if nodes else attempt['host']} was killed"
        else:
            said = "SLURM ended the job before its ranks had stopped (a node failed, or the grace was too short)"
        failure = Failure(None, None, None, said, None, None, again and not down, next(iter(down), None))
        replace_json(paths.attempt_record(number), {**attempt, "outcome": "lost", "failure": failure.as_dict()})


def _died_with_node(attempt: Mapping[str, Any]) -> bool:
    """Whether an attempt that lost a node's process did so because the node went down, as is known only later."""
    failure = attempt.get("failure") or {}
    return attempt["outcome"] == "failed" and failure.get("rank") is None and bool(failure.get("node")) and bool(
        down_nodes(failure["node"].split(", ")))


def reason_of(outcome: Outcome, down: Mapping[str, str]) -> str | None:
    """Why it was stopped, as far as the signal tells."""
    if down:
        return ", ".join(f"node {node} went down ({why})" for node, why in down.items())
    return REASONS.get(outcome.signal)
