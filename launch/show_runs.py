"""Runs as plain text: the table of all, the details of one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from unicodedata import combining, east_asian_width

from trainers.events import duration, metrics_line, number

COLUMNS = ("RUN", "TASK", "STATE", "STEP", "UPDATED", "METRICS")


def table(rows: Sequence[dict[str, Any]], width: int | None = None) -> str:
    """One line a run, cut at `width` columns (None: the terminal's, 80 if there is none)."""
    if not rows:
        return "no runs"
    width = width or shutil.get_terminal_size().columns
    cells = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(map(_width, column)) for column in zip(*cells)]
    return "\n".join(_cut("  ".join(map(_pad, line, widths)).rstrip(), width) for line in cells)


def details(status: dict[str, Any]) -> str:
    """What `launch.runs.status` found, for a person."""
    progress = _step(status)
    if status["loss"] is not None:
        progress += f", loss {number(status['loss'])}"
    if status["rate"] is not None and status["state"] == "running":
        progress += f", {status['rate']:,.0f} samples or tokens a second"
    job = status["job"]
    facts = {
        "run": status["id"],
        "task": status["task"],
        "state": "lost (its processes are gone and nobody said why)" if status["state"] == "lost" else status["state"],
        "step": progress,
        "metrics": metrics_line(status["metrics"] or {}),
        "process": f"{job['pid']} on {job['host']}" if job and status["state"] in ("submitted", "running") else "",
        "created": f"{_local(status['created'])} ({_ago(status['created'])})",
        "updated": f"{_local(status['updated'])} ({_ago(status['updated'])})",
        "folder": status["path"],
        "log": status["log"],
        "checkpoint": status["checkpoint_path"],
    }
    lines = [f"{name:<12}{value}" for name, value in facts.items() if value]
    for attempt in status["attempts"]:
        lines.append(f"{'attempt ' + str(attempt['attempt']):<12}{_attempt(attempt)}")
    if failure := status["failure"]:
        lines += ["", f"failure     {_failure(failure)}"]
        if failure.get("hint"):
            lines.append(f"hint        {failure['hint']}")
        if failure.get("traceback"):
            lines += [" " * 12 + line for line in failure["traceback"].rstrip().splitlines()]
    if status["next"]:
        lines.append("")
        lines += [f"{'next' if first else '':<12}{command}"
                  for first, command in zip([True] + [False] * len(status["next"]), status["next"])]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    said = row.get("problem") or metrics_line(row.get("metrics") or {})
    return row["id"], row["task"] or "-", row["state"], _step(row), _ago(row.get("updated")), said


def _step(row: dict[str, Any]) -> str:
    if row["step"] is None:
        return "-"
    return f"{row['step']}/{row['total']}" if row.get("total") else str(row["step"])


def _attempt(attempt: dict[str, Any]) -> str:
    said = attempt["outcome"]
    if attempt.get("exit_code") is not None:
        said += f", exit code {attempt['exit_code']}"
    if attempt.get("ranks"):
        said += f", {attempt['ranks']} rank(s) on {attempt['device']}, host {attempt['host']}"
    if attempt.get("began"):
        said += f", {_local(attempt['began'])}"
        if attempt.get("ended"):
            took = datetime.fromisoformat(attempt["ended"]) - datetime.fromisoformat(attempt["began"])
            said += f", took {duration(took.total_seconds())}"
    return said


def _failure(failure: dict[str, Any]) -> str:
    if failure.get("signal"):
        how = f"was ended by {failure['signal']}"
    else:
        how = f"ended with exit code {failure['exit_code']}"
    rank = "a rank" if failure.get("rank") is None else f"rank {failure['rank']}"
    return f"{rank} {how}" + (f": {failure['message']}" if failure.get("message") else "")


def _local(time: str | None) -> str:
    return datetime.fromisoformat(time).astimezone().strftime("%Y-%m-%d %H:%M:%S") if time else "?"


def _ago(time: str | None) -> str:
    if not time:
        return "-"
    seconds = max(0, int((datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


def _width(text: str) -> int:
    """Columns on a terminal: Chinese characters take two."""
    if text.isascii():
        return len(text)
    return sum(0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in text)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def _cut(text: str, width: int) -> str:
    if _width(text) <= width:
        return text
    while _width(text) >= width:
        text = text[:-1]
    return text + "…"
