"""Runs as plain text: a table of all runs, a comparison of the runs of a sweep, the details of one run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from launch.cluster import reasons
from launch.plan.spec import Weights
from launch.records.read import ACTIVE, slow_words
from trainers.contract.clock import local_time
from trainers.contract.events import brief, metrics_line
from trainers.contract.text import duration, number

COLUMNS = ("RUN", "TASK", "STATE", "STEP", "UPDATED", "METRICS")
LEAST_METRICS = 16  # cells for metrics beside the other values of a run
MOST_ID = 28      # cells for an id on a narrow terminal: a short name, the time and the random part
VALUE_WIDTH = 20  # cells for a value that a sweep varies, so that a long path leaves room for the metrics


def table(rows: Sequence[dict[str, Any]], width: int | None = None) -> str:
    """One line per run, then the notes of all runs.

    Rows of a sweep have `overrides`. They are compared: each override that differs, and each metric, gets a column.

    Args:
        rows: from `launch.records.read.list_runs`.
        width: where lines are cut, in cells; None: at the width of the terminal, or at 80 without a terminal.
    """
    if not rows:
        return "no runs"
    ids_by_note: dict[str, list[str]] = {}
    for row in rows:
        if row.get("note"):
            ids_by_note.setdefault(row["note"], []).append(row["id"])
    notes = [f"note: {ids[0] if len(ids) == 1 else f'{len(ids)} runs'}: {note}" for note, ids in ids_by_note.items()]
    from launch.report.columns import columns, terminal_width

    width = terminal_width() if width is None else width
    shown = columns(_comparison(rows), width) if "overrides" in rows[0] else _list(rows, width)
    return "\n".join([shown, *notes])


def _list(rows: Sequence[dict[str, Any]], width: int) -> str:
    """One line per run. Where lines would be too wide, the task is left out. If that leaves too little room for metrics, they
    follow on a line of their own. A long id comes on a line of its own too: the state of every run stays visible."""
    from launch.report.columns import columns, cut, too_wide

    cells = [COLUMNS, *(_cells(row) for row in rows)]
    if not too_wide(cells, width):
        return columns(cells, width)
    room = max(MOST_ID, width // 2)
    narrow = [("" if len(id) > room else id, *values) for id, _, *values, _ in cells]
    beside = width - max(map(len, columns(narrow, sys.maxsize).splitlines())) - 2
    if beside >= LEAST_METRICS:
        narrow = [(*row, _fitting(metrics, beside)) for row, (*_, metrics) in zip(narrow, cells)]
    lines = columns(narrow, width)
    shown = []
    for line, (id, *_, metrics) in zip(lines.splitlines(), cells):
        shown += [cut(id, width)] * (len(id) > room) + [line]
        if beside < LEAST_METRICS and metrics and id != COLUMNS[0]:
            shown.append("  " + cut(metrics, width - 2))
    return "\n".join(shown)


def _fitting(metrics: str, width: int) -> str:
    """As many whole metrics of a line as fit."""
    shown = metrics.split("  ")
    while len(shown) > 1 and len("  ".join(shown)) > width:
        shown = [*shown[:-2], "…"] if shown[-1] == "…" else [*shown[:-1], "…"]
    return "  ".join(shown)


def _comparison(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The header and cells of a sweep's table. The id comes last: long lines are cut there, and the id tells the least."""
    from launch.report.columns import cut  # here, because it imports rich

    values = [dict(override.partition("=")[::2] for override in row["overrides"]) for row in rows]
    keys = list(dict.fromkeys(key for overrides in values for key in overrides))
    differing = [key for key in keys if len({overrides.get(key) for overrides in values}) > 1] or keys
    short_names = [key.rpartition(".")[2] for key in differing]
    heads = [short if short_names.count(short) == 1 else key for key, short in zip(differing, short_names)]
    metrics = list(dict.fromkeys(name for row in rows for name in brief(row.get("metrics") or {})))
    lines = [(*heads, "STATE", "STEP", *metrics, "RUN")]
    for row, overrides in zip(rows, values):
        measured = row.get("metrics") or {}
        lines.append((*(cut(overrides.get(key, "-"), VALUE_WIDTH) for key in differing), _state(row), _step(row),
                      *(number(measured[name]) if name in measured else "-" for name in metrics),
                      row["id"] + (f"  {row['problem']}" if row.get("problem") else "")))
    return lines


