"""The order of saves and evaluations in the training loop, on one rank in this process."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from made import flip
from saving import ONE
from torch import nn

from trainers.checkpoints import evaluation, folders, manifest
from trainers.config.schema import RunConfig
from trainers.contract.errors import UserError
from trainers.contract.files import replace_json
from trainers.contract.paths import RunPaths
from trainers.engine import loop, scoring
from trainers.engine.batches.sampling import Shuffled
from trainers.engine.saving import storage
from trainers.engine.task import Loss, Task


class Points:
    def __len__(self):
        return 64

    def batch(self, share):
        values = torch.from_numpy(share.indices).float()
        return torch.stack([values.sin(), values.cos()], 1), (values % 3 == 0).long()


class Toy(Task):
    """`scores` gives the metric `top1` of each evaluation by number, from 0."""

    scores = (0.3, 0.5, 0.4, 0.6, 0.1, 0.2)
    fail_at: int | None = None  # the step whose report raises `failure`
    failure: BaseException = ZeroDivisionError("the report fails")

    def data(self, world):
        return Points(), Points()

    def model(self):
        return nn.Linear(2, 2)

    def loss(self, model, batch):
        inputs, labels = batch
        return Loss(nn.functional.cross_entropy(model(inputs), labels, reduction="sum"), len(labels))

    def report(self, measured, figures):
        metrics = super().report(measured, figures)
        step = STEP_OF[metrics["loss"]] if metrics["loss"] in STEP_OF else None
        if step is not None and step == type(self).fail_at:
            raise self.failure
        return {**metrics, "top1": 0.0 if step is None else self.scores[step // 4 - 1]}


STEP_OF: dict[float, int] = {}  # the step at which an evaluation gives this loss


def config(**sections) -> RunConfig:
    values = {"name": "toy", "task": "toy:Toy", "train": {"steps": 24, "batch_size": 16}, "optim": {"name": "sgd", "lr": 0.1},
              "log": {"every": 1}, "eval": {"every": 4}, "checkpoint": {"every": 8, "metric": "top1", "keep_last": 1}}
    return RunConfig.model_validate({**values, **{key: {**values[key], **more} for key, more in sections.items()}})


def run(root: Path, attempt: int, **sections) -> int:
    paths = RunPaths(root)
    paths.attempt(attempt).mkdir(parents=True)
    settings = config(**sections)
    return loop.train(Toy(settings), settings, ONE, paths, attempt)


def logged(root: Path) -> list[tuple]:
    """Return what identifies a run: each row of metrics.jsonl without its times."""
    rows = [json.loads(line) for line in RunPaths(root).metrics.read_text().splitlines()]
    return [(row["step"], row["split"], row["loss"], row.get("top1"), row.get("grad_norm")) for row in rows]


def kept(root: Path) -> dict[int, tuple]:
    """Return the state and the evaluation of each checkpoint that is kept, by step."""
    paths, found = RunPaths(root), {}
    for step in paths.checkpoint_steps():
        folder = paths.checkpoint(step)
        manifest.verify(folder, step)
        evaluated = evaluation.read(folder, step)
        state = json.loads((folder / manifest.STATE).read_text())
        found[step] = state, evaluated and (evaluated.metrics, evaluated.best)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nothing has interrupted."""
    root = tmp_path_factory.mktemp("whole")
    assert run(root / "first", 1) == 0
    STEP_OF.update({row[2]: row[0] for row in logged(root / "first") if row[1] == "eval"})
    assert run(root / "run", 1) == 0
    return root / "run"


@pytest.fixture(autouse=True)
def no_faults(monkeypatch):
    monkeypatch.setattr(Toy, "fail_at", None)


def test_best_checkpoints_are_kept_and_saved_where_no_save_is_due(whole):
    assert [row[3] for row in logged(whole) if row[1] == "eval"] == list(Toy.scores)
    states = kept(whole)
    assert list(states) == [16, 24]  # 0.6 is the best; 24 is the last
    assert states[16][1] == ({**states[16][1][0], "top1": 0.6}, [0.6]) and states[16][0]["best"] == [0.5]
    assert states[24][1][1] == states[24][0]["best"] == [0.6]


def test_a_report_that_ends_the_process_waits_for_the_commit(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "fail_at", 8)
    monkeypatch.setattr(Toy, "failure", SystemExit(3))
    write = loop.Checkpoints._write
    monkeypatch.setattr(loop.Checkpoints, "_write", lambda self, save: (time.sleep(0.3), write(self, save))[1])
    with pytest.raises(SystemExit):
        run(tmp_path / "run", 1)
    assert 8 in RunPaths(tmp_path / "run").checkpoint_steps()


