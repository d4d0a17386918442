"""The supervisor on one node, the same here and on SLURM: start its ranks, watch them, handle signals,
record the first failure. It imports no torch.

Ranks are plain child processes, each the leader of its own process group, and die with this process
whatever kills it. Their output comes through pipes: it goes to one log a rank, and rank 0's also to
the view. A pipe, not the file itself, so that a full disk stops no rank.
"""

from __future__ import annotations

import selectors
import signal
import time
from typing import Mapping

from launch.plan.plan import Plan
from launch.supervise.rank import PARTIAL_AFTER_S, Alone, Failure, Outcome, Peers, Rank
from launch.supervise.signals import StopSignals, stop_signals
from launch.supervise.terminal import View
from launch.supervise.watchdog import Watchdog
from trainers.contract import exit_codes
from trainers.contract.paths import RunPaths

FAILURE_GRACE_S = 5.0    # for ranks whose peer has died: they hang in a collective more often than not
LEFTOVERS_GRACE_S = 3.0


def supervise(plan: Plan, paths: RunPaths, view: View, *, node: int = 0, address: str = "127.0.0.1", port: int,
              peers: Peers = Alone(), more: Mapping[str, str] = {}, kill_wait_s: float | None = None,
              stop: StopSignals | None = None) -> Outcome:
    """Run this node's ranks of one attempt to their end. From the main thread, whose death ends the ranks.

    Args:
        address, port: where rank 0's store listens.
        peers: the node processes of the other nodes.
        more: variables of this node alone, for its ranks; the plan's win.
        kill_wait_s: how long after SIGTERM whoever manages this machine kills everything; None: never.
        stop: the caller's, if it listens to signals itself.
    """
    if stop is None:
        with stop_signals() as stop:
            return supervise(plan, paths, view, node=node, address=address, port=port, peers=peers, more=more,
                             kill_wait_s=kill_wait_s, stop=stop)
    ranks: list[Rank] = []
    with selectors.DefaultSelector() as selector:
        try:
            selector.register(stop.wakeup, selectors.EVENT_READ)
            for link in peers.sockets():
                selector.register(link, selectors.EVENT_READ)
            for local_rank in range(plan.resources.ranks_per_node):
                ranks.append(Rank(plan, node, local_rank, address, port, more, paths, view))
                selector.register(ranks[-1].pipe, selectors.EVENT_READ, ranks[-1])
            watchdog = Watchdog(plan, ranks, peers, node, paths.slow(plan.attempt))
            return _watch(plan, ranks, selector, stop, peers, kill_wait_s, view, watchdog)
        finally:
            # What ranks have started themselves (W&B's writer) may finish its work, but not stay.
            end = time.monotonic() + LEFTOVERS_GRACE_S
            while all(rank.code is not None for rank in ranks) and any(r.group() for r in ranks) and time.monotonic() < end:
                time.sleep(0.02)
            for rank in ranks:
                rank.kill()
            for rank in ranks:
                rank.process.wait()
                rank.close()


