"""A node's process of a SLURM job: the same supervisor as locally, an attempt after another, until the run ends
or SLURM wants the nodes back.

    python -P -m launch.execute.node_process SUBMISSION

SLURM starts it once on each node of the job (srun, one task a node). The head, node 0, takes the attempts, writes
the records and decides; the others follow its words. Whether the job is requeued, the batch shell reads off a file
that the head keeps right from the beginning: so it is requeued too if the head itself is killed.
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
from launch.execute.node.forensics import close_lost, count_failures
from launch.execute.node.lead import about_job, end_chain, lead, record_no_start, set_flag
from launch.execute.node.place import Place, hosts_of
from launch.plan.submission import read_submission
from launch.supervise.rendezvous import Absent, meet
from launch.supervise.signals import StopSignals, stop_signals
from launch.supervise.terminal import make_view
from trainers.contract import exit_codes
from trainers.contract.errors import UserError
from trainers.contract.files import read_json, update_json
from trainers.contract.paths import RunPaths

FINAL = ("finished", "cancelled")


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
        close_lost(paths, place, folder)
        set_flag(requeue, count_failures(paths, submission) < submission.max_restarts)  # if this process should be killed
    try:
        group = meet(folder, name, place.node, place.nodes, submission.cluster.interface, lambda: bool(stop.received))
    except (Absent, OSError) as error:
        view.notice(f"error: {error}")
        if place.node == 0:
            set_flag(requeue, False)  # until it is decided: should even the record fail, on a full disk, that would repeat
        if place.node == 0 and not stop.received:
            number = record.next_attempt(paths)
            record.take_attempt(paths, number)
            record_no_start(paths, number, str(error), retry=True, **about_job(submission, place))
        if place.node == 0:
            anew = signal.SIGUSR2 in stop.received or (
                not stop.received and count_failures(paths, submission) <= submission.max_restarts)
            set_flag(requeue, anew)
            if anew:
                update_json(paths.record, state="preempted")  # it is not over
            elif not submission.cluster.requeue and not stop.received:
                return end_chain(paths, place, exit_codes.FAILED)
        return exit_codes.FAILED
    try:
        if place.node == 0:
            return lead(submission, place, paths, group, requeue, stop, view)
        return follow(submission, place, paths, group, stop, view)
    except Exception:
        if place.node == 0:  # a full disk, or a fault of ours: it would repeat
            set_flag(requeue, False)
        raise
    finally:
        if not group.whole:  # whoever is left says it: it may be the head that has gone
            hosts = hosts_of(place)
            exclude(folder, place, [hosts[node] for node, link in group.links.items() if not link.open])
        group.close()


# The head


# The other nodes


def run() -> None:
    """The command: exit with the code of this node's part. Errors go to the node's log."""
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