@pytest.mark.parametrize("step", [8, 24, 12])
def test_a_report_that_fails_costs_no_step_that_was_saved(whole, tmp_path, monkeypatch, step):
    """At steps 8 and 24 a save is due before the evaluation. At step 12 none is."""
    every = {"checkpoint": {"every": "never"}} if step == 24 else {}
    monkeypatch.setattr(Toy, "fail_at", step)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run", 1, **every)
    saved = {8: 8, 24: 24, 12: 8}[step]
    assert max(RunPaths(tmp_path / "run").checkpoint_steps()) == saved
    assert (kept(tmp_path / "run")[saved][1] is None) == (step == saved)
    monkeypatch.setattr(Toy, "fail_at", None)
    assert run(tmp_path / "run", 2, **every) == 0
    assert logged(tmp_path / "run") == logged(whole)
    assert kept(tmp_path / "run") == kept(whole)


def run_until(root: Path, cut: int) -> None:
    """Train the first attempt until the evaluation of step `cut`, which is not recorded."""
    class CutOff(loop.Loop):
        def _compare_with_best(self):
            if self.step == cut:
                self.checkpoints.close()  # what has begun ends, so that no thread runs into the next attempt
                raise KeyboardInterrupt
            super()._compare_with_best()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Loop", CutOff)
        with pytest.raises(KeyboardInterrupt):
            run(root, 1)


def reseal(folder: Path, step: int, state: dict, **about) -> None:
    """Replace the state of a checkpoint, and what its manifest says."""
    replace_json(folder / manifest.STATE, state)
    content = manifest.read(folder, step)
    entries = {**content.pop("files"), manifest.STATE: manifest.entry(folder / manifest.STATE)}
    manifest.write(folder, entries=entries, **{key: value for key, value in content.items() if key != "format"}, **about)


@pytest.mark.parametrize("cut", [4, 8, 16, 20])
def test_an_evaluation_that_was_not_recorded_is_repeated_and_logged_once(whole, tmp_path, cut):
    """The attempt is cut off after the evaluation of step `cut`, before anything else is written. Steps 8 and 16 are saved
    before the evaluation, step 4 would be saved as a new best, and step 20 is not saved."""
    run_until(tmp_path / "run", cut)
    assert run(tmp_path / "run", 2) == 0
    assert logged(tmp_path / "run") == logged(whole)
    assert kept(tmp_path / "run") == kept(whole)


