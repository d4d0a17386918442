"""What ranks have printed, of all attempts in order, and as it comes; and what node processes have."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launch.cluster import reasons
from launch.records.read import node_logs
from launch.records.run import Run
from launch.records.state import ACTIVE, Seen, Truth, ask, truth_of
from trainers.contract.errors import UserError

POLL_S = 0.2
ASK_S = {"running": 30.0}  # from asking SLURM to asking again, by the recorded state
ASK_OFTEN_S = 5.0          # in any other


def follow(run: Run, *, rank: int | None = None, attempt: int | None = None, node: int | None = None,
           follow: bool = False, write: Callable[[str], Any]) -> None:
    """Write the log of a rank (of rank 0 unless told), with a line between attempts, or of a node process, with a
    line between jobs; with `follow` go on until the run has ended, through requeues. Ctrl-C ends it.

    Args:
        write: takes text with its line end, as `sys.stdout.write` does.

    Raises:
        UserError: there is no such attempt, rank or node.
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
    """The same as {"attempt", "rank", "line"}, one a line; of a node process as {"job", "node", "line"}. While the
    run waits in SLURM's queue, once {"attempt", "waiting": for what}.

    Raises:
        UserError: there is no such attempt, rank or node.
    """
    watch = Watch(run, follow)
    if node is not None:
        if rank is not None or attempt is not None:
            raise UserError("a node's log is of all its ranks and attempts", "leave out either `--node` or the others")
        yield from _node_lines(run, node, watch)
        return
    rank = 0 if rank is None else rank
    numbers = run.paths.attempt_numbers()
    if attempt is not None and attempt not in numbers:
        raise UserError(f"run `{run.id}` has no attempt {attempt}", f"it has {_listed(numbers, 'attempt')}")
    chosen = numbers if attempt is None else [attempt]
    if not any(rank in run.paths.logs(number) for number in chosen) and not watch.going():
        there = sorted({found for number in chosen for found in run.paths.logs(number)})
        where = "" if attempt is None else f" in attempt {attempt}"
        raise UserError(f"run `{run.id}` has no log of rank {rank}{where}",
                        f"it has {_listed(there, 'rank')}" + ("" if there else _elsewhere(run)))

    number = chosen[0] if chosen else None
    while True:
        if number is not None:
            for line in _grow(run.paths.log(number, rank), lambda: watch.working(number)):
                yield {"attempt": number, "rank": rank, "line": line}
        if attempt is not None:
            return
        told = over = False
        while True:
            # The state is read before the attempts: one that is not at work begins no other.
            going = watch.going()
            later = [other for other in run.paths.attempt_numbers() if number is None or other > number]
            if later:
                break
            if not told and (why := watch.waiting()):
                told = True
                ended = f"attempt {number} ended: {watch.run.record['state']}; " if number else ""
                yield {"attempt": number, "waiting": ended + why}
            if not going and (over or not watch.follow):
                return
            over = not going  # and still so at the next look: after a failure another attempt may begin at once
            time.sleep(POLL_S)
        number = later[0]


class Watch:
    """Whether a run goes on, asked often: its record is read each time, SLURM asked seldom."""

    def __init__(self, run: Run, follow: bool):
        self.run, self.follow = run, follow
        self._seen, self._asked = Seen(), float("-inf")
        self._truth: Truth | None = None

    def going(self) -> bool:
        """Whether it is at work, or waits in the queue to be."""
        if not self.follow:
            return False
        truth = self._look()
        return truth.state in ACTIVE or bool(truth.jobs) or truth.stale

    def working(self, attempt: int) -> bool:
        """Whether this attempt may still be at work."""
        if not self.follow or self.run.paths.attempt_numbers()[-1] > attempt:
            return False
        return self._look().state in ACTIVE

    def waiting(self) -> str | None:
        """What it waits for in SLURM's queue, by what was found last; or why that is not known."""
        truth = self._truth
        if truth and truth.blind:
            return truth.note
        if not truth or not truth.jobs or not all(job.waiting for job in truth.jobs):
            return None

        return f"waiting in the queue: {reasons.told(truth.jobs[0].reason)}"

    def _look(self) -> Truth:
        self.run = self.run.again()
        if time.monotonic() > self._asked + ASK_S.get(self.run.record["state"], ASK_OFTEN_S):
            self._seen, self._asked = ask([self.run.record]), time.monotonic()
            self.run = self.run.again()  # what ended meanwhile says so in its record
        self._truth = truth_of(self.run, self._seen)
        return self._truth


def _node_lines(run: Run, node: int, watch: Watch) -> Iterator[dict[str, Any]]:
    """The logs of a node's processes, job after job: SLURM appends those of a requeued job to one file."""
    found = node_logs(run)
    if not any(log.node == node for log in found) and not watch.going():
        raise UserError(f"run `{run.id}` has no job log of node {node}",
                        f"it has {_listed(sorted({log.node for log in found}), 'node')}")
    done: set[Path] = set()
    while True:
        going = watch.going()
        for log in node_logs(run):
            if log.node != node or log.path in done:
                continue
            done.add(log.path)

            def last() -> bool:
                return watch.going() and not any(other.node == node and other.path not in done for other in node_logs(run))

            for line in _grow(log.path, last):
                yield {"job": log.job, "node": node, "line": line}
        if not going:
            return
        time.sleep(POLL_S)


def _elsewhere(run: Run) -> str:
    """Where there are words of a run whose ranks have said none."""
    found = [log for log in node_logs(run) if log.path.stat().st_size]
    return f"; its job said something: `launch logs {run.id} --node {found[-1].node}`" if found else ""


def _grow(file: Path, working: Callable[[], bool]) -> Iterator[str]:
    """The lines of one log; while its writer is at work, those to come too."""
    position, rest = 0, b""
    while True:
        # Asked before reading: nothing is written after the end, so this reading then is the last.
        ended = not working()
        data = _read(file, position)
        position += len(data)
        *whole, rest = (rest + data).split(b"\n")
        yield from map(_decoded, whole)
        if ended:
            if rest:
                yield _decoded(rest)
            return
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
    """'rank 0', 'ranks 0 to 3', 'no rank yet'."""
    if not numbers:
        return f"no {what} yet"
    return f"{what} {numbers[0]}" if len(numbers) == 1 else f"{what}s {numbers[0]} to {numbers[-1]}"
