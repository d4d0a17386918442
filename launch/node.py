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
from typing import Any, Callable, Iterator, Literal

from launch.plan import Plan
from launch.view import View
from trainers import events
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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    kind: Literal["finished", "failed", "preempted", "killed"]
    failure: Failure | None = None
    signal: str | None = None  # what asked for the stop


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

    def __init__(self, plan: Plan, node: int, local_rank: int, address: str, port: int, paths: RunPaths, view: View):
        env = plan.rank_env(node, local_rank, address, port)
        self.rank = int(env["RANK"])
        self.view = view
        self.log = LogFile(paths.log(plan.attempt, self.rank), view.notice)
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.error: dict[str, Any] | None = None
        self.code: int | None = None
        self.silent = False  # whether it has closed its output
        self._partial, self._partial_since = b"", 0.0
        self.pipe, child = os.pipe()
        os.set_blocking(self.pipe, False)
        try:
            self.process = subprocess.Popen(
                plan.command, env={**plan.inherited(os.environ), **plan.env, **env}, cwd=plan.cwd, stdin=subprocess.DEVNULL,
                stdout=child, stderr=child, process_group=0, preexec_fn=_die_with(os.getpid()),
            )
        finally:
            os.close(child)

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


def supervise(plan: Plan, paths: RunPaths, view: View, *, node: int = 0, address: str = "127.0.0.1", port: int) -> Outcome:
    """Run this node's ranks of one attempt to their end. From the main thread, whose death ends the ranks."""
    ranks: list[Rank] = []
    with _signals() as (received, wakeup), selectors.DefaultSelector() as selector:
        try:
            selector.register(wakeup, selectors.EVENT_READ)
            for local_rank in range(plan.resources.ranks_per_node):
                ranks.append(Rank(plan, node, local_rank, address, port, paths, view))
                selector.register(ranks[-1].pipe, selectors.EVENT_READ, ranks[-1])
            return _watch(plan, ranks, selector, wakeup, received, view)
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


def _watch(plan: Plan, ranks: list[Rank], selector, wakeup: socket.socket, received: list[int], view: View) -> Outcome:
    first: Failure | None = None
    asked: int | None = None       # the signal that asked for a stop
    deadline: float | None = None  # when the ranks that are left are killed
    abrupt = overdue = False       # a rank that could not yet heed the signal; one that would not
    while True:
        for key, _ in selector.select(0.2 if deadline is None else max(0.0, min(0.2, deadline - time.monotonic()))):
            if key.data is None:
                wakeup.recv(4096)
                continue
            key.data.read()
            if key.data.silent:
                selector.unregister(key.fileobj)
        for rank in ranks:
            rank.show_partial(PARTIAL_AFTER_S)
        running = [rank for rank in ranks if rank.code is None]
        # Of ranks found dead together, one that a signal ended is likelier the cause than one that lost a peer.
        gone = sorted((r for r in running if r.ended()), key=lambda r: r.code >= 0)
        for rank in gone:
            # One that was asked to stop before it could heed that, or that lost a peer which stopped so.
            early = rank.code == -signal.SIGTERM or any(r.code == PREEMPTED for r in ranks)
            stopped = rank.code in (0, PREEMPTED) or (asked is not None and early)
            if not stopped and first is None and not overdue and not abrupt:
                first = rank.failure()
                for other in ranks:
                    other.send(signal.SIGTERM)
                deadline = time.monotonic() + min(FAILURE_GRACE_S, plan.grace_s)
            elif plan.batch and stopped and rank.code not in (0, PREEMPTED):  # a script's ranks may stop each in its way
                abrupt, deadline = True, min(deadline, time.monotonic() + FAILURE_GRACE_S)
        while received:
            number = received.pop(0)
            if asked is not None and number == signal.SIGINT:
                return Outcome("killed", signal="SIGINT")
            if asked is None:
                asked = number
                how = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
                what = "stopping at the next step, with a checkpoint" if plan.batch else "asking the script to stop"
                view.notice(f"{signal.Signals(number).name}: {what}{how}")
                for rank in ranks:
                    rank.send(signal.SIGTERM)
                deadline = deadline or time.monotonic() + plan.grace_s
        running = [rank for rank in ranks if rank.code is None]
        if deadline is not None and time.monotonic() >= deadline and running and not overdue:
            overdue = first is None and not abrupt
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
        return Outcome("failed", first, name)
    return Outcome("finished" if all(rank.code == 0 for rank in ranks) else "preempted", signal=name)


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
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return before_exec


@contextmanager
def _signals() -> Iterator[tuple[list[int], socket.socket]]:
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
        yield received, ours
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        ours.close()
        theirs.close()