def test_checkpoints_of_older_versions_are_read(whole, tmp_path):
    """Older versions kept `evaluated`, and what the evaluation has found, in state.json and in the manifest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Toy, "fail_at", 20)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "run", 1)
    paths = RunPaths(tmp_path / "run")
    for step in paths.checkpoint_steps():
        folder = paths.checkpoint(step)
        found = evaluation.read(folder, step)
        state = json.loads((folder / manifest.STATE).read_text())
        (folder / evaluation.NAME).unlink()
        reseal(folder, step, {**state, "evaluated": True, "metrics": found.metrics, "best": found.best}, metrics=found.metrics)
    assert {step: metrics["top1"] for step, metrics in folders.metrics(paths).items()} == {16: 0.6}
    assert run(tmp_path / "run", 2) == 0
    assert logged(tmp_path / "run") == logged(whole) and list(kept(tmp_path / "run")) == [16, 24]


def test_a_run_continues_in_the_order_of_samples_in_which_it_began(whole, tmp_path):
    """Older versions had another order, and checkpoints did not name it."""
    init = Shuffled.__init__

    def older(self, *args, **keys):
        init(self, *args, **keys)
        self.order = "numpy"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shuffled, "__init__", older)
        assert run(tmp_path / "older", 1) == 0
        run_until(tmp_path / "run", 20)
    assert logged(tmp_path / "older") != logged(whole)
    paths = RunPaths(tmp_path / "run")
    folder, state = paths.checkpoint(16), kept(tmp_path / "run")[16][0]
    assert state["updates"]["model"].pop("order") == "numpy"
    reseal(folder, 16, {**state, "updates": {"model": {**state["updates"]["model"], "order": "of tomorrow"}}})
    with pytest.raises(UserError, match="in the order `of tomorrow`, which this version does not know"):
        run(tmp_path / "run", 2)
    reseal(folder, 16, state)
    assert run(tmp_path / "run", 3) == 0
    assert logged(tmp_path / "run") == logged(tmp_path / "older")
    assert kept(whole)[24][0]["updates"]["model"]["order"] == "feistel"


def test_the_evaluation_of_a_save_that_failed_is_lost_with_it(tmp_path, monkeypatch, whole):
    write = manifest.write

    def full_disk(folder, *, step, **about):
        if step == 8:
            raise OSError(28, os.strerror(28))
        write(folder, step=step, **about)

    monkeypatch.setattr(manifest, "write", full_disk)
    assert run(tmp_path / "run", 1) == 0
    assert logged(tmp_path / "run") == logged(whole) and list(kept(tmp_path / "run")) == [16, 24]


def test_the_first_line_says_which_checkpoints_are_the_best(tmp_path, capsys):
    assert run(tmp_path / "run", 1, train={"steps": 1}) == 0
    assert ", 64 samples, best by top1 (highest)\n" in capsys.readouterr().out


# Early stopping: `scores` are 0.3, 0.5, 0.4 at the steps 4, 8 and 12

PATIENT = {"train": {"patience": 1}}


@pytest.fixture(scope="module")
def early(tmp_path_factory, whole) -> Path:
    """The folder of a run that nothing has interrupted and that stops early."""
    paths = RunPaths(tmp_path_factory.mktemp("early") / "run")
    paths.root.mkdir()
    replace_json(paths.record, {})
    assert run(paths.root, 1, **PATIENT) == 0
    return paths.root


def test_a_run_stops_early_with_its_last_and_best_checkpoints(whole, early):
    record = json.loads(RunPaths(early).record.read_text())
    assert record["stopped_early"] == "top1 has not become better in 1 evaluation (best: 0.5)"
    assert (record["step"], record["total"]) == (12, 24)
    assert logged(early) == [row for row in logged(whole) if row[0] <= 12]
    assert {step: found[1] for step, (_, found) in kept(early).items()} == {8: [0.5], 12: [0.5]}


@pytest.mark.parametrize("cut", [4, 8, 12])
def test_an_interrupted_run_stops_at_the_same_step(early, tmp_path, monkeypatch, cut):
    """The attempt is cut off after an evaluation, before it counts; the third attempt follows a cut just before the end."""
    compare = loop.Loop._compare_with_best

    def cut_off(self):
        if self.step == cut:
            self.checkpoints.close()
            raise KeyboardInterrupt
        compare(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_compare_with_best", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", 1, **PATIENT)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_close", lambda self, state: self.checkpoints.close())
        assert run(tmp_path / "run", 2, **PATIENT) == 0
    assert run(tmp_path / "run", 3, **PATIENT) == 0
    assert logged(tmp_path / "run") == logged(early)
    assert kept(tmp_path / "run") == kept(early)


def test_more_patience_continues_a_run_that_stopped_early(whole, early, tmp_path):
    shutil.copytree(early, tmp_path / "run")
    assert run(tmp_path / "run", 2, train={"patience": 3}) == 0
    assert logged(tmp_path / "run") == logged(whole)
    assert json.loads(RunPaths(tmp_path / "run").record.read_text())["stopped_early"] is None


def test_nan_is_no_improvement_and_patience_needs_no_kept_best(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Toy, "scores", (0.3, float("nan"), 0.3, 0.2, 0.9, 0.9))
    assert run(tmp_path / "run", 1, train={"patience": 3}, checkpoint={"keep_best": 0}) == 0
    assert "finished at step 16/24, stopped early: top1 has not become better in 3 evaluations" in capsys.readouterr().out
    assert list(kept(tmp_path / "run")) == [16]


def test_patience_without_its_metric_or_an_evaluation_set_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="reports only loss, top1, so `train.patience` can never be satisfied"):
        run(tmp_path / "metric", 1, train={"patience": 1}, checkpoint={"metric": "auc"})
    monkeypatch.setattr(Toy, "data", lambda self, world: (Points(), None))
    with pytest.raises(UserError, match="the task has no evaluation set"):
        run(tmp_path / "set", 1, **PATIENT)


# A test set, which here is the evaluation set again: the best checkpoint has the same scores as at its own step


@pytest.fixture
def tested(monkeypatch):
    monkeypatch.setattr(Toy, "test_set", lambda self, world: Points())


def scores_of(root: Path) -> list[dict]:
    return [row for row in map(json.loads, RunPaths(root).metrics.read_text().splitlines()) if row["split"] == "test"]


def test_the_best_checkpoint_is_scored_on_the_test_set(whole, tested, tmp_path, monkeypatch, capsys):
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    replace_json(paths.record, {})
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "evaluate", lambda *_: None)  # a stop signal arrives during the test
        assert run(paths.root, 1) == 75
    assert scores_of(paths.root) == []
    for attempt in (2, 3):  # the third attempt follows a cut just before the end
        assert run(paths.root, attempt) == 0
        [loss] = [row[2] for row in logged(whole) if row[:2] == (16, "eval")]
        assert scores_of(paths.root) == [{"step": 24, "split": "test", "checkpoint": 16, "loss": loss, "top1": 0.6}]
        metrics = json.loads(paths.record.read_text())["metrics"]
        assert (metrics["test_loss"], metrics["test_top1"], metrics["top1"]) == (loss, 0.6, 0.2)
    assert "test of checkpoint 16  loss" in capsys.readouterr().out
    assert [row for row in logged(paths.root) if row[1] != "test"] == logged(whole) and kept(paths.root) == kept(whole)


@pytest.mark.parametrize("checkpoint", [{"metric": None}, {"keep_best": 0}])
def test_without_a_best_checkpoint_the_last_weights_are_scored(whole, tested, tmp_path, checkpoint):
    assert run(tmp_path / "run", 1, checkpoint=checkpoint) == 0
    assert scores_of(tmp_path / "run") == [{"step": 24, "split": "test", "checkpoint": 24, "loss": logged(whole)[-1][2],
                                           "top1": 0.2}]


def test_a_best_checkpoint_that_is_broken_is_not_scored(tested, tmp_path, monkeypatch):
    finish = loop.Loop._finish

    def damage(self):
        flip(self.paths.checkpoint(16) / "0.safetensors")
        return finish(self)

    monkeypatch.setattr(loop.Loop, "_finish", damage)
    assert run(tmp_path / "run", 1) == 0
    assert [row["checkpoint"] for row in scores_of(tmp_path / "run")] == [24]


def test_a_test_set_must_be_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "test_set", lambda self, world: 5)
    with pytest.raises(UserError, match="the test set: int is no data set: it has no `__len__`"):
        run(tmp_path / "run", 1)


def test_a_set_without_lengths_is_refused_before_the_run_begins(tmp_path, monkeypatch):
    tokens = {"steps": 24, "batch_tokens": 64}
    settings = RunConfig.model_validate({**config().model_dump(), "train": tokens})
    with pytest.raises(UserError, match="the training set, a Points, has no `lengths`"):
        loop.train(Toy(settings), settings, ONE, RunPaths(tmp_path), None)
    monkeypatch.setattr(Toy, "test_set", lambda self, world: Points())
    monkeypatch.setattr(Toy, "data", lambda self, world: (Points(), None))
    with pytest.raises(UserError, match="the set to evaluate, a Points, has no `lengths`"):
        run(tmp_path / "test", 1, eval={"batch_tokens": 64}, checkpoint={"metric": None})
    monkeypatch.undo()
    with pytest.raises(UserError, match="the set to evaluate, a Points, has no `lengths`"):
        run(tmp_path / "eval", 1, eval={"batch_tokens": 64})
    assert run(tmp_path / "never", 1, train={"steps": 1}, eval={"batch_tokens": 64, "every": "never"}) == 0


def test_a_task_without_an_evaluation_set_draws_with_its_averaged_weights(tmp_path, capsys):
    class Drawing(Toy):
        def data(self, world):
            return Points(), None

        def draw(self, models, folder, step):
            (folder / "weight.png").write_text(json.dumps(models["model"].weight.tolist()))
            if step == 8:
                raise ZeroDivisionError("a fault of the task")

    paths, settings = RunPaths(tmp_path / "run"), config(checkpoint={"metric": None, "every": 24}, train={"ema": 0.9})
    paths.attempt(1).mkdir(parents=True)
    assert loop.train(Drawing(settings), settings, ONE, paths, 1) == 0
    assert paths.picture_steps() == [4, 12, 16, 20, 24] and len(list(paths.figures.iterdir())) == 5
    assert "warning: step 8: the task's pictures cannot be drawn: ZeroDivisionError: a fault" in capsys.readouterr().out
    reader = storage.Reader(paths.checkpoint(24))
    average, weight = (reader.read(f"{kind}/model/weight", 0, 4).view(2, 2) for kind in ("ema", "models"))
    assert not average.equal(weight)
    assert json.loads((paths.pictures(24) / "weight.png").read_text()) == average.tolist()
