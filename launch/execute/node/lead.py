"""The head, node 0 of a job: it takes the attempts, writes the records and decides what follows each attempt."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

from launch.cluster import slurm
from launch.execute import record
from launch.execute.node.exclusion import down_nodes, exclude
from launch.execute.node.forensics import SILENT, count_failures, ended_elsewhere, joint_outcome, stop_reason
from launch.execute.node.patience import OutOfPatience, Patience
from launch.execute.node.place import Place, hosts_of, silence_s
from launch.execute.node.progress import stuck
from launch.execute.node.ranks import run_ranks
from launch.plan.job_script import UNHEARD
from launch.plan.submission import Submission, plan_of
from launch.records.life_sign import LifeSign
from launch.records.requeue import REQUEUE
from launch.supervise.group import NodeGroup
from launch.supervise.port import reserved_port
from launch.supervise.rank import Failure, Outcome
from launch.supervise.signals import StopSignals
from launch.supervise.supervisor import is_there
from launch.supervise.terminal import View
from trainers.config.retries import changes_settings
from trainers.contract import exit_codes
from trainers.contract.errors import UserError
from trainers.contract.files import read_json, update_json
from trainers.contract.paths import RunPaths

RECORD_S = 20.0  # for writing records after the job was asked to end


def lead(submission: Submission, place: Place, paths: RunPaths, group: NodeGroup, requeue_flag: Path, stop: StopSignals,
         patience: Patience, view: View) -> int:
    """Run attempts on all nodes of the job until the run ends or the job must be requeued. Returns the exit code.

    Args:
        requeue_flag: a file; while it exists, the batch shell requeues the job at its end.
        patience: writes the records.

    Raises:
        OutOfPatience: the job must end before a record could be written.
    """
    hosts = hosts_of(place)
    if submission.here:
        update_json(paths.record, job={**read_json(paths.record)["job"], "ids": [place.job]})
    job = job_fields(submission, place)
    while True:
        number = patience(lambda: _take_next(paths))
        ended: record.RecordEnd | None = None  # writes over what `recorded` has written at the attempt's begin
        try:
            plan = plan_of(submission, paths, number)
            group.silence_s = silence_s(plan)
            patience.sign = LifeSign(paths.life_sign(number, place.node))
            recorded = record.recorded(plan, paths, view, write=patience, delay=patience.take_story, **job)
            with recorded as ended, reserved_port() as port:
                group.received.clear()
                group.send({"begin": number, "port": port})
                view.notice(f"attempt {number} of {paths.id} on {', '.join(hosts)}: {plan.resources.ranks} rank(s)")
                mine = run_ranks(plan, place, paths, group, port, stop, view)
                joint = joint_outcome(mine, group, plan, hosts)
                if joint.signal or stop.received:  # the job ends soon
                    patience.hurry(RECORD_S)
                outcome = patience(lambda: stuck(paths, submission, number, plan.batch is None, joint))
                code = record.exit_code(plan, outcome)
                failure = outcome.failure
                down = down_nodes(hosts) if outcome.signal == "SIGTERM" else {}
                # If the next attempt uses other settings (a smaller micro-batch), this does not count as a failure.
                changes = failure is not None and changes_settings(paths, number)
                failures = patience(lambda: count_failures(paths, submission)) + (failure is not None and not changes)
                retryable = failure is not None and (changes or failure.retry and failures <= submission.max_restarts)
                signals = {outcome.signal, *(signal.Signals(number).name for number in stop.received)} - {None}
                retry_here = retryable and not signals and group.complete
                # The run is not over if its job will start again, or if the next job of its chain will continue the run. After
                # SIGTERM, SLURM decides whether the job starts again, and SLURM's decision is not known here: if a retry may
                # succeed and the cluster allows requeueing, assume that the job will start again.
                again = retryable and (signals <= {"SIGUSR2"} or "SIGTERM" in signals and submission.cluster.requeue)
                if patience(lambda: _superseded(paths, number)):
                    return _give_way(paths, number, group, requeue_flag, view)
                if signals:
                    patience.hurry(RECORD_S)
                job_log = requeue_flag.parent / f"{place.job}_0_log.out"
                state = ended(outcome, stop_reason(outcome, down, paths.stop_reason(number), job_log, number), retry_here, again)
        except OutOfPatience:
            raise
        except (OSError, UserError) as error:
            if patience(lambda: _superseded(paths, number)):
                return _give_way(paths, number, group, requeue_flag, view)
            message, hint = (error.message, error.hint) if isinstance(error, UserError) else (str(error), None)
            failure = failed_start(number, message, hint)
            outcome, state, down, code = Outcome("failed", failure), "failed", {}, exit_codes.FAILED
            if ended:
                ended(outcome)
            else:
                patience(lambda: record.never_started(paths, number, outcome, **job))
            failures, retryable, retry_here, signals = count_failures(paths, submission), False, False, set()
        if failure:
            view.event({"event": "failure", **failure.as_dict()})
            view.notice(f"attempt {number} failed: {failure.message}")
        if retry_here:
            set_flag(requeue_flag, failures < submission.max_restarts)
            continue
        if failure:
            # A retry needs a requeue if a node's process is gone or the time limit is near.
            requeue = retryable and signals <= {"SIGUSR2"} and state != "cancelled"
        else:
            # At the time limit the requeue is our task. Whoever sent SIGTERM has already decided what follows.
            requeue = state == "preempted" and outcome.signal == "SIGUSR2"
        set_flag(requeue_flag, requeue)
        if down and state == "preempted":
            exclude(Path(requeue_flag.parent), place, list(down), requeued=True)
        view.notice(f"run {paths.id}: {state}" + ("; the job will be requeued" if requeue and submission.cluster.requeue else ""))
        if not requeue and not submission.cluster.requeue and state != "preempted":
            code = end_chain(paths, place, code)
        if requeue and submission.cluster.requeue and not submission.here:
            code = REQUEUE
        elif code in (REQUEUE, UNHEARD):  # a script's own exit code: the batch shell must not take it for ours
            code = exit_codes.FAILED
        group.send({"end": code})
        return code


def _take_next(paths: RunPaths) -> int:
    """Take the run's next attempt. Returns its number."""
    number = record.next_attempt(paths)
    record.take_attempt(paths, number)
    return number


