"""One run as its folder holds it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths

SWEEP = "sweep.json"  # in a sweep's folder, which lies among those of runs
NEEDED = ("id", "task", "state", "step", "attempt", "created")


@dataclass(frozen=True)
class Run:
    paths: RunPaths
    record: dict[str, Any]  # run.json when it was read

    @property
    def id(self) -> str:
        return self.paths.id

    def again(self) -> Run:
        """The run as it is now."""
        return read_run(self.paths.root)


def read_run(folder: Path) -> Run:
    """Raises: UserError if the folder is no run, or its run.json cannot be read."""
    paths = RunPaths(folder)
    try:
        return Run(paths, read_record(paths.record))
    except FileNotFoundError:
        if (folder / SWEEP).exists():
            raise UserError(f"`{paths.id}` is a sweep and no run", f"`launch runs --sweep {paths.id}` lists its runs") from None
        raise UserError(f"`{folder}` is no run: it has no {paths.record.name}", "see `launch runs`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read `{paths.record}`: {error}",
                        "mend or restore that file; the run's checkpoints and metrics lie beside it") from None


def read_record(file: Path | str) -> dict[str, Any]:
    """Raises: OSError; ValueError if it is no run's record."""
    with open(file, "rb", buffering=0) as opened:
        record = json.loads(str(opened.read(), "utf-8"))
    if not isinstance(record, dict) or any(record.get(key) is None for key in NEEDED):
        raise ValueError(f"it is no run's record, which has {', '.join(NEEDED)}")
    return record
