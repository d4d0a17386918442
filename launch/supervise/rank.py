"""One rank: its process, the pipe of its output, its log, and the last lines that it printed."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Literal, Mapping, Protocol

from launch.plan.plan import Plan
from launch.records.process import stat
from launch.supervise.terminal import View
from trainers.contract import events, exit_codes, heartbeat
from trainers.contract.paths import RunPaths
from trainers.contract.text import last_state, last_traceback, whole_characters

PARTIAL_AFTER_S = 0.5  # an unfinished line is shown after this time
READ_BYTES = 1 << 16
LAST_READS = 32        # at most, of the output of a rank that has ended
TAIL_LINES = 400
COMMAND_CHARS = 80     # of a process's command line, in a message
MESSAGE_CHARS = 500    # of the last line that a rank printed, in an error message
# Last lines of a script that would fail in the same way again: Python cannot compile it, or argparse refuses its arguments.
UNCOMPILABLE = re.compile(r"(SyntaxError|IndentationError|TabError): ")
REFUSED, REFUSED_CODE = re.compile(r"\S+: error: "), 2  # other programs print such lines too, but exit with another code
LINE_CHARS = 4_000     # of each line that is kept for the record; the log has the whole line


@dataclass(frozen=True)
class Failure:
    """The first failure of an attempt, and what is known about its cause."""

    rank: int | None          # None: no rank failed; a node process is gone, for example
    exit_code: int | None     # None if a signal ended the rank
    signal: str | None
    message: str
    hint: str | None
    traceback: str | None
    retry: bool               # whether another attempt may succeed
    node: str | None = None   # the host, if the job has several nodes

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """How the ranks of one node, or of all nodes, ended.

    The kind "ended" is for one node only: its ranks were stopped because ranks of another node had failed.
    """

    kind: Literal["finished", "failed", "preempted", "killed", "ended"]
    failure: Failure | None = None
    signal: str | None = None           # the signal that asked for the stop
    checkpoint_s: float | None = None   # duration of the slowest checkpoint
    note: str | None = None             # what went wrong although the attempt did not fail


class Peers(Protocol):
    """The node processes of the other nodes."""

    def sockets(self) -> list[socket.socket]:
        """Return the sockets on which their messages arrive."""

    def send(self, message: Mapping[str, Any], /) -> None:
        """Send a message to all of them."""

    def beat(self) -> None:
        """Tell them that this process is alive, if it is time to. `receive` does so too."""

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived since the last call.

        The keys that a supervisor handles: "failure" (a rank failed there), "signal" (a stop signal arrived there), "lost"
        (the node process is gone), and the keys that launch/supervise/watchdog.py lists.
        """


class Alone:
    """The peers of a job on one node: none."""

    def sockets(self) -> list[socket.socket]:
        return []

    def send(self, message: Mapping[str, Any], /) -> None: ...

    def beat(self) -> None: ...

    def receive(self) -> list[dict[str, Any]]:
        return []


class LogFile:
    """A rank's log. While the file cannot be written (a full disk), keep the newest mebibyte and retry."""

    KEPT_BYTES = 2**20

    def __init__(self, path: Path, warn: Callable[[str], None]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._path, self._warn, self._unwritten = path, warn, b""
        self._why: str | None = None  # the error of the last write

    def write(self, data: bytes) -> None:
        self._unwritten += data
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten):]
            self._why = None
        except OSError as error:
            self._unwritten = self._unwritten[-self.KEPT_BYTES:]
            if not self._why:
                self._warn(f"{self._path} cannot be written: {error.strerror}; the run continues")
            self._why = error.strerror

    @property
    def problem(self) -> str | None:
        """Why the last output is not in the file."""
        return f"{self._path} cannot be written: {self._why}" if self._why else None

    def close(self) -> None:
        self.write(b"")
        os.close(self._file)


