"""A node's process of a SLURM job: the same supervisor as locally, an attempt after another, until the run ends
or SLURM wants the nodes back.

    python -P -m launch.job SUBMISSION

SLURM starts it once on each node of the job (srun, one task a node). The head, node 0, takes the attempts, writes
the records and decides; the others follow its words. Whether the job is requeued, the batch shell reads off a file
that the head keeps right from the beginning: so it is requeued too if the head itself is killed.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch import record, slurm
from launch.gang import Absent, Gang, meet
from launch.node import Failure, Outcome, StopSignals, stop_signals, supervise
from launch.plan import Plan
from launch.ports import reserved_port
from launch.submission import Submission, plan_of, read_submission
from launch.view import View, make_view
from trainers.errors import UserError
from trainers.files import read_json, replace_json, update_json
from trainers.micro_batch import gave_way
from trainers.paths import RunPaths

FINAL = ("finished", "cancelled")
DOWN = ("DOWN", "FAIL", "NO_RESPOND", "UNKNOWN", "NOT_RESPONDING")
COLLECT_S = 60.0     # beyond the grace: for the other nodes to say how their ranks ended
REASONS = {"SIGUSR2": "time limit", "SIGTERM": "requeued, preempted or cancelled by SLURM"}
CAUSES = ("SIGKILL", "SIGSEGV", "SIGBUS", "SIGILL")  # a rank that lost its peers ends in other ways


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


def main(argv: list[str]) -> int:
    with stop_signals() as stop:
        return attend(Path(argv[0]), stop)


def attend(folder: Path, stop: StopSignals) -> int:
    """This node's part in the job of a submission. Returns the exit code."""
    submission = read_submission(folder)
    view = make_view(json=False, ranks=submission.here)
    place = Place.from_env(os.environ, submission.here)
    paths = RunPaths(Path(submission.runs[place.element or 0]))
    name = f"{place.job}-{place.restart}"
    requeue = folder / f"requeue-{name}"
    state = read_json(paths.record)["state"]
    if state in FINAL:  # asked by all nodes alike: the head changes it only once all have met
        view.notice(f"run {paths.id} is {state}: nothing to do")
        return 0
    if place.node == 0:
        _close_lost(paths, place, folder)
        _set(requeue, _failures(paths, submission) < submission.max_restarts)  # if this process should be killed
    try:
        gang = meet(folder, name, place.node, place.nodes, submission.cluster.interface, lambda: bool(stop.received))
    except (Absent, OSError) as error:
        view.notice(f"error: {error}")
        if place.node == 0:
            _set(requeue, False)  # until it is decided: should even the record fail, on a full disk, that would repeat
        if place.node == 0 and not stop.received:
            number = record.next_attempt(paths)
            record.take_attempt(paths, number)
            _never_began(paths, number, str(error), retry=True, **_about(submission, place))
        if place.node == 0:
            anew = signal.SIGUSR2 in stop.received or (
                not stop.received and _failures(paths, submission) <= submission.max_restarts)
            _set(requeue, anew)
            if anew:
                update_json(paths.record, state="preempted")  # it is not over
            elif not submission.cluster.requeue and not stop.received:
                return _end_chain(paths, place, record.EXIT_CODES["failed"])
        return record.EXIT_CODES["failed"]
    try:
        if place.node == 0:
            return _lead(submission, place, paths, gang, requeue, stop, view)
        return _follow(submission, place, paths, gang, stop, view)
    except Exception:
        if place.node == 0:  # a full disk, or a fault of ours: it would repeat
            _set(requeue, False)
        raise
    finally:
        if not gang.whole:  # whoever is left says it: it may be the head that has gone
            hosts = _hosts(place)
            _exclude(folder, place, [hosts[node] for node, link in gang.links.items() if not link.open])
        gang.close()


# The head