def _superseded(paths: RunPaths, number: int) -> bool:
    """Whether the run has a newer attempt than this one, or another node has recorded that this one has ended."""
    return record.next_attempt(paths) != number + 1 or ended_elsewhere(paths, number)


def _give_way(paths: RunPaths, number: int, group: NodeGroup, requeue_flag: Path, view: View) -> int:
    """End a process that decides nothing more: SLURM has restarted its job elsewhere, or it was stopped for too long."""
    if ended_elsewhere(paths, number):  # the flag stays as it is: the record that the other node wrote agrees with it
        view.notice(f"another node has recorded that attempt {number} of {paths.id} has ended: this process {SILENT}")
    else:
        view.notice(f"attempt {number} of {paths.id} has been taken over by a newer one" if is_there(paths.root) else
                    f"the folder of run {paths.id} was deleted or moved while the run used it: {paths.root}")
        set_flag(requeue_flag, False)
    group.send({"end": exit_codes.FAILED})
    return exit_codes.FAILED


def end_chain(paths: RunPaths, place: Place, code: int) -> int:
    """Cancel the later jobs of a chain, and return the exit code of this job.

    The next job of a chain starts after a job that failed. If the next job cannot be cancelled (a container may have no
    scancel), this job must therefore succeed. Otherwise it exits with `code`: other jobs may wait for the run's result.
    """
    jobs = read_json(paths.record)["job"]["ids"]
    try:
        slurm.cancel(jobs[jobs.index(place.job) + 1:])
    except (UserError, ValueError):
        return 0
    return code


def job_fields(submission: Submission, place: Place) -> dict[str, Any]:
    """The keys of an attempt's record that describe its job."""
    return {"job": place.job, "restart": place.restart, "nodes": hosts_of(place), "submission": submission.number}


def failed_start(number: int, message: str, hint: str | None = None, retry: bool = False) -> Failure:
    """The failure of an attempt whose ranks could not be started."""
    return Failure(None, None, None, f"attempt {number} could not start: {message}", hint, None, retry)


def set_flag(file: Path, present: bool) -> None:
    """Make the file, or delete it. On a full disk the exit code of the head must do."""
    try:
        file.touch() if present else file.unlink(missing_ok=True)
    except OSError as error:
        print(f"warning: {file} cannot be changed: {error.strerror}", file=sys.stderr)
