"""The pictures that a task draws: at each evaluation (`Task.draw`) in `figures/step_<n>/` of the run directory, and at the end
(`Task.report`) in `figures/`."""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.config.schema import RunConfig
from trainers.contract import heartbeat
from trainers.contract.errors import TrainingError
from trainers.contract.files import temporary_path
from trainers.contract.paths import RunPaths
from trainers.engine.batches.noise import seed_noise
from trainers.engine.evaluation import evaluating
from trainers.engine.precision import inexact_kernels
from trainers.engine.task import Task
from trainers.engine.world import World

DRAWING = timedelta(days=1)  # how long ranks wait for rank 0, which draws; `eval.report_s` is the user's limit
FAILED_WAITS_S = 120.0       # how long a rank that failed waits for the others, which may wait for it in a collective


class Pictures:
    """Lets the task draw. Every rank makes one, and calls `draw` at the same steps."""

    def __init__(self, task: Task, config: RunConfig, world: World, paths: RunPaths, note: Callable[[str, str], None]):
        """Collective if the task draws. `note(level, message)` warns the user."""
        self.task, self.config, self.world, self.paths, self.note = task, config, world, paths, note
        self.active = type(task).draw is not Task.draw
        self._group = world.new_gloo_group(DRAWING) if self.active else None

    def draw(self, models: Mapping[str, nn.Module], step: int) -> Path | None:
        """Return the folder with the pictures of this step, on rank 0; None if there are no pictures. Collective.

        The pictures appear all together, in place of older ones of this step. An error of the task is a warning.

        Raises:
            TrainingError: the task failed on this rank only, while other ranks wait for it in a collective.
        """
        if not self.active:
            return None
        heartbeat.report()
        target = self.paths.pictures(step)
        folder = temporary_path(target) if self.world.main else None
        drawn, error = False, self._make(folder) if folder is not None else None
        try:
            # Draw even without the folder: other ranks may need this rank in a collective.
            seed_noise(self.world.device, self.config.train.seed, "figures")  # the same on every rank and at every step
            with evaluating(models, self.config, self.world):
                self.task.draw(models, folder, step)
            drawn = folder is not None and _put(folder, target)
        except Exception as caught:
            error = error or caught
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # there are other pictures
                    self.paths.figures.rmdir()
        if error is not None:
            self._warn(error, step)
        self._meet(error, step)
        return target if drawn else None

    def _make(self, folder: Path) -> Exception | None:
        """Make an empty folder for pictures. Return the error if that is not possible."""
        try:
            self.paths.figures.mkdir(exist_ok=True)
            folder.mkdir()
        except OSError as error:
            return error
        return None

    def _warn(self, error: Exception, step: int) -> None:
        if not isinstance(error, OSError):
            traceback.print_exception(error)
        what = f"{error.strerror or error}" if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        self.note("warning", f"step {step}: the task's pictures cannot be drawn: {what}")

    def _meet(self, error: Exception | None, step: int) -> None:
        """Wait until all ranks have drawn or failed. Then no rank is inside a collective of `draw`."""
        if self._group is None:
            return
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)  # a collective of NCCL's may still be running
        failed = torch.zeros(self.world.size)
        failed[self.world.rank] = error is not None
        work = dist.all_reduce(failed, group=self._group, async_op=True)
        assert work is not None  # every rank belongs to the group
        try:
            work.wait(DRAWING if error is None else timedelta(seconds=FAILED_WAITS_S))
        except RuntimeError:
            if error is None:
                raise
            raise TrainingError(f"step {step}: the task's `draw` failed on rank {self.world.rank}, and other ranks still wait "
                                f"for it: {type(error).__name__}: {error}",
                                "run the same forward passes and collectives on every rank, and write files only where the "
                                "folder is not None") from error
        if error is None and failed.any():
            self.note("warning", f"step {step}: the task's `draw` failed on rank {int(failed.argmax())}: its log says why")


def _put(folder: Path, target: Path) -> bool:
    """Rename the folder to `target`, in place of an older one. Return False if the folder is empty."""
    if not os.listdir(folder):
        return False
    shutil.rmtree(target, ignore_errors=True)
    os.rename(folder, target)
    return True


def draw_figures(task: Task, measured: Mapping[str, Tensor], figures: Path, note: Callable[[str, str], None]) -> None:
    """Let the task draw the pictures of the end into the folder `figures`. Only one rank calls this.

    An error is a warning (`note(level, message)`), because the results of the run are saved already.

    Args:
        measured: what the last evaluation measured.
    """
    try:
        figures.mkdir(exist_ok=True)
        with inexact_kernels():
            task.report(measured, figures)
    except OSError as error:
        note("warning", f"cannot write figures to {figures}: {error.strerror or error}")
    except Exception as error:
        traceback.print_exc()
        note("warning", f"the task cannot draw its figures: {type(error).__name__}: {error}")
