"""What runs are called."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from trainers.contract.paths import RunPaths


def new_run_id(name: str) -> str:
    """Sorts by time, fits W&B, and is told apart from one made in the same second."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def shown(path: Path) -> str:
    """Relative where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def named(paths: RunPaths) -> str:
    """What to call the run in the next command: its id where `launch` looks for it, else its path."""
    default = Path(os.environ.get("LAUNCH_RUNS", "runs")).absolute()
    return paths.id if paths.root.parent == default else shown(paths.root)
