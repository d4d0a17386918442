"""Make run directories and checkpoints without training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from trainers.checkpoints import evaluation, manifest
from trainers.checkpoints.evaluation import Evaluation
from trainers.contract.files import replace_json, replace_text
from trainers.contract.paths import RunPaths
from trainers.engine.saving import storage


def make_run(root: Path, spec: str = "", **changes: Any) -> RunPaths:
    """Make the directory of a finished run. `spec` holds lines for run.yaml, `changes` values for run.json."""
    paths = RunPaths(root)
    paths.root.mkdir(parents=True)
    replace_json(paths.record, {
        "id": paths.id, "task": "sentences", "state": "finished", "step": 30, "total": 30, "attempt": 1, "job": None,
        "sweep": None, "metrics": {}, "checkpoint": 30, "created": "2026-01-02T00:00:00+00:00",
        "updated": "2026-01-02T01:00:00+00:00", **changes,
    })
    replace_text(paths.spec, f"task: nowhere:Task\n{spec}")
    return paths


def make_checkpoint(paths: RunPaths, step: int, tensors: Mapping[str, Tensor], *, ranks: int = 1, tied: Mapping[str, str] = {},
                    metrics: Mapping[str, float] = {}, old: bool = False, **state: Any) -> Path:
    """Write a checkpoint in which each rank holds a random stretch of each tensor, which may be empty.

    Args:
        old: put the metrics into the manifest, as older versions did.

    Returns: the folder of the checkpoint.
    """
    folder = paths.checkpoint(step)
    folder.mkdir(parents=True)
    random, parts, index = Random(step), {}, {}
    for name, tensor in tensors.items():
        flat, shape = tensor.detach().contiguous().view(-1), tuple(tensor.shape)
        cuts = [0, *sorted(random.randrange(len(flat) + 1) for _ in range(ranks - 1)), len(flat)]
        for rank, (first, last) in enumerate(zip(cuts, cuts[1:])):
            if last > first or not len(flat):
                parts.setdefault(rank, {})[name] = flat[first:last]
                index.setdefault(f"{rank}.safetensors", {})[name] = (first, shape)
    entries = {f"{rank}.safetensors": storage.write(folder / f"{rank}.safetensors", part) for rank, part in parts.items()}
    storage.write_index(folder, index)
    replace_json(folder / manifest.STATE, {"step": step, "tied": dict(tied), **state})
    entries |= {name: manifest.entry(folder / name) for name in (manifest.STATE, manifest.INDEX)}
    manifest.write(folder, step=step, entries=entries, created="2026-01-02T00:30:00+00:00", strategy="zero3", world_size=ranks,
                   layout="sharded", versions={"torch": torch.__version__}, **({"metrics": dict(metrics)} if old else {}))
    if metrics and not old:
        evaluation.write(folder, step, Evaluation(metrics, []))
    return folder


def flip(file: Path, position: int = -1) -> None:
    """Flip one bit of the byte at `position`."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