def _watch(plan: Plan, ranks: list[Rank], selector, stop: StopSignals, peers: Peers, kill_wait_s: float | None,
           view: View, watchdog: Watchdog) -> Outcome:
    first: Failure | None = None
    asked: int | None = None       # the signal that asked for a stop
    deadline: float | None = None  # when the ranks that are left are killed
    abrupt = overdue = False       # a rank that could not yet heed the signal; one that would not
    elsewhere = warned = False     # whether ranks of another node have failed; whether the grace was found short
    while True:
        for key, _ in selector.select(0.2 if deadline is None else max(0.0, min(0.2, deadline - time.monotonic()))):
            if key.fileobj is stop.wakeup:
                stop.wakeup.recv(4096)
            elif key.data is not None:
                key.data.read()
                if key.data.silent:
                    selector.unregister(key.fileobj)
        for rank in ranks:
            rank.show_partial(PARTIAL_AFTER_S)
        slowest = max((rank.checkpoint_s for rank in ranks if rank.checkpoint_s is not None), default=None)
        if slowest is not None and not warned and (short := _short(slowest, plan, kill_wait_s)):
            warned = True
            view.notice(f"warning: {short}")
        # Of ranks found dead together, one that a signal ended, or that has said why, is likelier the cause than one that
        # lost a peer.
        gone = sorted((rank for rank in ranks if rank.code is None and rank.ended()),
                      key=lambda rank: (rank.code >= 0, rank.error is None))
        if asked is None and any(rank.code == -signal.SIGTERM for rank in gone):
            time.sleep(0.5)  # SLURM's signals reach ranks directly: our own may be a moment behind
        heard = peers.heard()
        stop.received.extend(word["signal"] for word in heard if "signal" in word)
        while stop.received:  # before the ranks are looked at: SLURM's signals reach them directly too
            number = stop.received.pop(0)
            if asked is not None and number == signal.SIGINT:
                return Outcome("killed", signal="SIGINT", checkpoint_s=slowest)
            if asked is None:
                asked = number
                how = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
                what = "stopping at the next step; what is done is kept" if plan.batch else "asking the script to stop"
                view.notice(f"{signal.Signals(number).name}: {what}{how}")
                peers.tell({"signal": int(number)})
                for rank in ranks:
                    rank.send(signal.SIGTERM)
                deadline = deadline or time.monotonic() + plan.grace_s
        if not elsewhere and any("failure" in word or "lost" in word for word in heard):
            elsewhere = True
            deadline = _end_others(ranks, plan)
        for rank in gone:
            # One that was asked to stop before it could heed that, or that lost a peer which stopped so.
            early = rank.code in (-signal.SIGTERM, -signal.SIGUSR2) or any(r.code == exit_codes.PREEMPTED for r in ranks)
            stopped = rank.code in (exit_codes.FINISHED, exit_codes.PREEMPTED) or (asked is not None and early)
            if not stopped and first is None and not (overdue or abrupt or elsewhere):
                first = rank.failure()
                deadline = _end_others(ranks, plan)
                peers.tell({"failure": first.as_dict()})
            # A script's ranks may stop each in its own way.
            elif plan.batch and stopped and rank.code not in (exit_codes.FINISHED, exit_codes.PREEMPTED):
                abrupt, deadline = True, min(deadline, time.monotonic() + FAILURE_GRACE_S)
        if deadline is None and (hang := watchdog.turn(heard)):
            first = Failure(hang.rank, None, None, hang.message, hang.hint, hang.stack, True)
            deadline = _end_others(ranks, plan)
            peers.tell({"failure": first.as_dict()})
        running = [rank for rank in ranks if rank.code is None]
        if deadline is not None and time.monotonic() >= deadline and running and not overdue:
            overdue = not (first or abrupt or elsewhere)
            for rank in running:
                rank.kill()
        if not running:
            break
    name = signal.Signals(asked).name if asked is not None else None
    if first is None and overdue:
        late = next(rank for rank in ranks if rank.code == -signal.SIGKILL)
        first = Failure(late.rank, None, "SIGKILL", f"rank {late.rank} did not stop within {plan.grace_s:g} s of {name} "
                        "and was killed", "raise run.grace_s if a checkpoint takes that long", None, False)
    if first is not None:
        return Outcome("failed", first, name, slowest)
    if elsewhere:
        return Outcome("ended", None, name, slowest)
    # A task's ranks say by their code whether they are through; a script's 0 may mean that it has saved and stopped.
    finished = all(rank.code == exit_codes.FINISHED for rank in ranks) and (asked is None or plan.batch is not None)
    return Outcome("finished" if finished else "preempted", None, name, slowest)


def _end_others(ranks: list[Rank], plan: Plan) -> float:
    """After a failure: ask the ranks that are left to end; returns when those that have not are killed."""
    for rank in ranks:
        rank.send(signal.SIGTERM)
    return time.monotonic() + min(FAILURE_GRACE_S, plan.grace_s)


def _short(checkpoint_s: float, plan: Plan, kill_wait_s: float | None) -> str | None:
    """What is wrong if a checkpoint takes longer than ranks are given for the one at a stop."""
    if checkpoint_s > plan.grace_s:
        return (f"a checkpoint took {checkpoint_s:.1f} s; a stop leaves run.grace_s = {plan.grace_s:g} s for one, "
                f"and would lose the steps since the last: runs like this need run.grace_s={max(60, round(3 * checkpoint_s))}")
    if kill_wait_s is not None and checkpoint_s > kill_wait_s:
        return (f"a checkpoint took {checkpoint_s:.1f} s; preempted, requeued or cancelled by SLURM, this job is killed "
                f"{kill_wait_s:g} s after the signal (KillWait): a lower checkpoint.every loses less")
    return None