def details(status: dict[str, Any]) -> str:
    """The result of `launch.records.read.status` as text for a person."""
    progress = _step(status).strip("-")
    if status["loss"] is not None:
        progress += f", loss {number(status['loss'])}"
    queue, job = status["queue"], status["job"]
    facts = {
        "run": status["id"],
        "task": status["task"],
        "sweep": status.get("sweep"),
        "state": status["state"] + _explained(status),
        "job": _job(status),
        "queue": _place(queue) if queue and queue["reason"] else "",
        "starts": _start(queue) if queue and queue["reason"] else "",
        "step": progress,
        "speed": f"{status['rate']:,.0f} samples or tokens per second" if status["rate"] and status["state"] == "running" else "",
        "slow": "; ".join(map(slow_words, status["slow"])),
        "metrics": _metrics(status["metrics"] or {}),
        "process": f"{job['pid']} on {job['host']}" if job and "pid" in job and status["state"] in ACTIVE else "",
        "weights": _weights(status.get("init")),
        "created": f"{local_time(status['created'])} ({_ago(status['created'])})",
        "updated": f"{local_time(status['updated'])} ({_ago(status['updated'])})",
        "folder": status["path"],
        "log": status["log"],
        "job log": status["job_log"],
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


def _metrics(metrics: dict[str, Any]) -> str:
    """The metrics, without those of single parts, such as `class/ship`: these are only counted."""
    left_out = len(metrics) - len(brief(metrics))
    return metrics_line(brief(metrics)) + (f"  and {left_out} more, of single parts: see metrics.jsonl" if left_out else "")


def _weights(init: dict[str, Any] | None) -> str:
    """The run or file that the first weights came from."""
    if not init:
        return ""
    return f"from {Weights(init['path'], init['run'], init['step'], older=tuple(init.get('older', ())))}"


def _explained(status: dict[str, Any]) -> str:
    """A remark on the state, in parentheses."""
    if status["note"]:
        return f" ({status['note']})"
    if status.get("stopped_early"):
        return f" (stopped early: {status['stopped_early']})"
    return " (its processes are gone, and the reason is not known)" if status["state"] == "lost" else ""


def _job(status: dict[str, Any]) -> str:
    job, queue = status["job"], status["queue"]
    if not job or job["kind"] != "slurm" or not job["ids"]:
        return ""
    text = f"{', '.join(job['ids'])} on cluster {job['cluster']}"
    if queue:
        text += f": {queue['state']}"
        if queue["nodes"]:
            text += f" on {', '.join(queue['nodes'])} since {local_time(queue['start'])}"
    return text


def _place(queue: dict[str, Any]) -> str:
    """The place of a job in the queue, and why the job waits."""
    place = f"place {queue['position']} of {queue['of']} in partition {queue['partition']}: " if queue["position"] else ""
    return place + reasons.in_words_with_code(queue["reason"])


def _start(queue: dict[str, Any]) -> str:
    """When SLURM expects to start a job."""
    if not queue["start"]:
        return "SLURM has no estimate yet"
    seconds = (datetime.fromisoformat(queue["start"]) - datetime.now(UTC)).total_seconds()
    return f"about {local_time(queue['start'])}" + (f", in {_long(seconds)}" if seconds > 0 else "") + ", by SLURM's estimate"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    metrics = row.get("problem") or metrics_line(brief(row.get("metrics") or {}))
    return row["id"], row["task"] or "-", _state(row), _step(row), _ago(row.get("updated")), metrics


def _state(row: dict[str, Any]) -> str:
    return f"{row['state']} early" if row["state"] == "finished" and row.get("stopped_early") else row["state"]


def _step(row: dict[str, Any]) -> str:
    if row["step"] is None or not (row["step"] or row.get("total")):  # before the first step, and of a script: not known
        return "-"
    return f"{row['step']}/{row['total']}" if row.get("total") else str(row["step"])


def _attempt(attempt: dict[str, Any]) -> str:
    text, failure = attempt["outcome"], attempt.get("failure") or {}
    code = failure.get("exit_code")  # of the rank that failed; with several ranks, the command's is 1
    if failure.get("signal"):
        text += f", {'a rank' if failure.get('rank') is None else 'rank ' + str(failure['rank'])} ended by {failure['signal']}"
    elif (code := attempt.get("exit_code") if code is None else code) is not None:
        text += f", exit code {code}"
    if attempt.get("ranks"):
        text += f", {attempt['ranks']} rank(s) on {attempt['device']}, "
        text += f"job {attempt['job']} on {', '.join(attempt['nodes'])}" if attempt.get("job") else f"host {attempt['host']}"
    if attempt.get("began"):
        text += f", {local_time(attempt['began'])}"
        if attempt.get("ended"):
            took = datetime.fromisoformat(attempt["ended"]) - datetime.fromisoformat(attempt["began"])
            text += f", took {duration(took.total_seconds())}"
    return text


def _failure(failure: dict[str, Any]) -> str:
    """A failure in words, such as 'rank 1 on n2 was ended by SIGKILL: ...'."""
    if failure.get("signal"):
        how = f"was ended by {failure['signal']}"
    elif failure.get("exit_code") is not None:
        how = f"ended with exit code {failure['exit_code']}"
    else:
        return failure.get("message") or "unknown"
    rank = "a rank" if failure.get("rank") is None else f"rank {failure['rank']}"
    where = f" on {failure['node']}" if failure.get("node") else ""
    message = failure.get("message") or ""
    if message.startswith(f"{rank} "):  # the message itself says how the rank ended
        return f"{rank}{where}{message.removeprefix(rank)}"
    return f"{rank}{where} {how}" + (f": {message}" if message else "")


def _ago(time: str | None) -> str:
    if not time:
        return "-"
    return _long((datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()) + " ago"


def _long(seconds: float) -> str:
    seconds = max(0, int(seconds))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


