"""What ranks have printed, of all attempts in order, and as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launch.runs import ACTIVE, Run
from trainers.errors import UserError

POLL_S = 0.2


def follow(run: Run, *, rank: int | None = None, attempt: int | None = None, follow: bool = False,
           write: Callable[[str], Any]) -> None:
    """Write the log of a rank (of rank 0 unless told), with a line between attempts; with `follow` go on
    until the run has ended. Ctrl-C ends it.

    Args:
        write: takes text with its line end, as `sys.stdout.write` does.

    Raises:
        UserError: there is no such attempt or rank.
    """
    last = None
    try:
        for line in lines(run, rank=rank, attempt=attempt, follow=follow):
            if last is not None and line["attempt"] != last:
                write(f"--- attempt {line['attempt']} ---\n")
            last = line["attempt"]
            write(line["line"] + "\n")
    except KeyboardInterrupt:
        pass


def lines(run: Run, *, rank: int | None = None, attempt: int | None = None,
          follow: bool = False) -> Iterator[dict[str, Any]]:
    """The same as {"attempt", "rank", "line"}, one a line.

    Raises:
        UserError: there is no such attempt or rank.
    """
    rank = 0 if rank is None else rank
    active = follow and run.state in ACTIVE
    numbers = run.paths.attempt_numbers()
    if attempt is not None and attempt not in numbers:
        raise UserError(f"run `{run.id}` has no attempt {attempt}", f"it has {_listed(numbers, 'attempt')}")
    chosen = numbers if attempt is None else [attempt]
    if not active and not any(rank in run.paths.logs(number) for number in chosen):
        there = sorted({found for number in chosen for found in run.paths.logs(number)})
        where = "" if attempt is None else f" in attempt {attempt}"
        raise UserError(f"run `{run.id}` has no log of rank {rank}{where}", f"it has {_listed(there, 'rank')}")

    number = chosen[0] if chosen else None
    while True:
        if number is not None:
            for line in _grow(run, number, rank, active):
                yield {"attempt": number, "rank": rank, "line": line}
        if attempt is not None:
            return
        # The state is read before the attempts: one that is not at work begins no other.
        active = active and run.again().state in ACTIVE
        later = [other for other in run.paths.attempt_numbers() if number is None or other > number]
        if later:
            number = later[0]
        elif active:
            time.sleep(POLL_S)
        else:
            return


def _grow(run: Run, number: int, rank: int, active: bool) -> Iterator[str]:
    """The lines of one log; while the attempt is at work, those to come too."""
    file, position, rest = run.paths.log(number, rank), 0, b""
    while True:
        # Asked before reading: nothing is written after the end, so this reading then is the last.
        ended = not active or run.paths.attempt_numbers()[-1] > number or run.again().state not in ACTIVE
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
