"""Runs as plain text: the table of all, the comparison of a sweep's, the details of one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from launch.cluster import reasons
from launch.records.read import ACTIVE, slow_words
from trainers.contract.clock import local_time
from trainers.contract.events import brief, metrics_line
from trainers.contract.text import duration, number

COLUMNS = ("RUN", "TASK", "STATE", "STEP", "UPDATED", "METRICS")
VALUE_WIDTH = 20  # of what a sweep varies: a long path leaves room for the metrics


def table(rows: Sequence[dict[str, Any]], width: int | None = None) -> str:
    """One line a run, cut at `width` columns (None: the terminal's, 80 if there is none), then what there is to note.
    Rows of a sweep, which have `overrides`, are compared: what differs, and each metric, have columns."""
    if not rows:
        return "no runs"
    cells = _comparison(rows) if "overrides" in rows[0] else [COLUMNS, *(_cells(row) for row in rows)]
    of: dict[str, list[str]] = {}
    for row in rows:
        if row.get("note"):
            of.setdefault(row["note"], []).append(row["id"])
    notes = [f"note: {ids[0] if len(ids) == 1 else f'{len(ids)} runs'}: {note}" for note, ids in of.items()]
    from launch.report.columns import columns

    return "\n".join([columns(cells, width), *notes])


def _comparison(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The run comes last: of all columns its name, whole or cut, tells least."""
    from launch.report.columns import cut  # imports rich, as late as it can

    values = [dict(override.partition("=")[::2] for override in row["overrides"]) for row in rows]
    keys = list(dict.fromkeys(key for given in values for key in given))
    differing = [key for key in keys if len({given.get(key) for given in values}) > 1] or keys
    last = [key.rpartition(".")[2] for key in differing]
    heads = [short if last.count(short) == 1 else key for key, short in zip(differing, last)]
    metrics = list(dict.fromkeys(name for row in rows for name in brief(row.get("metrics") or {})))
    lines = [(*heads, "STATE", "STEP", *metrics, "RUN")]
    for row, given in zip(rows, values):
        found = row.get("metrics") or {}
        lines.append((*(cut(given.get(key, "-"), VALUE_WIDTH) for key in differing), row["state"], _step(row),
                      *(number(found[name]) if name in found else "-" for name in metrics),
                      row["id"] + (f"  {row['problem']}" if row.get("problem") else "")))
    return lines


def details(status: dict[str, Any]) -> str:
    """What `launch.records.read.status` found, for a person."""
    progress = _step(status)
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
        "speed": f"{status['rate']:,.0f} samples or tokens a second" if status["rate"] and status["state"] == "running" else "",
        "slow": "; ".join(map(slow_words, status["slow"])),
        "metrics": metrics_line(status["metrics"] or {}),
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


def _weights(init: dict[str, Any] | None) -> str:
    """Where it began."""
    if not init:
        return ""
    return f"from run {init['run']}, step {init['step']}" if init["run"] else f"from {init['path']}"


def _explained(status: dict[str, Any]) -> str:
    if status["note"]:
        return f" ({status['note']})"
    return " (its processes are gone and nobody said why)" if status["state"] == "lost" else ""


def _job(status: dict[str, Any]) -> str:
    job, queue = status["job"], status["queue"]
    if not job or job["kind"] != "slurm" or not job["ids"]:
        return ""
    said = f"{', '.join(job['ids'])} on cluster {job['cluster']}"
    if queue:
        said += f": {queue['state']}"
        if queue["nodes"]:
            said += f" on {', '.join(queue['nodes'])} since {local_time(queue['start'])}"
    return said


def _place(queue: dict[str, Any]) -> str:

    place = f"place {queue['position']} of {queue['of']} in partition {queue['partition']}: " if queue["position"] else ""
    return place + reasons.told(queue["reason"])


def _start(queue: dict[str, Any]) -> str:
    if not queue["start"]:
        return "SLURM has no estimate yet"
    seconds = (datetime.fromisoformat(queue["start"]) - datetime.now(UTC)).total_seconds()
    return f"about {local_time(queue['start'])}" + (f", in {_long(seconds)}" if seconds > 0 else "") + ", by SLURM's estimate"


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
        said += f", {attempt['ranks']} rank(s) on {attempt['device']}, "
        said += f"job {attempt['job']} on {', '.join(attempt['nodes'])}" if attempt.get("job") else f"host {attempt['host']}"
    if attempt.get("began"):
        said += f", {local_time(attempt['began'])}"
        if attempt.get("ended"):
            took = datetime.fromisoformat(attempt["ended"]) - datetime.fromisoformat(attempt["began"])
            said += f", took {duration(took.total_seconds())}"
    return said


def _failure(failure: dict[str, Any]) -> str:
    """'rank 1 on n2 was ended by SIGKILL: ...'; of a failure that is no rank's, what is known."""
    if failure.get("signal"):
        how = f"was ended by {failure['signal']}"
    elif failure.get("exit_code") is not None:
        how = f"ended with exit code {failure['exit_code']}"
    else:
        return failure.get("message") or "unknown"
    rank = "a rank" if failure.get("rank") is None else f"rank {failure['rank']}"
    where = f" on {failure['node']}" if failure.get("node") else ""
    message = failure.get("message") or ""
    if message.startswith(f"{rank} "):  # it says how itself
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


