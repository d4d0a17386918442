"""The logs of ranks and node processes, of all attempts in order. They can be followed while the run writes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from launch.cluster import reasons
from launch.records.naming import command_name
from launch.records.read import node_logs
from launch.records.run import Run
from launch.records.state import ACTIVE, SlurmAnswer, Truth, ask, truth_of
from trainers.contract.errors import UserError

POLL_S = 0.2
QUIET_S = 1.0              # after so long without a line, say what is waited for
ASK_S = {"running": 30.0}  # seconds between two questions to SLURM, by the recorded state of the run
ASK_OFTEN_S = 5.0          # the same in any other state
ASK_AGAIN_S = 1.0          # the same when the record has changed since the last answer


def follow(run: Run, *, rank: int | None = None, attempt: int | None = None, node: int | None = None,
           follow: bool = False, write: Callable[[str], Any]) -> None:
    """Write the log of a rank, with a line between attempts, or of a node process, with a line between jobs. Ctrl-C ends it.

    Args:
        rank: by default rank 0.
        attempt: by default all attempts.
        node: write the log of this node's process instead of a rank's.
        follow: continue until the run has ended, also when its job is requeued.
        write: takes text with its line end, as `sys.stdout.write` does.

    Raises:
        UserError: the attempt, rank or node does not exist, or `node` is given together with `rank` or `attempt`.
    """
    last = None
    try:
        for line in lines(run, rank=rank, attempt=attempt, node=node, follow=follow):
            if "waiting" in line:
                write(f"--- {line['waiting']} ---\n")
                continue
            part = f"attempt {line['attempt']}" if node is None else f"job {line['job']}"
            if last is not None and part != last:
                write(f"--- {part} ---\n")
            last = part
            write(line["line"] + "\n")
    except KeyboardInterrupt:
        pass


def lines(run: Run, *, rank: int | None = None, attempt: int | None = None, node: int | None = None,
          follow: bool = False) -> Iterator[dict[str, Any]]:
    """The lines that `follow` writes, as {"attempt", "rank", "line"}, or as {"job", "node", "line"} for a node process.
    While nothing is printed, {"attempt", "waiting": what the run waits for} comes in between, whenever that changes.

    Raises:
        UserError: the attempt, rank or node does not exist, or `node` is given together with `rank` or `attempt`.
    """
    watch = Watch(run, follow)
    if node is not None:
        if rank is not None or attempt is not None:
            raise UserError("the log of a node covers all its ranks and attempts",
                            "leave out `--node`, or `--rank` and `--attempt`")
        yield from _node_lines(run, node, watch)
        return
    rank = 0 if rank is None else rank
    numbers = run.paths.attempt_numbers()
    if attempt is not None and attempt not in numbers:
        raise UserError(f"run `{run.id}` has no attempt {attempt}", f"it has {_listed(numbers, 'attempt')}")
    chosen = numbers if attempt is None else [attempt]
    if not any(rank in run.paths.logs(number) for number in chosen) and not watch.going():
        existing = sorted({logged for number in chosen for logged in run.paths.logs(number)})
        where = "" if attempt is None else f" in attempt {attempt}"
        raise UserError(f"run `{run.id}` has no log of rank {rank}{where}",
                        f"it has {_listed(existing, 'rank')}" + ("" if existing else _node_log_hint(run)))

    number = chosen[0] if chosen else None
    while True:
        if number is not None:
            for line in _grow(run.paths.log(number, rank), partial(watch.working, number)):
                yield {"attempt": number, "rank": rank, "line": line} if line is not None else {
                    "attempt": number, "waiting": f"attempt {number} has begun; rank {rank} has not printed anything yet"}
        if attempt is not None:
            return
        reported, over, since = None, False, time.monotonic()
        while True:
            # The state is read before the attempts: once the run has ended, it starts no other attempt.
            going = watch.going()
            later = [other for other in run.paths.attempt_numbers() if number is None or other > number]
            if later:
                break
            why = watch.waiting() if going and time.monotonic() > since + QUIET_S else None
            if why and why != reported:
                ended = f"attempt {number} has ended; " if number and not reported else ""
                reported = why
                yield {"attempt": number, "waiting": ended + why}
            if not going and (over or not watch.follow):
                return
            over = not going  # look once more before ending: after a failure the next attempt may start at once
            time.sleep(POLL_S)
        number = later[0]


class Watch:
    """A view of a run's state that may be asked often. It reads the run's record each time and asks SLURM seldom."""

    def __init__(self, run: Run, follow: bool):
        self.run, self.follow = run, follow
        self._seen, self._asked = SlurmAnswer(), float("-inf")
        self._truth: Truth | None = None

    def going(self) -> bool:
        """Whether the run is running or waits in the queue. False if nobody follows the run."""
        if not self.follow:
            return False
        truth = self._look()
        return truth.state in ACTIVE or bool(truth.jobs) or truth.stale

    def working(self, attempt: int) -> bool:
        """Whether this attempt may still be running. False if nobody follows the run.

        An attempt has ended when its own record says so. The state of the run alone does not tell: at the beginning of an
        attempt, it may still be that of the attempt before.
        """
        if not self.follow or self.run.paths.attempt_numbers()[-1] > attempt:
            return False
        outcome = self.run.attempt_record(attempt)["outcome"]
        if outcome not in ("running", "unreadable"):
            return False
        truth = self._look()
        if self.run.record["attempt"] < attempt:  # its process is about to write the run's record
            return self.going()
        return truth.state in ACTIVE

    def waiting(self) -> str | None:
        """What the run waits for, or why that is not known; None if there is nothing to say. As of the last look."""
        truth = self._truth
        if truth is None or truth.stale:
            return None
        if truth.note:
            return truth.note
        if not truth.jobs:
            return "waiting for its turn" if truth.state == "submitted" else None
        if all(job.waiting for job in truth.jobs):
            return f"waiting in the queue: {reasons.in_words_with_code(truth.jobs[0].reason)}"
        job = next(job for job in truth.jobs if not job.waiting)
        number = max(self.run.paths.attempt_numbers(), default=0) + 1
        return f"job {job.id} runs on {job.node_list}; attempt {number} is being started"

    def _look(self) -> Truth:
        self.run = self.run.reread()
        passed_s = time.monotonic() - self._asked
        changed = self._truth is not None and self._truth.stale and passed_s > ASK_AGAIN_S
        if changed or passed_s > ASK_S.get(self.run.record["state"], ASK_OFTEN_S):
            self._seen, self._asked = ask([self.run.record]), time.monotonic()
            self.run = self.run.reread()  # a run that has ended meanwhile has said so in its record
        self._truth = truth_of(self.run, self._seen)
        return self._truth


def _node_lines(run: Run, node: int, watch: Watch) -> Iterator[dict[str, Any]]:
    """The lines of a node's logs, job after job. A requeued job has one log: SLURM appends to it."""
    logs = node_logs(run)
    if not any(log.node == node for log in logs) and not watch.going():
        raise UserError(f"run `{run.id}` has no job log of node {node}",
                        f"it has {_listed(sorted({log.node for log in logs}), 'node')}")
    done: set[Path] = set()
    while True:
        going = watch.going()
        for log in node_logs(run):
            if log.node != node or log.path in done:
                continue
            done.add(log.path)

            def is_last() -> bool:
                return watch.going() and not any(other.node == node and other.path not in done for other in node_logs(run))

            for line in _grow(log.path, is_last):
                if line is not None:
                    yield {"job": log.job, "node": node, "line": line}
        if not going:
            return
        time.sleep(POLL_S)


