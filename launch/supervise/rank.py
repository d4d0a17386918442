"""One rank: its process, its pipe, its log, and the end of what it printed."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Callable, Literal, Mapping, Protocol

from launch.plan.plan import Plan
from launch.supervise.terminal import View
from trainers.contract import events, heartbeat
from trainers.contract.paths import RunPaths
from trainers.contract.text import last_traceback

PARTIAL_AFTER_S = 0.5
READ_BYTES = 1 << 16
TAIL_LINES = 400
MESSAGE_LINES = 20  # of an exception, after its first


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
        """What they have said since: {"failure"}, {"signal"}, what launch/supervise/watchdog.py lists, or {"lost"}: one has gone
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
        trace = last_traceback("\n".join(self.tail), MESSAGE_LINES)
        if self.code < 0:
            name = signal.Signals(-self.code).name
            hint = "the kernel ends processes this way when memory runs out" if name == "SIGKILL" else None
            return Failure(self.rank, None, name, f"rank {self.rank} was ended by {name}", hint, trace, True)
        if self.error:
            return Failure(self.rank, self.code, None, self.error["message"], self.error.get("hint"), None,
                           self.error.get("retry", True))
        last = next((line for line in reversed(self.tail) if line.strip()), "it said nothing")
        return Failure(self.rank, self.code, None, f"rank {self.rank} ended with exit code {self.code}: {last}",
                       None, trace, True)


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
