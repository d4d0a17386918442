"""What Hugging Face's layout of a model has beside its weights lies in the run directory, for exports without the task."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

from torch import nn

from trainers.engine.task import Task
from trainers.errors import UserError
from trainers.paths import RunPaths


def describe(task: Task, models: Mapping[str, nn.Module], paths: RunPaths) -> None:
    """Write it once, on one rank; `models` as the task has made them. Raises: UserError if it cannot be written."""
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
    except OSError as error:
        raise UserError(f"cannot write `{final}`: {error.strerror}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
