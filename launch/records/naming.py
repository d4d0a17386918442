"""The ids of runs, and how runs and paths are shown to a person."""

from __future__ import annotations

import os
import secrets
import shlex
import time
from pathlib import Path

from trainers.contract.paths import RunPaths


def new_run_id(name: str) -> str:
    """Return a new run id from a task's name, the time and a random part.

    Ids sort by time and are valid in W&B. The random part separates ids made in the same second.
    """
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def short_path(path: Path) -> str:
    """Return the path as text, relative to the working folder if that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def command_name(paths: RunPaths) -> str:
    """Return the name of a run for use in a shell command: its id if `launch` finds it by id, otherwise its path."""
    default = Path(os.environ.get("LAUNCH_RUNS", "runs")).absolute()
    return shlex.quote(paths.id if paths.root.parent == default else short_path(paths.root))
