"""The files that Hugging Face's layout of a model has besides the weights. A run keeps them so that an export can work without
the task."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

from torch import nn

from trainers.contract import events
from trainers.contract.files import temporary_path
from trainers.contract.paths import RunPaths
from trainers.engine.task import Task


def describe(task: Task, models: Mapping[str, nn.Module], paths: RunPaths) -> None:
    """Write these files into the run directory, unless they are there already. Call this on one rank.

    Args:
        models: the models as the task has built them.
    """
    final = paths.descriptions
    if final.exists():
        return
    tmp = temporary_path(final)
    try:
        for name, model in models.items():
            folder = tmp / name
            folder.mkdir(parents=True)
            task.huggingface(model, folder)
            if not any(folder.iterdir()):
                folder.rmdir()
        if any(tmp.iterdir()):
            os.rename(tmp, final)
    except Exception as error:  # a model's own code may raise anything; only a warning, because nobody has asked for an export
        events.emit({"event": "note", "level": "warning",
                     "message": f"later exports will have no Hugging Face layout: {type(error).__name__}: {error}"})
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