def _lead(submission: Submission, place: Place, paths: RunPaths, gang: Gang, requeue: Path, stop: StopSignals,
          view: View) -> int:
    hosts = _hosts(place)
    if submission.here:
        update_json(paths.record, job={**read_json(paths.record)["job"], "ids": [place.job]})
    about = _about(submission, place)
    while True:
        number = record.next_attempt(paths)
        record.take_attempt(paths, number)
        try:
            plan = plan_of(submission, paths, number)
            with record.recorded(plan, paths, view, **about) as ended, reserved_port() as port:
                gang.said.clear()
                gang.tell({"begin": number, "port": port})
                view.notice(f"attempt {number} of {paths.id} on {', '.join(hosts)}: {plan.resources.ranks} rank(s)")
                mine = supervise(plan, paths, view, address=gang.address, port=port, peers=gang, stop=stop,
                                 more=_own(gang), kill_wait_s=_kill_wait_s())
                outcome = _together(mine, gang, plan, hosts)
                down = _down(hosts) if outcome.signal == "SIGTERM" else {}
                smaller = outcome.kind == "failed" and gave_way(paths, number)  # with less memory next time: no failure
                failures = _failures(paths, submission) + (outcome.kind == "failed" and not smaller)
                worth = outcome.kind == "failed" and (smaller or outcome.failure.retry and failures <= submission.max_restarts)
                signals = {outcome.signal, *(signal.Signals(number).name for number in stop.received)} - {None}
                again = worth and not signals and gang.whole
                if _superseded(paths, number):
                    return _give_way(paths, number, gang, requeue, view)
                state = ended(outcome, _reason(outcome, down), again)
        except (OSError, UserError) as error:
            if _superseded(paths, number):
                return _give_way(paths, number, gang, requeue, view)
            message, hint = (error.message, error.hint) if isinstance(error, UserError) else (str(error), None)
            failure = _never_began(paths, number, message, hint, **about)
            outcome, state, down = Outcome("failed", failure), "failed", {}
            failures, worth, again, signals = _failures(paths, submission), False, False, set()
        failure = outcome.failure
        if failure:
            view.event({"event": "failure", **failure.as_dict()})
            view.notice(f"attempt {number} failed: {failure.message}")
        if again:
            _set(requeue, failures < submission.max_restarts)
            continue
        if failure:  # with a node's process gone, or a time limit, the job begins anew; else the run has failed
            anew = worth and signals <= {"SIGUSR2"} and state != "cancelled"
        else:        # a time limit is ours to follow by a requeue; TERM comes from who has decided that already
            anew = state == "preempted" and outcome.signal == "SIGUSR2"
        _set(requeue, anew)
        # It is not over; also not if SLURM's TERM came first, which is followed by what SLURM does.
        if failure and state != "cancelled" and (anew or worth and "SIGTERM" in signals and submission.cluster.requeue):
            update_json(paths.record, state="preempted")
        if down and state == "preempted":
            _exclude(Path(requeue.parent), place, list(down), requeued=True)
        view.notice(f"run {paths.id}: {state}" + ("; the job is requeued" if anew and submission.cluster.requeue else ""))
        code = record.EXIT_CODES[outcome.kind]
        if not anew and not submission.cluster.requeue and state != "preempted":
            code = _end_chain(paths, place, code)
        gang.tell({"end": code})
        return code


def _superseded(paths: RunPaths, number: int) -> bool:
    return record.next_attempt(paths) != number + 1


def _give_way(paths: RunPaths, number: int, gang: Gang, requeue: Path, view: View) -> int:
    """The end of a process that has outlived its job, which SLURM has begun anew elsewhere: it decides nothing more."""
    view.notice(f"attempt {number} of {paths.id} has been taken over by a newer one")
    _set(requeue, False)
    gang.tell({"end": record.EXIT_CODES["failed"]})
    return record.EXIT_CODES["failed"]


def _end_chain(paths: RunPaths, place: Place, code: int) -> int:
    """The exit code of a chain's last job to begin. The next begins after one that ended badly: where it cannot be
    cancelled (in a container there may be no scancel), this one must end well. Else it may say how it ended to jobs that
    wait for this run."""
    jobs = read_json(paths.record)["job"]["ids"]
    try:
        slurm.cancel(jobs[jobs.index(place.job) + 1:])
    except (UserError, ValueError):
        return 0
    return code


def _about(submission: Submission, place: Place) -> dict[str, Any]:
    """What the record of an attempt says of its job."""
    return {"job": place.job, "restart": place.restart, "nodes": _hosts(place), "submission": submission.number}


def _never_began(paths: RunPaths, number: int, message: str, hint: str | None = None, retry: bool = False, **about: Any
                 ) -> Failure:
    failure = Failure(None, None, None, f"attempt {number} could not begin: {message}", hint, None, retry)
    record.never_began(paths, number, failure, **about)
    return failure


def _set(file: Path, there: bool) -> None:
    file.touch() if there else file.unlink(missing_ok=True)


def _together(mine: Outcome, gang: Gang, plan: Plan, hosts: list[str]) -> Outcome:
    """One outcome of all nodes'."""
    deadline = time.monotonic() + plan.grace_s + COLLECT_S
    while True:
        outcomes = {0: mine, **{word["node"]: Outcome(**word["ended"]) for word in gang.said if "ended" in word}}
        waited_for = [node for node, link in gang.links.items() if link.open and node not in outcomes]
        if not waited_for or time.monotonic() > deadline:
            break
        select.select(gang.sockets(), [], [], 0.2)
        gang.heard()
    failures = [(word["node"], Failure(**word["failure"])) for word in gang.said if "failure" in word]
    if mine.failure:
        failures.insert(0, (0, mine.failure))
    silent = [node for node in range(len(hosts)) if node not in outcomes]
    name = next((outcome.signal for outcome in outcomes.values() if outcome.signal), None)
    slowest = mine.checkpoint_s
    if silent:
        for node in silent:  # one that hangs is as good as gone
            gang.links[node].leave()
        names = ", ".join(hosts[node] for node in silent)
        what = "is gone" if len(silent) == 1 else "are gone"
        failure = Failure(None, None, None, f"the node process on {names} {what}",
                          "its node failed, or somebody, or the kernel for want of memory, killed it", None, True, names)
        return Outcome("failed", failure, name, slowest)
    if failures:
        # In the order in which they came; but one that was killed is likelier the cause than one that lost a peer.
        node, failure = min(failures, key=lambda found: found[1].signal not in CAUSES and found[1].hint is None)
        if failure.rank is not None:  # the head says which rank hung, and that may be another node's
            node = failure.rank // plan.resources.ranks_per_node
        return Outcome("failed", Failure(**{**failure.as_dict(), "node": hosts[node]}), name, slowest)
    kinds = {outcome.kind for outcome in outcomes.values()}
    return Outcome("finished" if kinds == {"finished"} else "preempted", None, name, slowest)


