"""The supervisor of one node's ranks: start them, watch them, handle signals, record the first failure.

The supervisor is the same on this machine and on SLURM, and imports no torch. Ranks are plain child processes. Each rank
leads its own session, and dies with the supervisor, whatever kills the supervisor. The output of a rank comes
through a pipe and goes to the rank's log; rank 0's output also goes to the view. Ranks write to a pipe and not to the log
file itself, so that a full disk stops no rank.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from pathlib import Path
from typing import Mapping

from launch.plan.plan import Plan
from launch.records.life_sign import LifeSign
from launch.supervise.rank import PARTIAL_AFTER_S, Alone, Failure, Outcome, Peers, Rank, processes_of_groups
from launch.supervise.signals import StopSignals, stop_signals
from launch.supervise.terminal import View
from launch.supervise.watchdog import Watchdog
from trainers.contract import exit_codes
from trainers.contract.paths import RunPaths

FAILURE_GRACE_S = 5.0    # for ranks that have lost another rank: most of them hang in a collective operation
LOOK_S = 1.0             # between two looks for the run's folder: its storage may be slow
GONE_S = 5.0             # the run's folder counts as gone if it was missing for so long: shared storage may fail for a moment
LEFTOVERS_GRACE_S = 3.0  # for processes that ranks of a run that has not finished have started
OFTEN_S = 1.0            # after this time, look for these processes less often: each time, all of /proc is read


def supervise(plan: Plan, paths: RunPaths, view: View, *, node: int = 0, address: str = "127.0.0.1", port: int,
              peers: Peers = Alone(), more: Mapping[str, str] = {}, kill_wait_s: float | None = None,
              stop: StopSignals | None = None, stdin: int | None = subprocess.DEVNULL) -> Outcome:
    """Run this node's ranks of one attempt until they have ended.

    Call this from the main thread: the ranks die with the thread that started them.

    Args:
        node: the number of this node, from 0.
        address, port: where rank 0's store listens.
        peers: the node processes of the other nodes.
        more: environment variables for the ranks of this node only; variables of the plan override them.
        kill_wait_s: seconds from SLURM's SIGTERM to its SIGKILL; None: nobody kills the ranks, or the time is not known.
        stop: the caller's stop signals, if the caller records them already.
        stdin: the standard input of the ranks, as subprocess takes it; None: this process's own.

    Raises:
        OSError: a rank could not be started, or its log could not be opened.
    """
    if stop is None:
        with stop_signals(pausing=True) as stop:
            return supervise(plan, paths, view, node=node, address=address, port=port, peers=peers, more=more,
                             kill_wait_s=kill_wait_s, stop=stop, stdin=stdin)
    ranks: list[Rank] = []
    with selectors.DefaultSelector() as selector:
        try:
            selector.register(stop.wakeup, selectors.EVENT_READ)
            for link in peers.sockets():
                selector.register(link, selectors.EVENT_READ)
            for local_rank in range(plan.resources.ranks_per_node):
                ranks.append(Rank(plan, node, local_rank, address, port, more, paths, view, stdin))
                selector.register(ranks[-1].pipe, selectors.EVENT_READ, ranks[-1])
            watchdog = Watchdog(plan, ranks, peers, node, paths.slow(plan.attempt))
            sign = LifeSign(paths.life_sign(plan.attempt, node))
            outcome = _watch(plan, ranks, selector, stop, peers, kill_wait_s, view, watchdog, sign)
            if all(rank.code is not None for rank in ranks):
                finished = outcome.kind == "finished"
                _wait_for_leftovers(ranks, plan.grace_s if finished else min(LEFTOVERS_GRACE_S, plan.grace_s), stop, view,
                                    peers, sign)
            return outcome
        finally:
            for rank in ranks:
                rank.kill()
            for rank in ranks:
                rank.close()


def _watch(plan: Plan, ranks: list[Rank], selector: selectors.BaseSelector, stop: StopSignals, peers: Peers,
           kill_wait_s: float | None, view: View, watchdog: Watchdog, sign: LifeSign) -> Outcome:
    failure: Failure | None = None  # the first one on this node
    stop_signal: int | None = None  # the signal that asked for a stop
    deadline: float | None = None   # when the ranks that still run are killed
    abrupt = False                  # a rank was stopped before it could handle the signal
    interrupted = False             # a script's ranks got SIGINT; SIGTERM is still to come
    interrupts = 0                  # how often this process itself got SIGINT: every node of a job may get the same SIGINT
    overdue = False                 # ranks did not stop in time
    hurt: str | None = None         # a rank failed while it was to stop
    failed_elsewhere = False        # ranks of another node have failed
    warned = False                  # the user knows that run.grace_s or KillWait is too short
    seen_at = time.monotonic()      # when the folder of the attempt was there last
    looked_at = seen_at             # when this process looked for that folder last
    folder = RunPaths(Path(plan.folder)).attempt(plan.attempt)
    while True:
        for key, _ in selector.select(0.2 if deadline is None else max(0.0, min(0.2, deadline - time.monotonic()))):
            if key.fileobj is stop.wakeup:
                stop.wakeup.recv(4096)
            elif key.data is not None:
                key.data.read()
                if key.data.output_closed:
                    selector.unregister(key.fileobj)
        for rank in ranks:
            rank.show_partial(PARTIAL_AFTER_S)
        sign.turn(next((rank.problem for rank in ranks if rank.problem), None))
        slowest = max((rank.checkpoint_s for rank in ranks if rank.checkpoint_s is not None), default=None)
        if slowest is not None and not warned and (warning := _too_slow(slowest, plan, kill_wait_s)):
            warned = True
            view.notice(f"warning: {warning}")
        just_ended = sorted((rank for rank in ranks if rank.code is None and rank.ended()), key=_cause_first)
        if stop_signal is None and any(rank.code in (-signal.SIGTERM, exit_codes.PREEMPTED) for rank in just_ended):
            time.sleep(0.5)  # SLURM signals ranks directly: the same signal to this process may arrive a moment later
        messages = peers.receive()
        paused_s = _pause_if_asked(ranks, stop)
        deadline = deadline and deadline + paused_s
        interrupts += stop.received.count(signal.SIGINT)
        if interrupts > 1:
            return Outcome("killed", signal="SIGINT", checkpoint_s=slowest)
        stop.received.extend(message["signal"] for message in messages if "signal" in message)
        # Handle signals before the ended ranks are judged: a rank that was ended by SLURM's signal has not failed.
        while stop.received:
            number = stop.received.pop(0)
            if stop_signal is None:
                stop_signal = number
                how = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
                what = "stopping at the next step; finished work is kept" if plan.batch else "asking the script to stop"
                view.notice(f"{signal.Signals(number).name}: {what}{how}")
                peers.send({"signal": int(number)})
                # A script may catch KeyboardInterrupt to save. The ranks of a task handle all signals alike.
                interrupted = number == signal.SIGINT and plan.batch is None
                for rank in ranks:
                    rank.send_group(signal.SIGINT) if interrupted else rank.send(signal.SIGTERM)
                deadline = deadline or time.monotonic() + plan.grace_s
        if not failed_elsewhere and any("failure" in message or "lost" in message for message in messages):
            failed_elsewhere = True
            deadline = _end_others(ranks, plan)
        # KeyboardInterrupt ends Python with SIGINT, and some programs with exit code 130.
        ctrl_c = stop_signal == signal.SIGINT and plan.batch is None
        as_asked = (exit_codes.PREEMPTED, *((-signal.SIGINT, exit_codes.KILLED) if ctrl_c else ()))
        for rank in just_ended:
            # The stop signal reached this rank before its handler was set, or this rank lost a peer that stopped as asked.
            early = rank.code in (-signal.SIGTERM, -signal.SIGUSR2) or any(r.code in as_asked for r in ranks)
            stopped = rank.completed(stop_signal is not None) or (stop_signal is not None and early)
            # SLURM's SIGTERM reaches processes that ranks have forked too, and a rank fails when it loses them (the workers of a
            # DataLoader). The run continues from its newest checkpoint, unless the failure would repeat.
            if not stopped and stop_signal is not None and plan.batch and (broken := rank.failure()).retry:
                stopped = True
                hurt = hurt or f"rank {broken.rank} failed while it was to stop: {broken.message}"
            if not stopped and failure is None and not (overdue or abrupt or failed_elsewhere):
                failure = rank.failure()
                deadline = _end_others(ranks, plan)
                peers.send({"failure": failure.as_dict()})
            # Only for tasks: the ranks of a script may each stop in their own way.
            elif plan.batch and stopped and rank.code not in (exit_codes.FINISHED, exit_codes.PREEMPTED):
                assert deadline is not None  # a stop was asked for
                abrupt, deadline = True, min(deadline, time.monotonic() + FAILURE_GRACE_S)
        if deadline is None and (hang := watchdog.turn(messages)):
            failure = Failure(hang.rank, None, None, hang.message, hang.hint, hang.stack, True)
            deadline = _end_others(ranks, plan)
            peers.send({"failure": failure.as_dict()})
        now = time.monotonic()
        if failure is None and now > looked_at + LOOK_S:
            looked_at = now
            if is_there(folder):
                seen_at = now
        if failure is None and looked_at > seen_at + GONE_S:
            failure = folder_deleted(plan.folder)
            peers.send({"failure": failure.as_dict()})
            for rank in ranks:  # at once: a rank that stops with a checkpoint would make the folder again
                rank.kill()
        running = [rank for rank in ranks if rank.code is None]
        if deadline is not None and time.monotonic() >= deadline and running and not overdue:
            if interrupted and not (failure or failed_elsewhere):
                interrupted, deadline = False, _end_others(ranks, plan)
                continue
            overdue = not (failure or abrupt or failed_elsewhere)
            for rank in running:
                rank.kill()
        if not running:
            break
    name = signal.Signals(stop_signal).name if stop_signal is not None else None
    # The last rank may have ended by itself just before it was to be killed.
    late = next((rank for rank in ranks if rank.code == -signal.SIGKILL), None) if overdue else None
    # Ranks that were too slow to stop have not failed: the run continues from its newest checkpoint.
    note = hurt if late is None else (f"rank {late.rank} did not stop within {plan.grace_s:g} s (run.grace_s) of {name} and "
                                      "was killed")
    if failure is not None:
        return Outcome("failed", failure, name, slowest)
    if failed_elsewhere:
        return Outcome("ended", None, name, slowest)
    # Exit code 0 of a task's rank means that the run is finished. A script that was asked to stop may also exit with 0
    # after it has saved its state.
    finished = (all(rank.code == exit_codes.FINISHED for rank in ranks)
                and (stop_signal is None or plan.batch is not None))
    return Outcome("finished" if finished else "preempted", None, name, slowest, note)


def is_there(folder: Path) -> bool:
    """Whether a folder exists. An error of its storage (a stale handle, no permission) does not show that it is gone."""
    try:
        os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass
    return True


def folder_deleted(folder: str) -> Failure:
    """The failure of an attempt whose run has no folder any more."""
    return Failure(None, None, None, f"the run's folder {folder} was deleted or moved while the run used it",
                   "start a new run; or move the folder back, then use `launch resume`", None, False)


def _pause_if_asked(ranks: list[Rank], stop: StopSignals) -> float:
    """After Ctrl-Z, stop the ranks and this process until this process is continued (`fg`). Return how long that took.

    The terminal stops only this process: each rank leads a session of its own. Processes that an ended rank has left behind
    are stopped too.
    """
    if signal.SIGTSTP not in stop.received:
        return 0.0
    stop.received[:] = [number for number in stop.received if number != signal.SIGTSTP]
    for rank in ranks:
        rank.send_group(signal.SIGSTOP, left_behind=True)
    began = time.monotonic()
    # Not SIGSTOP: without a shell that could continue this process (`ssh -t HOST launch ...`), the kernel ignores SIGTSTP.
    handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTSTP)
    signal.signal(signal.SIGTSTP, handler)
    for rank in ranks:
        rank.send_group(signal.SIGCONT, left_behind=True)
    return time.monotonic() - began


def _wait_for_leftovers(ranks: list[Rank], limit_s: float, stop: StopSignals, view: View, peers: Peers,
                        sign: LifeSign) -> None:
    """Let processes that the ranks have started (an upload, W&B's writer) finish, for at most `limit_s` seconds.

    The caller then kills the processes that are left. A stop signal ends the wait.
    """
    began, told = time.monotonic(), False
    rank_of_group = {rank.process.pid: rank.rank for rank in ranks}
    while left := processes_of_groups(rank_of_group.keys()):
        began += _pause_if_asked(ranks, stop)
        waited_s = time.monotonic() - began
        if waited_s >= limit_s or stop.received:
            for group, processes in left.items():
                number = rank_of_group[group]
                view.notice(f"rank {number} has ended, and processes that it started are killed after {waited_s:.0f} s: "
                            f"{', '.join(processes)}; run.grace_s says how long they may run after a rank that has finished")
            return
        if waited_s >= LEFTOVERS_GRACE_S and not told:
            told = True
            view.notice(f"waiting up to {limit_s:g} s (run.grace_s) for processes that ranks have started; Ctrl-C ends the wait")
        for rank in ranks:
            rank.read_all()
        peers.beat()
        sign.turn(None)
        time.sleep(0.05 if waited_s < OFTEN_S else 0.5)


def _cause_first(rank: Rank) -> tuple[bool, bool, bool]:
    """Sort key for ranks that are found dead together: the likeliest cause first.

    A rank that left early, was killed by a signal, or has reported an error, is likelier to be the cause than a rank that lost
    another rank.
    """
    killed = rank.code is not None and rank.code < 0
    return not rank.left_early(), not killed, rank.error is None


def _end_others(ranks: list[Rank], plan: Plan) -> float:
    """Ask the ranks that still run to stop, after a failure. Return the time at which they are killed."""
    for rank in ranks:
        rank.send(signal.SIGTERM)
    return time.monotonic() + min(FAILURE_GRACE_S, plan.grace_s)


def _too_slow(checkpoint_s: float, plan: Plan, kill_wait_s: float | None) -> str | None:
    """Return a warning if a checkpoint takes longer than ranks have for one when they are stopped."""
    if checkpoint_s > plan.grace_s:
        return (f"a checkpoint took {checkpoint_s:.1f} s, but ranks that must stop have only {plan.grace_s:g} s (run.grace_s) to "
                "save one, and would lose the steps since the last checkpoint: "
                f"set run.grace_s={max(60, round(3 * checkpoint_s))} for runs like this")
    if kill_wait_s is not None and checkpoint_s > kill_wait_s:
        return (f"a checkpoint took {checkpoint_s:.1f} s, but a job that SLURM preempts, requeues or cancels has only "
                f"{kill_wait_s:g} s (KillWait) until SLURM kills the job, and would lose the steps since the last checkpoint: "
                "set a lower checkpoint.every to lose fewer steps")
    return None
