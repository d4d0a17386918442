"""The folder of a run's checkpoints: what the folder contains, and how a checkpoint is deleted. Imports no torch.

`step_<n>` is a committed checkpoint. Only its manifest can prove it whole. An interruption may leave other folders:

    step_<n>.<attempt>.tmp    a checkpoint that this attempt was writing; in place of the number, a random text if the rank was
                              not started by `launch`, and `deleted` for a checkpoint that was being deleted
    step_<n>.old              a checkpoint to be replaced by a new one of the same step; put back if the new one was not
                              committed
    step_<n>.broken           a broken checkpoint that was skipped

Older versions wrote to `step_<n>.tmp`.

The next commit deletes these folders.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from trainers.checkpoints import evaluation, manifest
from trainers.contract.paths import RunPaths

TMP, OLD, BROKEN = ".tmp", ".old", ".broken"


def metrics(paths: RunPaths) -> dict[int, Mapping[str, float | None]]:
    """Return the metrics of each checkpoint whose manifest can be read, by step, oldest first: the input of retention.py."""
    found = {}
    for step in paths.checkpoint_steps():
        folder = paths.checkpoint(step)
        try:
            found[step] = evaluation.metrics(folder, manifest.read(folder, step))
        except manifest.Broken:
            pass
    return found


def leftovers(paths: RunPaths, *suffixes: str) -> list[Path]:
    """Return the folders that interruptions have left, with any of these suffixes, sorted by name."""
    return sorted(path for path in paths.checkpoints.glob("step_*")
                  if path.suffix in suffixes and re.fullmatch(r"step_\d+(\.\w+)?", path.stem))


def put_back(paths: RunPaths) -> None:
    """Put back each checkpoint that was to be replaced by a new one, if the new one was not committed."""
    for path in leftovers(paths, OLD):
        if not path.with_suffix("").exists():
            os.rename(path, path.with_suffix(""))


def unfinished(final: Path, writer: str) -> Path:
    """Return the folder in which the checkpoint `final` is written. `writer`: the attempt, or a random text."""
    return final.with_name(f"{final.name}.{writer}{TMP}")


def delete_leftovers(paths: RunPaths, attempt: int | None = None) -> None:
    """Delete the folders that interruptions have left.

    Args:
        attempt: do not touch what newer attempts write; None: there is no newer attempt.
    """
    for path in leftovers(paths, TMP, OLD, BROKEN):
        writer = path.stem.partition(".")[2]
        if attempt is None or not (writer.isdecimal() and int(writer) > attempt):
            shutil.rmtree(path, ignore_errors=True)


def delete(paths: RunPaths, step: int) -> None:
    """Delete a checkpoint. It is renamed first: an interruption then leaves no half checkpoint with a valid name.

    Raises:
        OSError: the checkpoint cannot be renamed.
    """
    path = paths.checkpoint(step)
    renamed = unfinished(path, "deleted")
    os.rename(path, renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def newest(paths: RunPaths) -> int | None:
    """Return the step of the newest checkpoint whose manifest can be read; None if there is none. No file is hashed."""
    for step in reversed(paths.checkpoint_steps()):
        try:
            manifest.read(paths.checkpoint(step), step)
        except manifest.Broken:
            continue
        return step
    return None
