"""The sign of life of a node's supervisor: a small file that the supervisor overwrites every few seconds.

A reader on another host sees by it whether the supervisor still runs, and what the ranks have complained about. The file has
a fixed size and is overwritten in place, because on a full disk it could not be replaced.
"""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainers.contract.clock import utc_now
from trainers.contract.paths import RunPaths

EVERY_S = 10.0
LATE_S = 30.0        # a sign that is older than this is late
BYTES = 4096
PROBLEM_CHARS = 500  # as JSON, up to six bytes each


class LifeSign:
    """Writes the sign of life of one node during one attempt."""

    def __init__(self, file: Path):
        self._file, self._written_at = file, float("-inf")
        self._problem: str | None = None

    def turn(self, problem: str | None) -> None:
        """Write the sign if it is due, or if the problem has changed. An error is ignored: the sign becomes late."""
        if problem == self._problem and time.monotonic() < self._written_at + EVERY_S:
            return
        self._written_at, self._problem = time.monotonic(), problem
        text = json.dumps({"at": utc_now(), "problem": problem and problem[:PROBLEM_CHARS]})
        try:
            self._file.parent.mkdir(exist_ok=True)  # not its parents: the run may have been deleted
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.pwrite(descriptor, text.encode().ljust(BYTES), 0)
            finally:
                os.close(descriptor)
        except OSError:
            pass


def doubt(paths: RunPaths, attempt: int, nodes: list[str]) -> str | None:
    """Return what the signs of life say against an attempt that should be running; None if they are in order or missing.

    Args:
        nodes: the names of the attempt's nodes, or one name for an attempt on one machine.
    """
    signs: dict[str, dict[str, Any]] = {}
    for number, node in enumerate(nodes):
        try:
            signs[node] = json.loads(paths.life_sign(attempt, number).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    late = {node: age_s for node, sign in signs.items() if (age_s := _age_s(sign["at"])) > LATE_S}
    if late:
        words = [f"the process on {node} gave its last sign of life {age_s:.0f} s ago" for node, age_s in late.items()]
        return "; ".join(words) + ": it hangs or is stopped, or the node or its file system is down"
    return next((sign["problem"] for sign in signs.values() if sign["problem"]), None)


def _age_s(at: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds()
