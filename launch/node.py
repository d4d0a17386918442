"""The supervisor on one node, the same here and on SLURM: start its ranks, watch them, handle signals,
record the first failure. It imports no torch.

Ranks are plain child processes, each the leader of its own process group, and die with this process
whatever kills it. Their output comes through pipes: it goes to one log a rank, and rank 0's also to
the view. A pipe, not the file itself, so that a full disk stops no rank.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Callable, Iterator, Literal, Mapping, Protocol

from launch.plan import Plan
from launch.view import View
from launch.watchdog import Watchdog
from trainers import events, heartbeat
from trainers.paths import RunPaths

PREEMPTED = 75           # a rank's exit code: stopped with a checkpoint
FAILURE_GRACE_S = 5.0    # for ranks whose peer has died: they hang in a collective more often than not
LEFTOVERS_GRACE_S = 3.0
PARTIAL_AFTER_S = 0.5
READ_BYTES = 1 << 16
TAIL_LINES = 400
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)


@dataclass(frozen=True)
class Failure:
    """The first rank that failed, and what is known of why."""

    rank: int
    exit_code: int | None     # None if a signal ended it
    signal: str | None
    message: str
    hint: str | None
    traceback: str | None
    retry: bool               # whether another attempt may fare better
    node: str | None = None   # the host, where there are several

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """`ended`: ranks of this node that ended because those of another had failed."""

    kind: Literal["finished", "failed", "preempted", "killed", "ended"]
    failure: Failure | None = None
    signal: str | None = None           # what asked for the stop
    checkpoint_s: float | None = None   # what the slowest checkpoint took


class Peers(Protocol):
    """The node processes of the other nodes."""

    def sockets(self) -> list[socket.socket]:
        """What to wait on for their words."""

    def tell(self, word: Mapping[str, Any]) -> None:
        """To all of them."""

    def heard(self) -> list[dict[str, Any]]:
        """What they have said since: {"failure"}, {"signal"}, what launch/watchdog.py lists, or {"lost"}: one has gone
        without a word."""


class Alone:
    """There are none."""

    def sockets(self) -> list[socket.socket]:
        return []

    def tell(self, word: Mapping[str, Any]) -> None: ...

    def heard(self) -> list[dict[str, Any]]:
        return []


class LogFile:
    """A rank's log. While the disk is full it keeps the newest mebibyte and tries again."""

    KEPT_BYTES = 2**20

    def __init__(self, path, warn: Callable[[str], None]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._path, self._warn, self._waiting, self._failing = path, warn, b"", False

    def write(self, data: bytes) -> None:
        self._waiting += data
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting):]
            self._failing = False
        except OSError as error:
            self._waiting = self._waiting[-self.KEPT_BYTES:]
            if not self._failing:
                self._warn(f"{self._path} cannot be written: {error.strerror}; the run goes on")
            self._failing = True

    def close(self) -> None:
        self.write(b"")
        os.close(self._file)


