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
from pathlib import Path

from launch.execute import record
from launch.execute.node.exclusion import exclude
from launch.execute.node.follow import follow
from launch.execute.node.forensics import count_failures, record_lost_attempts
from launch.execute.node.lead import end_chain, job_fields, lead, record_failed_start, set_flag
from launch.execute.node.place import Place, hosts_of
from launch.plan.submission import read_submission
from launch.supervise.rendezvous import NotConnected, meet
from launch.supervise.signals import StopSignals, stop_signals
from launch.supervise.terminal import make_view
from trainers.contract import exit_codes
from trainers.contract.errors import UserError
from trainers.contract.files import read_json, update_json
from trainers.contract.paths import RunPaths

FINAL = ("finished", "cancelled")


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
    requeue_flag = folder / f"requeue-{name}"
    state = read_json(paths.record)["state"]
    if state in FINAL:  # all nodes read the same state: the head changes it only after all have met
        view.notice(f"run {paths.id} is {state}: nothing to do")
        # Jobs that wait for this run (`--after`) start only if this job succeeds.
        return exit_codes.FINISHED if state == "finished" else exit_codes.FAILED
    if place.node == 0:
        record_lost_attempts(paths, place, folder)
        # This flag counts if this process is killed before it can decide.
        set_flag(requeue_flag, count_failures(paths, submission) < submission.max_restarts)
    try:
        group = meet(folder, name, place.node, place.nodes, submission.cluster.interface, lambda: bool(stop.received))
    except (NotConnected, OSError) as error:
        view.notice(f"error: {error}")
        if place.node == 0:
            # No requeue, unless the code below decides otherwise. That code is not reached if the record cannot be written (a
            # full disk), and then a requeue would not help.
            set_flag(requeue_flag, False)
        if place.node == 0 and not stop.received:
            number = record.next_attempt(paths)
            record.take_attempt(paths, number)
            record_failed_start(paths, number, str(error), retry=True, **job_fields(submission, place))
        if place.node == 0:
            requeue = signal.SIGUSR2 in stop.received or (
                not stop.received and count_failures(paths, submission) <= submission.max_restarts)
            set_flag(requeue_flag, requeue)
            if requeue:
                update_json(paths.record, state="preempted")  # the run is not over
            elif not submission.cluster.requeue and not stop.received:
                return end_chain(paths, place, exit_codes.FAILED)
        return exit_codes.FAILED
    try:
        if place.node == 0:
            return lead(submission, place, paths, group, requeue_flag, stop, view)
        return follow(submission, place, paths, group, stop, view)
    except Exception:
        if place.node == 0:  # a full disk, or a bug of ours: after a requeue it would happen again
            set_flag(requeue_flag, False)
        raise
    finally:
        if not group.complete:  # every process that is left does this, because the head may be gone
            hosts = hosts_of(place)
            exclude(folder, place, [hosts[node] for node, link in group.links.items() if not link.open])
        group.close()


def run() -> None:
    """The command. It writes errors to the node's log, and exits with this node's exit code."""
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    run()