def _failures(paths: RunPaths, submission: Submission) -> int:
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


def _close_lost(paths: RunPaths, place: Place, folder: Path) -> None:
    """Say of attempts that never said how they ended what can be known of it."""
    again = (folder / f"again-{place.job}-{place.restart - 1}").exists()  # the batch shell was there to the end
    for number in paths.attempt_numbers():
        attempt = _attempt(paths, number)
        if attempt is None or attempt["outcome"] != "running" and not _died_with_node(attempt):
            continue
        nodes = attempt.get("nodes", [])
        down = _down(nodes)
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
        _down(failure["node"].split(", ")))


def _down(nodes: list[str]) -> dict[str, str]:
    """Which of these nodes SLURM holds to be down, and why; none where it cannot be asked."""
    try:
        states = slurm.node_states(nodes)
    except UserError:  # in a container there may be no sinfo
        return {}
    return {node: f"{state}{f', {reason}' if reason else ''}" for node, (state, reason) in states.items()
            if state.upper().startswith(DOWN)}


def _reason(outcome: Outcome, down: Mapping[str, str]) -> str | None:
    """Why it was stopped, as far as the signal tells."""
    if down:
        return ", ".join(f"node {node} went down ({why})" for node, why in down.items())
    return REASONS.get(outcome.signal)


def _exclude(folder: Path, place: Place, nodes: list[str], requeued: bool = False) -> None:
    """Let the job begin anew without these nodes, unless too few would be left. Before it is requeued (by the batch
    shell, which reads the file) SLURM would not hear of it; after a requeue of SLURM's own it must be told at once."""
    file = folder / f"exclude-{place.job}"
    try:
        excluded = {*nodes, *(file.read_text().split(",") if file.exists() else [])}
        # Refused if what is left could never run this job.
        slurm.call("sbatch", "--test-only", f"--exclude={','.join(sorted(excluded))}", str(folder / "job.sh"))
        file.write_text(",".join(sorted(excluded)))
        if requeued:
            slurm.exclude(place.job, sorted(excluded))
    except (OSError, UserError) as error:
        print(f"warning: {', '.join(nodes)} could not be excluded: {error}", file=sys.stderr)


def _kill_wait_s() -> float | None:
    """From SLURM's SIGTERM to its SIGKILL; None where it cannot be asked."""
    try:
        return slurm.kill_wait_s()
    except UserError:
        return None


def _hosts(place: Place) -> list[str]:
    """The names of the job's nodes, in the order of its tasks."""
    listed = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    return slurm.expand(listed) if listed else [socket.gethostname()]


def _own(gang: Gang) -> dict[str, str]:
    """gloo looks for an address by the host's name, which may have none that others reach: it is told."""
    return {"GLOO_SOCKET_IFNAME": gang.interface} if gang.interface else {}


# The other nodes


def _follow(submission: Submission, place: Place, paths: RunPaths, gang: Gang, stop: StopSignals, view: View) -> int:
    while True:
        word = _next_word(gang, view)
        if "end" in word:
            gang.close()
            gang.links.clear()  # the head goes now, and is not missed
            return word["end"]
        if "begin" not in word:
            return record.EXIT_CODES["failed"]
        plan = plan_of(submission, paths, word["begin"])
        try:
            outcome = supervise(plan, paths, view, node=place.node, address=gang.address, port=word["port"], peers=gang,
                                stop=stop, more=_own(gang), kill_wait_s=_kill_wait_s())
        except OSError as error:
            outcome = Outcome("failed", Failure(None, None, None, f"ranks cannot be started: {error}", None, None, True))
            gang.tell({"failure": outcome.failure.as_dict()})
        gang.tell({"ended": asdict(outcome)})


def _next_word(gang: Gang, view: View) -> dict[str, Any]:
    """The head's next word on what to do, or that it has gone."""
    while True:
        select.select(gang.sockets(), [], [], 1.0)
        words = gang.heard()
        for place, word in enumerate(words):
            if "begin" in word or "end" in word:
                gang.keep(words[place + 1:])
                return word
        if not gang.whole:
            view.notice("the head node's process is gone")
            return {}


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.exit(code)
