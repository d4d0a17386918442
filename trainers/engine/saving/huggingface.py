"""What Hugging Face's layout of a model has beside its weights lies in the run directory, for exports without the task."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

from torch import nn

from trainers.contract import events
from trainers.contract.paths import RunPaths
from trainers.engine.task import Task


def describe(task: Task, models: Mapping[str, nn.Module], paths: RunPaths) -> None:
    """Write it once, on one rank; `models` as the task has made them."""
    final = paths.descriptions
    if final.exists():
        return
    beside = final.with_name(f".{final.name}.{os.getpid()}")
    try:
        for name, model in models.items():
            folder = beside / name
            folder.mkdir(parents=True)
            task.huggingface(model, folder)
            if not any(folder.iterdir()):
                folder.rmdir()
        if any(beside.iterdir()):
            os.rename(beside, final)
    except Exception as error:  # whatever a model's own code raises: nobody has asked for an export yet
        events.emit({"event": "note", "level": "warning",
                     "message": f"no Hugging Face layout for later exports: {type(error).__name__}: {error}"})
    finally:
        shutil.rmtree(beside, ignore_errors=True)
