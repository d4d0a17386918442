"""Pictures at each evaluation and at the end. This file is also the program of two ranks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import serve
from torch import nn

from trainers.config.schema import RunConfig
from trainers.contract.errors import TrainingError
from trainers.contract.paths import RunPaths
from trainers.engine import pictures
from trainers.engine.evaluation import evaluating, reported
from trainers.engine.pictures import Pictures, draw_figures
from trainers.engine.task import Task
from trainers.engine.world import World

CONFIG = RunConfig.model_validate({"name": "x", "task": "x:X", "train": {"steps": 1}})


@pytest.mark.slow
def test_every_rank_draws_and_only_rank_0_writes(ranks, tmp_path):
    two = ranks(2)
    values, again = two("draw", root=tmp_path), two("draw", root=tmp_path)
    # The noise of a picture is the same on every rank and at every step, and the model is in evaluation mode.
    assert values[0][0] == values[1][0] == again[0][0] and [value[1] for value in values] == ["step_7", None]
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["step_7"]
    assert (tmp_path / "figures/step_7/a.png").read_text() == f"{values[0][0]}"
    # Failures. On all ranks, on one rank, and where another rank waits in a collective.
    first, second = two("draw", root=tmp_path, fails=[0, 1])
    assert first == [None, None, ["step 7: the task's pictures cannot be drawn: ValueError: a fault"]] == second
    first, second = two("draw", root=tmp_path, fails=[1])
    assert first[1:] == ["step_7", ["step 7: the task's `draw` failed on rank 1: its log says why"]]
    assert second[2] == ["step 7: the task's pictures cannot be drawn: ValueError: a fault"]
    first, second = two("draw", root=tmp_path, fails=[0])
    assert first[1] is None and (tmp_path / "figures/step_7/a.png").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/figures").touch()  # no folder can be made here; rank 1 still needs rank 0 in a collective
    (_, name, notes), second = two("draw", root=tmp_path / "full")
    assert (name, notes) == (None, ["step 7: the task's pictures cannot be drawn: File exists"])
    assert second[2] == ["step 7: the task's `draw` failed on rank 0: its log says why"]
    assert two("stuck", root=tmp_path) == [None, "step 7: the task's `draw` failed on rank 1, and other ranks still wait for "
                                                 "it: ValueError: a fault"]
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["step_7"]


class Scattering(Task):
    """Draws with an operation that has no deterministic kernel."""

    def draw(self, models, folder, step):
        torch.zeros(4).put_(torch.tensor([0]), torch.ones(1))
        (folder / "a.png").touch()

    def report(self, measured, figures):
        if figures is not None:
            self.draw({}, figures, 0)
        return {name: value.put_(torch.tensor([0]), torch.ones(1)).sum() for name, value in measured.items()}


def test_evaluations_need_no_deterministic_kernels(tmp_path):
    notes = []
    torch.set_deterministic_debug_mode("error")
    try:
        with pytest.warns(UserWarning, match="put_ does not have a deterministic implementation"):
            with evaluating({}, CONFIG, World(0, 1, 0, 1, torch.device("cpu"))):
                torch.zeros(4).put_(torch.tensor([0]), torch.ones(1))
            assert reported(Scattering(CONFIG), {"a": torch.zeros(4)}) == {"a": 1.0}
            drawing = Pictures(Scattering(CONFIG), CONFIG, World(0, 1, 0, 1, torch.device("cpu")), RunPaths(tmp_path), print)
            assert drawing.draw({}, 3) is not None
            draw_figures(Scattering(CONFIG), {}, tmp_path, lambda *note: notes.append(note))
        assert torch.get_deterministic_debug_mode() == 2 and (tmp_path / "a.png").exists() and not notes
    finally:
        torch.set_deterministic_debug_mode("default")


def test_a_task_that_draws_nothing_has_no_pictures(tmp_path):
    class World:
        size, main, device = 1, True, torch.device("cpu")

        def new_gloo_group(self, timeout):
            return None

    class Nothing(Task):
        def draw(self, models, folder, step):
            assert folder.is_dir()

    class Full(Task):
        def draw(self, models, folder, step):
            raise OSError(28, "No space left on device")

    notes = []
    for task in (Task, Nothing, Full):
        drawing = Pictures(task(CONFIG), CONFIG, World(), RunPaths(tmp_path), lambda *note: notes.append(note))
        assert drawing.active == (task is not Task) and drawing.draw({}, 3) is None
    assert notes == [("warning", "step 3: the task's pictures cannot be drawn: No space left on device")]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error, warning", [
    (OSError(28, "No space left on device"), "cannot write figures to .*: No space left on device"),
    (ZeroDivisionError("division by zero"), "the task cannot draw its figures: ZeroDivisionError: division by zero"),
    (KeyError("x"), "the task cannot draw its figures: KeyError: 'x'"),
])
def test_an_error_while_drawing_is_a_warning(error, warning, tmp_path):
    class Draws:
        def report(self, measured, figures):
            raise error

    notes = []
    draw_figures(Draws(), {}, tmp_path / "figures", lambda level, message: notes.append((level, message)))
    ((level, message),) = notes
    assert level == "warning" and re.fullmatch(warning, message)


# ---- on the ranks


class Draws(Task):
    def draw(self, models, folder, step):
        assert not models["model"].training and not torch.is_grad_enabled()
        noise = torch.randn(1)
        dist.all_reduce(noise)
        self.value = noise.item()
        if self.rank in self.fails:
            raise ValueError("a fault")
        if folder is not None:
            (folder / "a.png").write_text(f"{self.value}")


def draw(world, root, fails=()):
    """Returns (the noise, the folder's name, the warnings)."""
    task, model, notes = Draws(CONFIG), nn.Dropout(), []
    task.rank, task.fails = world.rank, fails
    drawing = Pictures(task, CONFIG, world, RunPaths(Path(root)), lambda _, message: notes.append(message))
    folder = drawing.draw({"model": model}, 7)
    assert model.training
    return [None if fails else task.value, folder and folder.name, notes]


def stuck(world, root):
    """Rank 1 fails before a collective. Then it joins the collective, so that the test can end."""
    class Stuck(Task):
        def draw(self, models, folder, step):
            if world.rank == 1:
                raise ValueError("a fault")
            dist.all_reduce(torch.zeros(1))

    pictures.FAILED_WAITS_S = 1.0
    try:
        Pictures(Stuck(CONFIG), CONFIG, world, RunPaths(Path(root)), lambda *note: None).draw({}, 7)
    except TrainingError as error:
        dist.all_reduce(torch.zeros(1))
        return error.message


if __name__ == "__main__":
    serve(globals())
