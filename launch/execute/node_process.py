"""The process that SLURM starts once on each node of a job. It runs attempts until the run or the job ends.

    python -P -m launch.execute.node_process SUBMISSION

srun starts one task on each node. Ranks are supervised as in a run on one machine. The head, node 0, takes the
attempts, writes the records and decides; the other nodes do as it says. A flag file tells the batch shell whether to
requeue the job. The head sets the flag at its start, so that the job is requeued even if the head itself is killed.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from launch.cluster import slurm
from launch.execute import record
from launch.execute.node.exclusion import exclude
from launch.execute.node.follow import follow
from launch.execute.node.forensics import (
    REASONS,
    count_failures,
    ended_elsewhere,
    record_lost_attempts,
    record_silent_head,
)
from launch.execute.node.lead import RECORD_S, end_chain, failed_start, job_fields, lead, set_flag
from launch.execute.node.patience import OutOfPatience, Patience
from launch.execute.node.place import Place, hosts_of, kill_wait_s
from launch.execute.node.progress import stuck
from launch.plan.job_script import warning_s
from launch.plan.submission import Submission, read_submission
from launch.records.requeue import REQUEUE, flag_file
from launch.supervise.group import NodeGroup
from launch.supervise.rank import Outcome
from launch.supervise.rendezvous import NotConnected, meet
from launch.supervise.signals import StopSignals, stop_signals
from launch.supervise.terminal import make_view
from trainers.config.schema import ScriptConfig
from trainers.config.spec import read_run
from trainers.contract import exit_codes
from trainers.contract.errors import UserError
from trainers.contract.files import read_json, update_json
from trainers.contract.paths import RunPaths

EARLY_S = 30.0  # SLURM sends its signal up to this much early, because it checks time limits only so often
OVER = ("finished", "cancelled")  # a failed run is tried again


def main(argv: list[str]) -> int:
    with stop_signals() as stop:
        return run_node(Path(argv[0]), stop)


def run_node(folder: Path, stop: StopSignals) -> int:
    """Do this node's part of a submission's job. Returns the exit code.

    Args:
        folder: the submission's.
    """
    submission = read_submission(folder)
    view = make_view(json=False, ranks=submission.here)
    place = Place.from_env(os.environ, submission.here)
    paths = RunPaths(Path(submission.runs[place.element or 0]))
    name = f"{place.job}-{place.restart}"
    requeue_flag = flag_file(folder, place.job, place.restart)
    state = read_json(paths.record)["state"]
    if state in OVER:  # all nodes read the same state: the head changes it only after all have met
        view.notice(f"run {paths.id} is {state}: nothing to do")
        # Jobs that wait for this run (`--after`) start only if this job succeeds.
        return exit_codes.FINISHED if state == "finished" else exit_codes.FAILED
    patience = Patience(stop, view.notice)
    try:
        if place.node == 0:
            patience(lambda: record_lost_attempts(paths, place, folder))
            # This flag counts if this process is killed before it can decide.
            set_flag(requeue_flag, count_failures(paths, submission) < submission.max_restarts)
        # Ask SLURM before the node processes connect: connected, a process that waits for SLURM would give no sign of life.
        kill_wait_s()
        if place.node == 0 and not submission.here:
            _make_up_for_warning(place, paths, stop)
        try:
            group = meet(folder, name, place.node, place.nodes, submission.cluster.interface, lambda: bool(stop.received),
                         patience)
        except OutOfPatience:
            raise
        except (NotConnected, OSError) as error:
            view.notice(f"error: {error}")
            if place.node != 0:
                return exit_codes.FAILED
            return _not_connected(submission, place, paths, requeue_flag, stop, patience, str(error))
        patience.beat = group.beat
        try:
            if place.node != 0:
                return follow(submission, place, paths, group, stop, view)
            return lead(submission, place, paths, group, requeue_flag, stop, patience, view)
        except OutOfPatience:
            group.send({"end": exit_codes.PREEMPTED})
            raise
        finally:
            if not group.complete:  # every process that is left does this, because the head may be gone
                _report_lost(folder, place, paths, group)
            group.close()
    except OutOfPatience:
        # The record still says that the attempt runs. The head of the next job corrects it.
        view.notice(f"the records of {paths.id} could not be written before the job must end")
        requeue = signal.SIGUSR2 in stop.received and submission.cluster.requeue and not submission.here
        set_flag(requeue_flag, requeue)
        return REQUEUE if requeue else exit_codes.PREEMPTED
    except Exception:
        if place.node == 0:  # a bug of ours, or the run's folder is gone: after a requeue it would happen again
            set_flag(requeue_flag, False)
        raise


def _not_connected(submission: Submission, place: Place, paths: RunPaths, requeue_flag: Path, stop: StopSignals,
                   patience: Patience, message: str) -> int:
    """Record, on the head, an attempt that could not start, and decide what follows. Returns the exit code."""
    number, job = record.next_attempt(paths), job_fields(submission, place)
    if signal.SIGUSR2 in stop.received:
        outcome = Outcome("preempted", signal="SIGUSR2")
    elif stop.received:  # whoever sent the signal has decided what follows
        set_flag(requeue_flag, False)
        return exit_codes.FAILED
    else:
        outcome = Outcome("failed", failed_start(number, message, retry=True))
    reason = REASONS["SIGUSR2"] if outcome.signal else None
    if stop.received:  # the job ends soon
        patience.hurry(RECORD_S)
    patience(lambda: record.take_attempt(paths, number))
    patience(lambda: record.never_started(paths, number, outcome, reason, **job))
    judged = patience(lambda: stuck(paths, submission, number, isinstance(read_run(paths), ScriptConfig), outcome))
    if judged is not outcome:
        patience(lambda: record.never_started(paths, number, judged, reason, **job))
    failure = judged.failure
    requeue = failure is None or failure.retry and count_failures(paths, submission) <= submission.max_restarts
    set_flag(requeue_flag, requeue)
    if requeue:
        patience(lambda: update_json(paths.record, state="preempted"))  # the run is not over
    elif not submission.cluster.requeue:
        return end_chain(paths, place, exit_codes.FAILED)
    return REQUEUE if requeue and submission.cluster.requeue and not submission.here else exit_codes.FAILED


def _make_up_for_warning(place: Place, paths: RunPaths, stop: StopSignals) -> None:
    """Make sure of the signal before the time limit: SLURM sends it once, maybe while `setup:` still ran.

    If it is overdue, it counts as received. If SLURM may have sent it early, this process sends it to itself when it is due.
    """
    try:
        left_s = slurm.time_left_s(place.job)
        due_s = None if left_s is None else left_s - warning_s(read_run(paths).run.grace_s)
    except UserError:
        return
    if due_s is not None and due_s <= 0:
        stop.received.append(signal.SIGUSR2)
    elif due_s is not None and due_s <= EARLY_S:
        signal.signal(signal.SIGALRM, lambda number, frame: stop.received.append(signal.SIGUSR2))
        signal.setitimer(signal.ITIMER_REAL, due_s)


def _report_lost(folder: Path, place: Place, paths: RunPaths, group: NodeGroup) -> None:
    """Exclude the nodes whose processes are lost, and write the record in place of a head that was silent."""
    hosts = hosts_of(place)
    if place.node != 0 and group.links[0].silent:
        with suppress(OSError):
            record_silent_head(paths, hosts[0], flag_file(folder, place.job, place.restart).exists())
    with suppress(OSError):
        if place.node == 0 and ended_elsewhere(paths, max(paths.attempt_numbers(), default=0)):
            return  # this process was stopped: the others are not lost, they have left
    exclude(folder, place, [hosts[node] for node, link in group.links.items() if not link.open])


def run() -> None:
    """The command. It writes errors to the node's log, and exits with this node's exit code."""
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        code = exit_codes.FAILED
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    run()