def _node_log_hint(run: Run) -> str:
    """The end of a hint that names a node's log, for a run without any rank's log."""
    logs = [log for log in node_logs(run) if log.path.stat().st_size]
    return f"; its job printed something: `launch logs {command_name(run.paths)} --node {logs[-1].node}`" if logs else ""


def _grow(file: Path, working: Callable[[], bool]) -> Iterator[str | None]:
    """The lines of one log, also those that are written later, as long as `working` says that the writer runs.

    One None comes before the first line if that line is late.
    """
    position, rest, silent_since = 0, b"", time.monotonic()
    told = False
    while True:
        # Ask before reading. A writer that has ended writes nothing more, and this reading is the last.
        ended = not working()
        data = _read(file, position)
        position += len(data)
        *whole, rest = (rest + data).split(b"\n")
        yield from map(_decoded, whole)
        if ended:
            if rest:
                yield _decoded(rest)
            return
        if not position and not told and time.monotonic() > silent_since + QUIET_S:
            told = True
            yield None
        if not data:
            time.sleep(POLL_S)


def _read(file: Path, position: int) -> bytes:
    try:
        with open(file, "rb") as opened:
            opened.seek(position)
            return opened.read()
    except FileNotFoundError:
        return b""


def _decoded(line: bytes) -> str:
    return line.decode("utf-8", "replace")


def _listed(numbers: list[int], what: str) -> str:
    """The numbers in words: 'rank 0', 'ranks 0 to 3' or 'no rank yet'."""
    if not numbers:
        return f"no {what} yet"
    return f"{what} {numbers[0]}" if len(numbers) == 1 else f"{what}s {numbers[0]} to {numbers[-1]}"
