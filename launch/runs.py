"""Runs as their readers see them: finding one, listing all, what became of it, cancelling it."""

from __future__ import annotations

import difflib
import json
import os
import signal
import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch.processes import alive
from trainers.errors import UserError
from trainers.files import read_json
from trainers.paths import RunPaths

ACTIVE = ("submitted", "running")
NEEDED = ("id", "task", "state", "step", "attempt", "created")
TAIL_BYTES = 64 * 1024  # of metrics.jsonl: some hundred logged steps


@dataclass(frozen=True)
class Run:
    paths: RunPaths
    record: dict[str, Any]  # run.json when it was read

    @property
    def id(self) -> str:
        return self.paths.id

    @property
    def state(self) -> str:
        return state(self.record)

    def again(self) -> Run:
        """The run as it is now."""
        return read_run(self.paths.root)


def read_run(folder: Path) -> Run:
    """Raises: UserError if the folder is no run, or its run.json cannot be read."""
    paths = RunPaths(folder)
    try:
        return Run(paths, _record(paths.record))
    except FileNotFoundError:
        raise UserError(f"`{folder}` is no run: it has no {paths.record.name}", "see `launch runs`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read `{paths.record}`: {error}",
                        "mend or restore that file; the run's checkpoints and metrics lie beside it") from None


def find_run(root: Path, word: str) -> Run:
    """The run that `word` names: an id under `root`, the unique beginning of one, or a run's folder.

    Raises:
        UserError: no such run, several, or one that cannot be read.
    """
    if not word:
        raise UserError("a run's id is empty", "see `launch runs`")
    root = root.absolute()
    if os.sep in word or word in (".", ".."):
        folder = Path(word).resolve()
        if not folder.is_dir():
            raise UserError(f"there is no folder `{word}`", "give a run's id (see `launch runs`) or its folder")
        return read_run(folder)
    if (root / word).is_dir():
        return read_run(root / word)
    if RunPaths(Path(word)).record.is_file():
        return read_run(Path(word).resolve())

    ids = [name for name in _folders(root) if RunPaths(root / name).record.exists()]
    found = [id for id in ids if id.startswith(word)]
    if len(found) == 1:
        return read_run(root / found[0])
    if found:
        more = f" and {len(found) - 6} more" if len(found) > 6 else ""
        raise UserError(f"`{word}` begins the ids of {len(found)} runs: {', '.join(found[-6:])}{more}",
                        "give more of the id")
    near = difflib.get_close_matches(word, ids, n=3, cutoff=0.4)
    raise UserError(f"there is no run `{word}` in `{root}`",
                    f"did you mean {' or '.join(near)}?" if near
                    else "see `launch runs`; runs elsewhere: --runs DIR or LAUNCH_RUNS")


def list_runs(root: Path) -> list[dict[str, Any]]:
    """The record of every run, newest first, each with its true `state` and its `path`; run.json alone is
    read. One that cannot be read has the state `unreadable` and says why under `problem`.

    10,000 runs were read in 0.3 s (one core, files in the cache).
    """
    rows = []
    for name in _folders(root):
        folder = f"{root}/{name}"
        file = f"{folder}/run.json"  # RunPaths.record, without the cost of 10,000 Paths
        try:
            record = _record(file)
            rows.append({**record, "state": state(record), "path": folder})
        except FileNotFoundError:
            continue  # no run
        except (OSError, ValueError) as error:
            rows.append({"id": name, "task": None, "state": "unreadable", "step": None, "total": None,
                         "attempt": None, "job": None, "sweep": None, "metrics": {}, "checkpoint": None,
                         "created": _changed(folder), "updated": _changed(file),
                         "path": folder, "problem": str(error)})
    return sorted(rows, key=lambda row: row["created"], reverse=True)


def state(record: dict[str, Any]) -> str:
    """The recorded state, or `lost` if it says that processes of this host are at work which are gone."""
    job = record.get("job")
    if record["state"] not in ACTIVE or not job or job["kind"] != "local" or job["host"] != socket.gethostname():
        return record["state"]
    return record["state"] if alive(job["pid"], job["started"]) else "lost"


