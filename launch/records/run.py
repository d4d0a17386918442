"""One run, as read from its folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from trainers.contract.errors import UserError
from trainers.contract.files import check_format, read_json
from trainers.contract.paths import RunPaths

SWEEP = "sweep.json"  # the file in a sweep's folder; sweeps and runs are in the same parent folder
REQUIRED_KEYS = ("id", "task", "state", "step", "attempt", "created")


@dataclass(frozen=True)
class Run:
    """A run and its record. The record does not change when run.json changes: see `reread`."""

    paths: RunPaths
    record: dict[str, Any]  # the content of run.json when it was read

    @property
    def id(self) -> str:
        return self.paths.id

    def submission(self, number: int) -> RunPaths:
        """Return the paths of the folder that holds this submission: the run's, or its sweep's for an element of an array."""
        sweep = self.record.get("sweep")
        return RunPaths(self.paths.root.parent / sweep) if sweep and not self.paths.submission(number).exists() else self.paths

    def attempt_record(self, number: int) -> dict[str, Any]:
        """Return the record of an attempt. If it is missing or broken (a full disk), its `outcome` is `unreadable`."""
        try:
            return read_json(self.paths.attempt_record(number))
        except (OSError, ValueError):
            return {"attempt": number, "outcome": "unreadable", "failure": None}

    def reread(self) -> Run:
        """Return the run with its record read again."""
        return read_run(self.paths.root)


def read_run(folder: Path) -> Run:
    """Read a run from its folder.

    Raises:
        UserError: the folder is not a run, or its run.json cannot be read.
    """
    paths = RunPaths(folder)
    try:
        return Run(paths, read_record(paths.record))
    except FileNotFoundError:
        if (folder / SWEEP).exists():
            raise UserError(f"`{paths.id}` is a sweep, not a run", f"`launch runs --sweep {paths.id}` lists its runs") from None
        raise UserError(f"`{folder}` is not a run: it has no {paths.record.name}", "see `launch runs`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read `{paths.record}`: {error}",
                        "fix or restore that file; the run's checkpoints and metrics are in the same folder") from None


def read_record(file: Path | str) -> dict[str, Any]:
    """Read a run's record from its run.json.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not the record of a run.
    """
    with open(file, "rb", buffering=0) as opened:
        record = json.loads(str(opened.read(), "utf-8"))
    if not isinstance(record, dict) or any(record.get(key) is None for key in REQUIRED_KEYS):
        raise ValueError(f"it is not the record of a run, which has the keys {', '.join(REQUIRED_KEYS)}")
    check_format(record)
    for key in ("created", "updated"):
        if (text := record.get(key)) and not _is_time(text):
            raise ValueError(f"its `{key}` is {text!r}, which is not a time with a time zone")
    return record if record["id"] == os.path.basename(os.path.dirname(file)) else _if_copied(record, file)


def _if_copied(record: dict[str, Any], file: Path | str) -> dict[str, Any]:
    """Return the record of a run whose folder has another name than its id.

    The run has been renamed, and keeps its id, by which W&B knows it. But if the folder with the old name is still there, the
    folder is a copy (`cp -r runs/A runs/B`): a run of its own, to which the jobs and processes of the original do not belong.
    """
    folder = os.path.dirname(os.path.abspath(file))
    original = os.path.join(os.path.dirname(folder), str(record["id"]), os.path.basename(file))
    try:
        with open(original, "rb") as opened:
            same = json.loads(opened.read()).get("created") == record["created"]
    except (OSError, ValueError, AttributeError):
        return record
    if not same:
        return record
    stopped = "preempted" if record["state"] in ("submitted", "running") else record["state"]
    return {**record, "id": os.path.basename(folder), "copy_of": record["id"], "state": stopped, "job": None, "sweep": None}


def _is_time(text: Any) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except (TypeError, ValueError):
        return False
