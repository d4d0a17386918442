"""How an attempt ended, judged from the nodes' reports and from what is known about processes that never reported."""

from __future__ import annotations

import select
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.cluster import reasons
from launch.execute.node.exclusion import down_nodes
from launch.execute.node.place import Place
from launch.plan.plan import Plan
from launch.plan.submission import Submission
from launch.records.life_sign import LifeSign
from launch.records.requeue import REQUEUE, code_of_head
from launch.supervise.group import NodeGroup
from launch.supervise.rank import Failure, Outcome
from trainers.config.retries import changes_settings
from trainers.contract.clock import utc_now
from trainers.contract.files import read_json, replace_json, update_json
from trainers.contract.paths import RunPaths

COLLECT_S = 60.0     # the time, after the grace, in which the other nodes must report how their ranks ended
SILENT = "gave no sign of life"
REASONS = {"SIGUSR2": "time limit", "SIGTERM": "SIGTERM; SLURM has not said why"}
LOG_END_BYTES = 64 * 1024  # read from the end of the job's log
CAUSES = ("SIGKILL", "SIGSEGV", "SIGBUS", "SIGILL")  # a rank that has only lost its peers is not ended by these signals


def joint_outcome(mine: Outcome, group: NodeGroup, plan: Plan, hosts: list[str]) -> Outcome:
    """Wait for the other nodes' outcomes, and join them with the head's own (`mine`) into the attempt's outcome.

    The ranks of a script may work much longer on one node than on another: as long as nothing has failed and nobody has asked
    for a stop, the head waits for every node process that gives signs of life.
    """
    deadline, sign = None, LifeSign(RunPaths(Path(plan.folder)).life_sign(plan.attempt, 0))
    while True:
        sign.turn(None)
        outcomes = {0: mine, **{word["node"]: Outcome(**word["ended"]) for word in group.received if "ended" in word}}
        waited_for = [node for node, link in group.links.items() if link.open and node not in outcomes]
        ending = plan.batch is not None or any(outcome.kind != "finished" for outcome in outcomes.values()) or any(
            word.keys() & {"failure", "lost", "signal"} for word in group.received)
        if deadline is None and ending:
            deadline = time.monotonic() + plan.grace_s + COLLECT_S
        if not waited_for or deadline is not None and time.monotonic() > deadline:
            break
        select.select(group.sockets(), [], [], 0.2)
        group.receive()
    failures = [(word["node"], Failure(**word["failure"])) for word in group.received if "failure" in word]
    if mine.failure:
        failures.insert(0, (0, mine.failure))
    silent = [node for node in range(len(hosts)) if node not in outcomes]
    signal_name = next((outcome.signal for outcome in outcomes.values() if outcome.signal), None)
    slowest = max((outcome.checkpoint_s for outcome in outcomes.values() if outcome.checkpoint_s is not None), default=None)
    if silent:
        for node in silent:  # a process that hangs counts as gone
            group.links[node].close()
        names = ", ".join(hosts[node] for node in silent)
        if all(group.links[node].silent for node in silent):
            failure = Failure(None, None, None, f"the node process on {names} {SILENT}", None, None, True, names)
        else:
            failure = Failure(None, None, None, f"the node process on {names} {'is' if len(silent) == 1 else 'are'} gone",
                              "its node failed, or the process was killed by a user, or by the kernel when memory ran out",
                              None, True, names)
        return Outcome("failed", failure, signal_name, slowest)
    if failures:
        # The first failure counts. But a rank that was killed is likelier to be the cause than a rank that lost a peer.
        node, failure = min(failures, key=lambda report: report[1].signal not in CAUSES and report[1].hint is None)
        if failure.rank is not None:  # the head reports ranks that hang, which may be on another node
            node = plan.resources.node_of(failure.rank)
        return Outcome("failed", Failure(**{**failure.as_dict(), "node": hosts[node]}), signal_name, slowest)
    kinds = {outcome.kind for outcome in outcomes.values()}
    note = next((outcome.note for outcome in outcomes.values() if outcome.note), None)
    return Outcome("finished" if kinds == {"finished"} else "preempted", None, signal_name, slowest, note)