def status(run: Run) -> dict[str, Any]:
    """All that is known of a run: its record with the true `state`, and

    - `attempts`: their records, oldest first; `failure`: the last attempt's, or None
    - `loss`, `rate` (samples or tokens a second): as last logged, or None
    - `path`, `log` (rank 0 of the last attempt), `checkpoint_path`: where things lie, or None
    - `next`: what one might type now
    """
    paths, now = run.paths, state(run.record)
    attempts = [_attempt(paths, number) for number in paths.attempt_numbers()]
    logs = paths.logs(attempts[-1]["attempt"]) if attempts else {}
    checkpoint = run.record.get("checkpoint")
    trained = [line for line in _tail(paths.metrics) if line.get("split") == "train"]
    return {
        **run.record,
        "state": now,
        "attempts": attempts,
        "failure": attempts[-1].get("failure") if attempts else None,
        "loss": trained[-1].get("loss") if trained else None,
        "rate": trained[-1].get("rate") if trained else None,
        "path": str(paths.root),
        "log": str(logs[0]) if 0 in logs else None,
        "checkpoint_path": None if checkpoint is None else str(paths.checkpoint(checkpoint)),
        "next": _next(run, now),
    }


def cancel(run: Run, wait_s: float = 90.0) -> str:
    """Ask a run to stop with a checkpoint and wait until it has, for `wait_s` seconds at most.

    Returns the state it is in then, with a word of explanation if it is still at work.

    Raises:
        UserError: it is not at work, or not on this host.
    """
    now, job = state(run.record), run.record.get("job")
    if now not in ACTIVE:
        raise UserError(f"run `{run.id}` is {now}: there is nothing to cancel", "see `launch runs`")
    if not job:
        raise UserError(f"run `{run.id}` is {now}, but no process has taken it yet", "try again in a moment")
    if job["host"] != socket.gethostname():
        raise UserError(f"run `{run.id}` is at work on host `{job['host']}`, this is `{socket.gethostname()}`",
                        f"type `launch cancel {run.id}` there")
    # The marker first: whoever sees the signal must already find the reason.
    attempt = max(run.paths.attempt_numbers(), default=run.record["attempt"])
    run.paths.cancellation(attempt).touch()
    try:
        os.kill(job["pid"], signal.SIGTERM)
    except ProcessLookupError:
        pass  # it ended just now
    except PermissionError:
        raise UserError(f"process {job['pid']} of run `{run.id}` belongs to another user",
                        "ask them to cancel it") from None
    deadline = time.monotonic() + wait_s
    while alive(job["pid"], job["started"]):
        if time.monotonic() > deadline:
            return f"{now} (asked to stop, but process {job['pid']} still runs after {wait_s:.0f} s)"
        time.sleep(0.05)
    return run.again().state


def _folders(root: Path) -> list[str]:
    """The names of the folders in `root`, sorted."""
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise UserError(f"`{root}` is no folder",
                        "give the folder that holds runs: --runs DIR or LAUNCH_RUNS") from None


def _record(file: Path | str) -> dict[str, Any]:
    """Raises: OSError; ValueError if it is no run's record."""
    with open(file, "rb", buffering=0) as opened:
        record = json.loads(str(opened.read(), "utf-8"))
    if not isinstance(record, dict) or any(record.get(key) is None for key in NEEDED):
        raise ValueError(f"it is no run's record, which has {', '.join(NEEDED)}")
    return record


def _attempt(paths: RunPaths, number: int) -> dict[str, Any]:
    """An attempt's record; what is known without it where it is missing or broken (a full disk)."""
    try:
        return read_json(paths.attempt_record(number))
    except (OSError, ValueError):
        return {"attempt": number, "outcome": "unreadable", "failure": None}


def _tail(file: Path) -> list[dict[str, Any]]:
    """The last lines of a JSON lines file; a broken line (the last may be half written) is passed over."""
    try:
        with open(file, "rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            start = max(0, size - TAIL_BYTES)
            opened.seek(start)
            lines = opened.read().splitlines()[1 if start else 0:]
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _next(run: Run, now: str) -> list[str]:
    if now == "finished":
        return []
    if now in ACTIVE and run.record.get("job"):
        return [f"launch logs {run.id} --follow", f"launch cancel {run.id}"]
    if now == "failed":
        return [f"launch logs {run.id}", f"launch resume {run.id}"]
    return [f"launch resume {run.id}"]


def _changed(file: str) -> str | None:
    """When the file was last changed, in UTC."""
    try:
        return datetime.fromtimestamp(os.stat(file).st_mtime, UTC).isoformat(timespec="seconds")
    except OSError:
        return None