class Rank:
    """One rank: its process, the pipe of its output, its log, and the last lines that it printed."""

    def __init__(self, plan: Plan, node: int, local_rank: int, address: str, port: int, node_env: Mapping[str, str],
                 paths: RunPaths, view: View, stdin: int | None):
        env = plan.rank_env(node, local_rank, address, port)
        self.rank = int(env["RANK"])
        self.view = view
        self.log = LogFile(paths.log(plan.attempt, self.rank), view.notice)
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.error: dict[str, Any] | None = None  # the `error` event, if the rank sent one
        self.code: int | None = None              # as of Popen.returncode: -N if signal N ended the process
        self.output_closed = False
        self.checkpoint_s: float | None = None    # duration of the slowest checkpoint
        self.unsaved: str | None = None           # the warning about the last checkpoint, if it could not be written
        self._partial, self._partial_since = b"", 0.0
        beats: int | None = None
        self.page: memoryview | None = None
        if plan.batch:  # a script has no loop of ours that gives signs of life
            beats, self.page = heartbeat.new_page()
            env[heartbeat.VARIABLE] = str(beats)
        self.pipe, child = os.pipe()
        os.set_blocking(self.pipe, False)
        try:
            # A session of its own, as under torchrun: the terminal would stop a mere process group that reads from it.
            self.process = subprocess.Popen(
                plan.command, env={**plan.inherited(os.environ), **node_env, **plan.env, **env}, cwd=plan.cwd,
                stdin=stdin, stdout=child, stderr=child, start_new_session=True, preexec_fn=_die_with(os.getpid()),
                pass_fds=() if beats is None else (beats,),
            )
        finally:
            os.close(child)
            if beats is not None:
                os.close(beats)

    def read(self) -> bool:
        """Read some of the rank's output. Return False if there is no more at present, or none will come."""
        try:
            data = os.read(self.pipe, READ_BYTES)
        except BlockingIOError:
            return False
        self.output_closed = not data
        if not self._partial:
            self._partial_since = time.monotonic()
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            self._handle_line(line)
            self._partial_since = time.monotonic()
        return bool(data)

    def read_all(self) -> None:
        """Read the last output of a rank that has ended.

        The number of reads is limited: a process that the rank has started may still write to the pipe.
        """
        for _ in range(LAST_READS):
            if not self.read():
                break
        self.show_partial(older_than_s=0.0)

    def show_partial(self, older_than_s: float) -> None:
        """Show a line that has had no line end for `older_than_s` seconds, such as the line of a progress bar."""
        waiting = self._partial and time.monotonic() - self._partial_since >= older_than_s
        if waiting and events.SEPARATOR.encode() not in self._partial:
            raw, self._partial = whole_characters(self._partial) if older_than_s else (self._partial, b"")
            text = raw.decode(errors="replace")
            self.tail.append(last_state(text)[:LINE_CHARS])
            self._log(raw, b"")
            if self.rank == 0:
                self.view.partial(text)
            self._partial_since = time.monotonic()

    def _log(self, raw: bytes, end: bytes) -> None:
        """Write to the log. Of a line that was overwritten with carriage returns, only the last state stays."""
        if b"\r" in raw:
            raw = b"\r" * raw.startswith(b"\r") + last_state(raw.decode(errors="replace")).encode()
        self.log.write(raw + end)

    def _handle_line(self, raw: bytes) -> None:
        text = raw.decode(errors="replace")
        # Another thread of the rank may have printed an unfinished line before the event.
        before, separator, after = text.partition(events.SEPARATOR)
        event = events.parse(separator + after) if separator else None
        try:
            plain = events.line(event) if event else None
        except (KeyError, TypeError, ValueError):  # a script printed something that only looks like an event
            plain = None
        if event is None or plain is None:
            self._handle_text(raw, text)
            return
        if before:
            self._handle_text(before.encode(), before)
        if event["event"] == "error":
            self.error = event
        if event["event"] == "checkpoint":
            self.checkpoint_s = max(self.checkpoint_s or 0.0, event["seconds"] + event["stall_s"])
            self.unsaved = None
        if event["event"] == "note" and event.get("unsaved") is not None:
            self.unsaved = event["message"]
        self.log.write(plain.encode() + b"\n")
        if self.rank == 0:
            self.view.event(event)

    def _handle_text(self, raw: bytes, text: str) -> None:
        self.tail.append(last_state(text)[:LINE_CHARS])
        self._log(raw, b"\n")
        if self.rank == 0:
            self.view.text(text)

    @property
    def problem(self) -> str | None:
        """What goes wrong while the rank runs on: its checkpoints, or its log, cannot be written."""
        return self.unsaved or self.log.problem

    def ended(self) -> bool:
        """Return whether the process has ended. The first time, read its last output.

        The process stays a zombie until `close`: meanwhile the kernel gives its number to no other process, so that a signal to
        its group cannot reach strangers.
        """
        if self.code is None:
            end = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if end is not None:
                self.code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
                self.read_all()
        return self.code is not None

    def completed(self, stop_asked: bool) -> bool:
        """Return whether the process has ended as it should: its work is done, or it stopped as asked.

        Exit code 0 alone does not tell: code of a task, or a library, may call `os._exit(0)`. A rank of a task says so in its
        heartbeat. A script cannot say it; its exit code 75 counts only if the script was asked to stop.
        """
        if self.code not in (exit_codes.FINISHED, exit_codes.PREEMPTED):
            return False
        if self.page is not None:
            return self.page[heartbeat.ENDED] == 1
        return self.code == exit_codes.FINISHED or stop_asked

    def left_early(self) -> bool:
        """Return whether a rank of a task has ended with exit code 0 before its work was done."""
        return self.code == exit_codes.FINISHED and self.page is not None and not self.page[heartbeat.ENDED]

    def send(self, number: int) -> None:
        """Send a signal to the process, unless the process is known to have ended."""
        if self.code is None:
            try:
                os.kill(self.process.pid, number)
            except ProcessLookupError:
                pass

    def send_group(self, number: int, left_behind: bool = False) -> None:
        """Send a signal to the process and all other processes of its group, as Ctrl-C in a terminal does.

        Args:
            left_behind: also to the group of a process that is known to have ended.
        """
        if self.code is None or left_behind:
            try:
                os.killpg(self.process.pid, number)
            except (ProcessLookupError, PermissionError):
                pass

    def kill(self) -> None:
        """Kill the process and all other processes of its group."""
        self.send_group(signal.SIGKILL, left_behind=True)

    def close(self) -> None:
        """Kill what is left of the process group, and release everything."""
        self.kill()
        self.process.wait()
        self.read_all()
        os.close(self.pipe)
        self.log.close()

    def failure(self) -> Failure:
        """Return what is known about why this rank ended. The rank must have ended."""
        assert self.code is not None
        trace = last_traceback("\n".join(self.tail), to_end=True)
        if self.code < 0:
            name = signal.Signals(-self.code).name
            hint = "the kernel ends processes with SIGKILL when memory runs out" if name == "SIGKILL" else None
            return Failure(self.rank, None, name, f"rank {self.rank} was ended by {name}", hint, trace, True)
        if self.error:
            return Failure(self.rank, self.code, None, self.error["message"], self.error.get("hint"), None,
                           self.error.get("retry", True))
        if self.left_early():
            return Failure(self.rank, self.code, None, f"rank {self.rank} ended with exit code 0 before its work was done",
                           "code of the task, or a library that it uses, has ended the process: look for os._exit", None, True)
        last = next((line for line in reversed(self.tail) if line.strip()), "it printed nothing")[:MESSAGE_CHARS]
        return Failure(self.rank, self.code, None, f"rank {self.rank} ended with exit code {self.code}: {last}",
                       None, trace, not repeats(last, self.code))


def repeats(last: str, code: int) -> bool:
    """Return whether a script with this last line of output and this exit code would fail in the same way again."""
    return bool(UNCOMPILABLE.match(last) or code == REFUSED_CODE and REFUSED.match(last))


def processes_of_groups(groups: Collection[int]) -> dict[int, list[str]]:
    """Return the processes of these process groups that are not zombies, each as its id and its command, by group."""
    found: dict[int, list[str]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, of_group, *_ = stat(int(folder.name))
            if int(of_group) in groups and state != "Z":
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found.setdefault(int(of_group), []).append(f"{folder.name} ({words[:COMMAND_CHARS]})")
        except (OSError, ValueError):  # the process has ended
            continue
    return found


def _die_with(parent: int) -> Callable[[], None] | None:
    """Return what a child runs before exec so that the kernel kills it when this process dies; None if not on Linux."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    set_death_signal = 1

    def before_exec() -> None:
        prctl(set_death_signal, signal.SIGKILL, 0, 0, 0)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # SLURM sends SIGUSR2 to ranks too; we send them SIGTERM instead
        if os.getppid() != parent:  # the parent died before prctl
            os._exit(1)

    return before_exec
