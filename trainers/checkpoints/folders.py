"""The folder of a run's checkpoints: what lies in it, and how one goes. Imports no torch.

`step_<n>` is a committed checkpoint; whether it is whole, its manifest says. Beside it there may lie, after an interruption:

    step_<n>.tmp       being written, or being deleted
    step_<n>.old       was replaced by another of its step; put back if that one was never committed
    step_<n>.broken    was passed over

The next commit deletes them.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainers.checkpoints import manifest
from trainers.contract.paths import RunPaths

TMP, OLD, BROKEN = ".tmp", ".old", ".broken"


def manifests(paths: RunPaths) -> dict[int, dict[str, Any]]:
    """Those that can be read, by step, oldest first."""
    found = {}
    for step in paths.checkpoint_steps():
        try:
            found[step] = manifest.read(paths.checkpoint(step), step)
        except manifest.Broken:
            pass
    return found


def metrics(found: Mapping[int, Mapping[str, Any]]) -> dict[int, Mapping[str, float | None]]:
    """By step, what retention goes by."""
    return {step: content["metrics"] for step, content in found.items()}


def leftovers(paths: RunPaths, *suffixes: str) -> list[Path]:
    return sorted(path for path in paths.checkpoints.glob("step_*")
                  if path.suffix in suffixes and re.fullmatch(r"step_\d+", path.stem))


def put_back(paths: RunPaths) -> None:
    """What was replaced by a checkpoint that was never committed is the checkpoint again."""
    for path in leftovers(paths, OLD):
        if not path.with_suffix("").exists():
            os.rename(path, path.with_suffix(""))


def sweep(paths: RunPaths) -> None:
    """Delete what interruptions have left."""
    for path in leftovers(paths, TMP, OLD, BROKEN):
        shutil.rmtree(path, ignore_errors=True)


def delete(paths: RunPaths, step: int) -> None:
    """Renamed first, so that an interruption leaves no half checkpoint under a whole one's name. Raises: OSError."""
    path = paths.checkpoint(step)
    going = path.with_name(path.name + TMP)
    os.rename(path, going)
    shutil.rmtree(going, ignore_errors=True)
