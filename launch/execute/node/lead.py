"""The head, node 0 of a job: it takes the attempts, writes the records and decides."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from launch.cluster import slurm
from launch.execute import record
from launch.execute.node.exclusion import down_nodes, exclude
from launch.execute.node.forensics import count_failures, joint_outcome, reason_of
from launch.execute.node.place import Place, hosts_of, kill_wait_s, node_variables
from launch.plan.submission import Submission, plan_of
from launch.supervise.port import reserved_port
from launch.supervise.rank import Failure, Outcome
from launch.supervise.rendezvous import NodeGroup
from launch.supervise.signals import StopSignals
from launch.supervise.supervisor import supervise
from launch.supervise.terminal import View
from trainers.config.micro_batch import gave_way
from trainers.contract import exit_codes
from trainers.contract.errors import UserError
from trainers.contract.files import read_json, update_json
from trainers.contract.paths import RunPaths


def lead(submission: Submission, place: Place, paths: RunPaths, group: NodeGroup, requeue: Path, stop: StopSignals,
          view: View) -> int:
    hosts = hosts_of(place)
    if submission.here:
        update_json(paths.record, job={**read_json(paths.record)["job"], "ids": [place.job]})
    about = about_job(submission, place)
    while True:
        number = record.next_attempt(paths)
        record.take_attempt(paths, number)
        try:
            plan = plan_of(submission, paths, number)
            with record.recorded(plan, paths, view, **about) as ended, reserved_port() as port:
                group.said.clear()
                group.tell({"begin": number, "port": port})
                view.notice(f"attempt {number} of {paths.id} on {', '.join(hosts)}: {plan.resources.ranks} rank(s)")
                mine = supervise(plan, paths, view, address=group.address, port=port, peers=group, stop=stop,
                                 more=node_variables(group), kill_wait_s=kill_wait_s())
                outcome = joint_outcome(mine, group, plan, hosts)
                down = down_nodes(hosts) if outcome.signal == "SIGTERM" else {}
                smaller = outcome.kind == "failed" and gave_way(paths, number)  # with less memory next time: no failure
                failures = count_failures(paths, submission) + (outcome.kind == "failed" and not smaller)
                worth = outcome.kind == "failed" and (smaller or outcome.failure.retry and failures <= submission.max_restarts)
                signals = {outcome.signal, *(signal.Signals(number).name for number in stop.received)} - {None}
                again = worth and not signals and group.whole
                if _superseded(paths, number):
                    return _give_way(paths, number, group, requeue, view)
                state = ended(outcome, reason_of(outcome, down), again)
        except (OSError, UserError) as error:
            if _superseded(paths, number):
                return _give_way(paths, number, group, requeue, view)
            message, hint = (error.message, error.hint) if isinstance(error, UserError) else (str(error), None)
            failure = record_no_start(paths, number, message, hint, **about)
            outcome, state, down = Outcome("failed", failure), "failed", {}
            failures, worth, again, signals = count_failures(paths, submission), False, False, set()
        failure = outcome.failure
        if failure:
            view.event({"event": "failure", **failure.as_dict()})
            view.notice(f"attempt {number} failed: {failure.message}")
        if again:
            set_flag(requeue, failures < submission.max_restarts)
            continue
        if failure:  # with a node's process gone, or a time limit, the job begins anew; else the run has failed
            anew = worth and signals <= {"SIGUSR2"} and state != "cancelled"
        else:        # a time limit is ours to follow by a requeue; TERM comes from who has decided that already
            anew = state == "preempted" and outcome.signal == "SIGUSR2"
        set_flag(requeue, anew)
        # It is not over; also not if SLURM's TERM came first, which is followed by what SLURM does.
        if failure and state != "cancelled" and (anew or worth and "SIGTERM" in signals and submission.cluster.requeue):
            update_json(paths.record, state="preempted")
        if down and state == "preempted":
            exclude(Path(requeue.parent), place, list(down), requeued=True)
        view.notice(f"run {paths.id}: {state}" + ("; the job is requeued" if anew and submission.cluster.requeue else ""))
        code = record.EXIT_CODES[outcome.kind]
        if not anew and not submission.cluster.requeue and state != "preempted":
            code = end_chain(paths, place, code)
        group.tell({"end": code})
        return code


def _superseded(paths: RunPaths, number: int) -> bool:
    return record.next_attempt(paths) != number + 1


def _give_way(paths: RunPaths, number: int, group: NodeGroup, requeue: Path, view: View) -> int:
    """The end of a process that has outlived its job, which SLURM has begun anew elsewhere: it decides nothing more."""
    view.notice(f"attempt {number} of {paths.id} has been taken over by a newer one")
    set_flag(requeue, False)
    group.tell({"end": exit_codes.FAILED})
    return exit_codes.FAILED


def end_chain(paths: RunPaths, place: Place, code: int) -> int:
    """The exit code of a chain's last job to begin. The next begins after one that ended badly: where it cannot be
    cancelled (in a container there may be no scancel), this one must end well. Else it may say how it ended to jobs that
    wait for this run."""
    jobs = read_json(paths.record)["job"]["ids"]
    try:
        slurm.cancel(jobs[jobs.index(place.job) + 1:])
    except (UserError, ValueError):
        return 0
    return code


def about_job(submission: Submission, place: Place) -> dict[str, Any]:
    """What the record of an attempt says of its job."""
    return {"job": place.job, "restart": place.restart, "nodes": hosts_of(place), "submission": submission.number}


def record_no_start(paths: RunPaths, number: int, message: str, hint: str | None = None, retry: bool = False, **about: Any
                 ) -> Failure:
    failure = Failure(None, None, None, f"attempt {number} could not begin: {message}", hint, None, retry)
    record.never_began(paths, number, failure, **about)
    return failure


def set_flag(file: Path, there: bool) -> None:
    file.touch() if there else file.unlink(missing_ok=True)
