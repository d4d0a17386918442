"""The folder of a run's checkpoints: what the folder contains, and how a checkpoint is deleted. Imports no torch.

`step_<n>` is a committed checkpoint. Only its manifest can prove it whole. An interruption may leave other folders:

    step_<n>.tmp       a checkpoint that was being written or deleted
    step_<n>.old       a checkpoint to be replaced by a new one of the same step; put back if the new one was not committed
    step_<n>.broken    a broken checkpoint that was skipped

The next commit deletes these folders.
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
    """Return the manifests that can be read, by step, oldest first."""
    contents = {}
    for step in paths.checkpoint_steps():
        try:
            contents[step] = manifest.read(paths.checkpoint(step), step)
        except manifest.Broken:
            pass
    return contents


def metrics(contents: Mapping[int, Mapping[str, Any]]) -> dict[int, Mapping[str, float | None]]:
    """Return the metrics in manifests, by step: the input of trainers/checkpoints/retention.py."""
    return {step: content["metrics"] for step, content in contents.items()}


def leftovers(paths: RunPaths, *suffixes: str) -> list[Path]:
    """Return the folders that interruptions have left, with any of these suffixes, sorted by name."""
    return sorted(path for path in paths.checkpoints.glob("step_*")
                  if path.suffix in suffixes and re.fullmatch(r"step_\d+", path.stem))


def put_back(paths: RunPaths) -> None:
    """Put back each checkpoint that was to be replaced by a new one, if the new one was not committed."""
    for path in leftovers(paths, OLD):
        if not path.with_suffix("").exists():
            os.rename(path, path.with_suffix(""))


def delete_leftovers(paths: RunPaths) -> None:
    """Delete the folders that interruptions have left."""
    for path in leftovers(paths, TMP, OLD, BROKEN):
        shutil.rmtree(path, ignore_errors=True)


def delete(paths: RunPaths, step: int) -> None:
    """Delete a checkpoint. It is renamed first: an interruption then leaves no half checkpoint with a valid name.

    Raises:
        OSError: the checkpoint cannot be renamed.
    """
    path = paths.checkpoint(step)
    renamed = path.with_name(path.name + TMP)
    os.rename(path, renamed)
    shutil.rmtree(renamed, ignore_errors=True)