class Rank:
    """One rank: its process, its pipe, its log, and the end of what it said."""

    def __init__(self, plan: Plan, node: int, local_rank: int, address: str, port: int, more: Mapping[str, str],
                 paths: RunPaths, view: View):
        env = plan.rank_env(node, local_rank, address, port)
        self.rank = int(env["RANK"])
        self.view = view
        self.log = LogFile(paths.log(plan.attempt, self.rank), view.notice)
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.error: dict[str, Any] | None = None
        self.code: int | None = None
        self.silent = False  # whether it has closed its output
        self.checkpoint_s: float | None = None
        self._partial, self._partial_since = b"", 0.0
        # A script has no loop of ours that could write there.
        beats, self.page = heartbeat.new_page() if plan.batch else (None, None)
        told = {heartbeat.VARIABLE: str(beats)} if plan.batch else {}
        self.pipe, child = os.pipe()
        os.set_blocking(self.pipe, False)
        try:
            self.process = subprocess.Popen(
                plan.command, env={**plan.inherited(os.environ), **more, **plan.env, **env, **told}, cwd=plan.cwd,
                stdin=subprocess.DEVNULL, stdout=child, stderr=child, process_group=0, preexec_fn=_die_with(os.getpid()),
                pass_fds=() if beats is None else (beats,),
            )
        finally:
            os.close(child)
            if beats is not None:
                os.close(beats)

    def read(self) -> bool:
        """Take in some of what the rank has said. False if there is no more for now, or for ever."""
        try:
            data = os.read(self.pipe, READ_BYTES)
        except BlockingIOError:
            return False
        self.silent = not data
        if not self._partial:
            self._partial_since = time.monotonic()
        *whole, self._partial = (self._partial + data).split(b"\n")
        for raw in whole:
            self._line(raw)
            self._partial_since = time.monotonic()
        return bool(data)

    def read_all(self) -> None:
        """The last words of a rank that has ended: what a pipe holds, even if someone still writes to it."""
        for _ in range(32):
            if not self.read():
                break
        self.show_partial(older_than_s=0.0)

    def show_partial(self, older_than_s: float) -> None:
        """Pass on a line that waits for its end, such as a progress bar's."""
        waiting = self._partial and time.monotonic() - self._partial_since >= older_than_s
        if waiting and events.SEPARATOR.encode() not in self._partial:
            text = self._partial.decode(errors="replace")
            self.tail.append(text)
            self.log.write(self._partial)
            if self.rank == 0:
                self.view.text(text)
            self._partial = b""

    def _line(self, raw: bytes) -> None:
        text = raw.decode(errors="replace")
        # Another thread may have left a line unfinished before the event.
        before, separator, after = text.partition(events.SEPARATOR)
        event = events.parse(separator + after) if separator else None
        try:
            plain = events.line(event) if event else None
        except (KeyError, TypeError, ValueError):  # a script that prints the like
            plain = None
        if plain is None:
            self._say(raw, text)
            return
        if before:
            self._say(before.encode(), before)
        if event["event"] == "error":
            self.error = event
        if event["event"] == "checkpoint":
            self.checkpoint_s = max(self.checkpoint_s or 0.0, event["seconds"] + event["stall_s"])
        self.log.write(plain.encode() + b"\n")
        if self.rank == 0:
            self.view.event(event)

    def _say(self, raw: bytes, text: str) -> None:
        self.tail.append(text)
        self.log.write(raw + b"\n")
        if self.rank == 0:
            self.view.text(text)

    def ended(self) -> bool:
        """Whether the process has ended; takes in its last words the first time."""
        if self.code is None and (code := self.process.poll()) is not None:
            self.code = code
            self.read_all()
        return self.code is not None

    def send(self, number: int) -> None:
        if self.code is None:
            try:
                os.kill(self.process.pid, number)
            except ProcessLookupError:
                pass

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass

    def group(self) -> bool:
        """Whether any process of its group is left."""
        try:
            os.killpg(self.process.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def close(self) -> None:
        self.read_all()
        os.close(self.pipe)
        self.log.close()

    def failure(self) -> Failure:
        """What is known of why this rank ended as it did."""
        if self.code < 0:
            name = signal.Signals(-self.code).name
            hint = "the kernel ends processes this way when memory runs out" if name == "SIGKILL" else None
            return Failure(self.rank, None, name, f"rank {self.rank} was ended by {name}", hint, _traceback(self.tail),
                           True)
        if self.error:
            return Failure(self.rank, self.code, None, self.error["message"], self.error.get("hint"), None,
                           self.error.get("retry", True))
        trace = _traceback(self.tail)
        last = next((line for line in reversed(self.tail) if line.strip()), "it said nothing")
        return Failure(self.rank, self.code, None, f"rank {self.rank} ended with exit code {self.code}: {last}",
                       None, trace, True)


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
            early = rank.code in (-signal.SIGTERM, -signal.SIGUSR2) or any(r.code == PREEMPTED for r in ranks)
            stopped = rank.code in (0, PREEMPTED) or (asked is not None and early)
            if not stopped and first is None and not (overdue or abrupt or elsewhere):
                first = rank.failure()
                deadline = _end_others(ranks, plan)
                peers.tell({"failure": first.as_dict()})
            elif plan.batch and stopped and rank.code not in (0, PREEMPTED):  # a script's ranks may stop each in its way
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
    finished = all(rank.code == 0 for rank in ranks) and (asked is None or plan.batch is not None)
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


def _traceback(lines: deque[str]) -> str | None:
    """The last Python traceback in these lines."""
    text = list(lines)
    starts = [i for i, line in enumerate(text) if line.startswith("Traceback (most recent call last)")]
    return "\n".join(text[starts[-1]:]) if starts else None


def _die_with(parent: int) -> Callable[[], None] | None:
    """What a child does first so that the kernel kills it when this process dies (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    set_death_signal = 1

    def before_exec() -> None:
        prctl(set_death_signal, signal.SIGKILL, 0, 0, 0)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # SLURM's reaches ranks too, which get SIGTERM from us
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return before_exec


@dataclass(frozen=True)
class StopSignals:
    received: list[int]     # in order, not yet heeded
    wakeup: socket.socket   # readable when one has come, or a child has ended


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Stop signals are recorded and wake the loop, as does a child's end; handlers do nothing else. One
    that this process was started to ignore (nohup) stays ignored."""
    received: list[int] = []
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    before = {n: signal.getsignal(n) for n in (*STOP_SIGNALS, signal.SIGCHLD)}
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        for number in STOP_SIGNALS:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, lambda n, frame: received.append(n))
        signal.signal(signal.SIGCHLD, lambda n, frame: None)
        yield StopSignals(received, ours)
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        ours.close()
        theirs.close()