def stop_reason(outcome: Outcome, down: Mapping[str, str], asked: Path, job_log: Path, attempt: int) -> str | None:
    """Why the attempt was stopped.

    Args:
        down: the nodes that are down, and why.
        asked: a file in which whoever asked for the stop may have given the reason.
        job_log: SLURM writes into it why it stops the job.
    """
    if down:
        return ", ".join(f"node {node} went down ({why})" for node, why in down.items())
    if outcome.signal is None:
        return None
    if outcome.signal == "SIGTERM":
        said = _read(asked) or reasons.of_stop(_read(job_log).rpartition(f"attempt {attempt} of ")[2])
        if said:
            return said
    return REASONS.get(outcome.signal, outcome.signal)


def _read(file: Path) -> str:
    """The end of a text file; "" if it cannot be read."""
    try:
        with open(file, "rb") as opened:
            opened.seek(max(0, opened.seek(0, 2) - LOG_END_BYTES))
            return opened.read().decode("utf-8", "replace")
    except OSError:
        return ""


def count_failures(paths: RunPaths, submission: Submission) -> int:
    """How many attempts of this submission have failed or were killed.

    Two kinds of attempts do not count: those that SLURM stopped, and those after which the next attempt uses other settings.
    """
    def failed(attempt: dict[str, Any] | None) -> bool:
        if attempt is None:  # not even its record could be written
            return True
        retry = (attempt["failure"] or {}).get("retry", False)  # the lost attempt of a copied run has no failure
        counts = attempt["outcome"] == "failed" or attempt["outcome"] == "lost" and retry
        return counts and attempt.get("submission") == submission.number

    return sum(failed(attempt_of(paths, number)) and not changes_settings(paths, number) for number in paths.attempt_numbers())


def record_lost_attempts(paths: RunPaths, place: Place, folder: Path) -> None:
    """Record what is known about attempts whose end nobody has recorded."""
    # The batch shell makes this file when it requeues the job, so it was still running when the node process ended.
    code = code_of_head(folder, place.job, place.restart - 1)
    shell_survived, unrecorded = code is not None, code == str(REQUEUE)
    for number in paths.attempt_numbers():
        attempt = attempt_of(paths, number)
        if attempt is None or attempt["outcome"] != "running" and not _died_with_node(attempt):
            continue
        nodes = attempt.get("nodes", [])
        down = down_nodes(nodes)
        if down:
            message = ", ".join(f"node {node} went down ({why})" for node, why in down.items())
        elif unrecorded:
            message = "it stopped at the time limit, but its record could not be written"
        elif shell_survived:
            message = f"the node process on {nodes[0] if nodes else attempt['host']} was killed"
        else:
            message = ("how it ended could not be recorded: SLURM ended the job first (a node failed, or the grace was too "
                       "short), or the run's folder could not be written")
        retry = shell_survived and not down and not unrecorded
        failure = Failure(None, None, None, message, None, None, retry, next(iter(down), None))
        replace_json(paths.attempt_record(number), {**attempt, "outcome": "lost", "failure": failure.as_dict()})


def record_silent_head(paths: RunPaths, host: str, requeued: bool) -> None:
    """Record, on another node, that the head's process gave no sign of life, so that the attempt has ended.

    srun then kills that process. If the process wakes up before that, it finds this record and decides nothing more.

    Args:
        host: the head's.
        requeued: whether the batch shell will requeue the job.

    Raises:
        OSError: the record cannot be written.
    """
    number = max(paths.attempt_numbers(), default=0)
    attempt = attempt_of(paths, number)
    if attempt and attempt["outcome"] == "running":
        failure = Failure(None, None, None, f"the node process on {host} {SILENT}", None, None, True, host)
        replace_json(paths.attempt_record(number), {**attempt, "ended": utc_now(), "outcome": "lost",
                                                    "failure": failure.as_dict()})
        update_json(paths.record, state="preempted" if requeued else "failed", updated=utc_now())


def ended_elsewhere(paths: RunPaths, number: int) -> bool:
    """Whether another node has recorded the end of this attempt, as `record_silent_head` does: the head writes no "lost"."""
    return (attempt_of(paths, number) or {}).get("outcome") == "lost"


def _died_with_node(attempt: Mapping[str, Any]) -> bool:
    """Whether an attempt failed because a node went down.

    At the time, only the loss of the node's process was known. SLURM marks the node as down later.
    """
    failure = attempt.get("failure") or {}
    return attempt["outcome"] == "failed" and failure.get("rank") is None and bool(failure.get("node")) and bool(
        down_nodes(failure["node"].split(", ")))


def attempt_of(paths: RunPaths, number: int) -> dict[str, Any] | None:
    """The record of an attempt; None if it cannot be read."""
    try:
        return read_json(paths.attempt_record(number))
    except (OSError, ValueError):
        return None
