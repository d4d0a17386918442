"""The training loop of all tasks: resume, then repeat: save, evaluate, stop if asked, take a step.

A training step runs every update of the task, each for `Update.draws` optimizer steps.
"""

from __future__ import annotations

import shutil
import time
from typing import Iterator, Mapping

from torch import Tensor, nn

from trainers.checkpoints.evaluation import Evaluation
from trainers.config.schema import Every, RunConfig
from trainers.contract import events, exit_codes, heartbeat
from trainers.contract.errors import TrainingError, UserError
from trainers.contract.paths import RunPaths
from trainers.contract.signals import hold
from trainers.contract.text import number
from trainers.engine.batches.data_sets import make_ahead
from trainers.engine.ema import models_to_evaluate, start_averages
from trainers.engine.epochs import defines_epochs, ends_epoch, total_steps, total_steps_before_draws
from trainers.engine.evaluation import evaluate, reported
from trainers.engine.failures import memory_for
from trainers.engine.groups import described, groups_of
from trainers.engine.parallel.buffers import share_buffers
from trainers.engine.parallel.fragments import tied_names
from trainers.engine.parallel.strategy import close_process_group
from trainers.engine.pictures import Pictures, draw_figures
from trainers.engine.rates import Rates
from trainers.engine.saving import restore, task_state
from trainers.engine.saving.checkpoint import Checkpoints
from trainers.engine.saving.huggingface import describe
from trainers.engine.saving.watermark import check_data, watermark
from trainers.engine.scoring import score_test_set
from trainers.engine.setup import set_up
from trainers.engine.task import Share, Task
from trainers.engine.tracking.tracker import NoTracker, Tracker
from trainers.engine.update_runner import Reading, UpdateRunner, read
from trainers.engine.world import World

COMMIT_WITHIN_S = 600.0  # how long a rank that failed waits for a save that is under way on several ranks


def train(task: Task, config: RunConfig, world: World, paths: RunPaths, attempt: int | None) -> int:
    """Train until the last step or until a signal asks to stop. All ranks call this together.

    Args:
        paths: the run directory.
        attempt: number of this attempt; None if the rank was not started by `launch`.

    Returns:
        The exit code of this rank: 0 if training finished, 75 if it stopped with a checkpoint.

    Raises:
        UserError: the input is bad.
        TrainingError: the run failed, and would fail again in the same way.
    """
    loop = Loop(task, config, world, paths, attempt)
    try:
        return loop.run()
    except BaseException:  # SystemExit too: a task may call sys.exit
        # Let a save that is under way finish: it may be the only checkpoint. Each rank's thread takes part in the save, whatever
        # the rank itself waits for. But a rank that is gone never answers, so several ranks wait only for a limited time.
        loop.checkpoints.close(None if world.size == 1 else COMMIT_WITHIN_S)
        raise


class Loop:
    """One rank's training, from the last checkpoint to the end or a stop. `run` does all of it."""

    def __init__(self, task: Task, config: RunConfig, world: World, paths: RunPaths, attempt: int | None):
        self.task, self.config, self.world, self.paths = task, config, world, paths
        train = config.train
        self.setup = setup = set_up(task, config, world, before_placement=self._before_placement)
        self.strategy, self.stopping, self.models = setup.strategy, setup.stopping, setup.models
        self.train_set = setup.train_set
        self.eval_set = setup.eval_set if setup.eval_set is not None and len(setup.eval_set) else None
        updates = task.updates()
        groups = groups_of(task, updates, self.models, config.optim)
        self.runners = [UpdateRunner(update, config, world, self.strategy, self.train_set, self.models, group)
                         for update, group in zip(updates, groups)]
        start_averages(self.runners, train.ema)
        self.total = total_steps(train, self.runners)
        self.step = 0                # training steps done
        self.evaluated = False       # whether the evaluation that is due at this step is done
        self.early: str | None = None  # why training ends at this step, before the last one; None: it goes on
        self.latest = Evaluation({}, [])  # the last evaluation
        self.before = self.latest         # the last evaluation before this step
        self.tracker: NoTracker = NoTracker()
        self.checkpoints = Checkpoints(paths, world, config.checkpoint, strategy=train.strategy, attempt=attempt,
                                       emit=events.emit, on_commit=self._on_commit)
        self.pictures = Pictures(task, config, world, paths, lambda *note: self.tracker.note(*note))
        self.measured: Mapping[str, Tensor] | None = None  # result of the last evaluation in this attempt
        self._saved: int | None = None                     # step of the last save
        self._is_best = False                              # whether the evaluation of this step is among the best
        self._warned_of_metric = False
        self.rates = Rates()

    def _before_placement(self, models: Mapping[str, nn.Module]) -> None:
        """Read what the models lose when the strategy places them: placing changes their classes."""
        self.tied = tied_names(models)
        if self.world.main:
            describe(self.task, models, self.paths)

    def run(self) -> int:
        """Train and return the exit code, as `train` does."""
        make_ahead(self.train_set, ())  # workers are forked before other threads start
        if self.eval_set is not None and self.config.eval.every != "never":
            make_ahead(self.eval_set, ())
        if self.setup.test_set is not None:
            make_ahead(self.setup.test_set, ())
        self._resume()
        make_ahead(self.train_set, self._shares())
        hold()  # from now on a signal takes effect at the next boundary, where all ranks save and stop together
        if self.strategy.needs_settling and self.step < self.total:
            with memory_for("step"), task_state.preserved(self.task):
                for runner in self.runners:
                    runner.settle(runner.draws(self.step)[0])
        first = self.step + 1  # the first step of this attempt
        self.rates.begin(self.step, [])
        while True:
            if self._due(self.config.checkpoint.every) or self.step == self.total:
                self._save()  # before the evaluation, which may fail, and does not wait for the save
            if self._due(self.config.eval.every) and not self.evaluated:
                completed = self._evaluate()
                if not completed:
                    return self._stop()
            if self._is_best:
                self._save()
            if self.step == self.total or self.early:
                return self._finish()
            if self.stopping.at_boundary():
                return self._stop()
            self._take_step()
            if self.step % self.config.log.every == 0 or self.step in (1, self.total):
                self._log()
            elif self.step == first:  # it compiles, and allocates memory: leave it out of the rates
                self.rates.begin(self.step, self._read())

    def _shares(self) -> Iterator[Share]:
        """Yield the micro-batches that this rank will take from the training set, in order."""
        first = self.step
        if self.strategy.needs_settling and first < self.total:
            for runner in self.runners:
                for _ in range(2):
                    yield from runner.shares(runner.draws(first)[0])
        for step in range(first, self.total):
            for runner in self.runners:
                for draw in runner.draws(step):
                    yield from runner.shares(draw)

    @memory_for("step")
    def _take_step(self) -> None:
        """Run one training step: every update, for its number of optimizer steps."""
        heartbeat.step_begins()
        share_buffers(self.models, self.world)
        for runner in self.runners:
            for draw in runner.draws(self.step):
                runner.take_step(draw, total=self.total * runner.update.draws)
        self.step += 1
        heartbeat.step_ends(self.step)
        self.evaluated = self._is_best = False
        self.before = self.latest

    def _due(self, every: Every) -> bool:
        """Return whether an evaluation or a save with the interval `every` is due at this step.

        Nothing is due at step 0. The last step is due with every interval but "never".
        """
        if self.step == 0 or every == "never":
            return False
        if self.step == self.total:
            return True
        return self.step % every == 0 if isinstance(every, int) else ends_epoch(self.step - 1, self.runners)

    def _resume(self) -> None:
        """Restore the newest whole checkpoint. If the run has no checkpoint yet, load the weights of `init.source`, if set.

        On rank 0 also start the tracker.
        """
        newest = self.checkpoints.newest()
        notes: list[tuple[str, str]] = []
        if newest is not None:
            planned = self.total
            self._restore(newest)
            if self.total != planned:
                notes.append(("info", f"this run keeps its {self.total} steps, although {self.config.train.epochs:g} epochs are "
                                      f"{planned} steps today: an older version counted them in another way"))
        elif self.config.init.source is not None:
            notes = restore.load_initial_weights(self.config.init.source, self.config, self.setup, self.runners, self.paths,
                                                 self.world)
        notes += [("info", f"parameter groups of update `{runner.update.name}`: {described(runner.groups)}")
                  for runner in self.runners if len(runner.groups) > 1]
        if self.eval_set is None and self.config.train.patience is not None:
            raise UserError("`train.patience` counts evaluations, but the task has no evaluation set",
                            "use data with an evaluation set, or train.patience=null")
        if self.eval_set is None and self.config.checkpoint.metric is not None:
            notes.append(("warning", f"there is no evaluation set, so `{self.config.checkpoint.metric}` (`checkpoint.metric`) is "
                                     "not measured, and no checkpoint is kept as a best one"))
        if self.world.main:
            self.tracker = Tracker(self.config, self.paths, self.step, self.total, self.latest.metrics, self.evaluated,
                                   self.checkpoints.attempt)
            self.tracker.checkpoint = newest
        self.tracker.emit({
            "event": "start", "step": self.step, "total": self.total, "world_size": self.world.size,
            "device": self.world.device.type, "precision": self.config.train.precision,
            "parameters": self.setup.parameters,
            "samples": len(self.train_set), "best_by": self.config.checkpoint.best_by, "resumed": newest is not None,
        })
        for level, message in notes:
            self.tracker.note(level, message)

    def _restore(self, step: int) -> None:
        """Load the checkpoint of this step: position, metrics, models and optimizers."""
        reader, state = self.checkpoints.load(step)
        self.step, self._saved = step, step
        if self.config.train.epochs is not None:  # what an epoch is may have changed since the run began, but not the run's end
            self.total = state.get("total", total_steps_before_draws(self.config.train, self.runners))
        self.before = self.latest = Evaluation(state["metrics"], state["best"], state.get("waited", 0))
        self.evaluated = state.get("evaluated", False)  # only in checkpoints of older versions
        if found := self.checkpoints.evaluation(step):
            self.evaluated, self.latest, self.early = True, found, self._out_of_patience(found)
        check_data(self.setup, state)
        restore.load_tensors(reader, self.setup, self.runners)
        for runner in self.runners:
            runner.load_state(state["updates"][runner.update.name])
        if self.step == self.total or self.early:
            self.evaluated = False  # evaluate again: the pictures need the measures

    def _on_commit(self, step: int) -> None:
        """Record a committed checkpoint. Runs on rank 0, in the writing thread."""
        self.tracker.committed(step)
        shutil.rmtree(self.paths.init, ignore_errors=True)  # the run now resumes from its own checkpoint

    def _evaluate(self) -> bool:
        """Evaluate at this step. Return False if the run must stop before the evaluation is complete."""
        self._read()
        began = time.perf_counter()
        if self.eval_set is not None:
            with models_to_evaluate(self.models, self.runners, self.world) as models:
                measured = evaluate(self.task, models, self.eval_set, self.config, self.world, self.stopping)
            if measured is None:
                return False
            heartbeat.report()
            self.measured = measured
            self.latest = self.before.then(reported(self.task, measured), self.config.checkpoint)
            self.tracker.evaluation(self.step, self.total, self.latest.metrics)
            self._compare_with_best()
            if self._saved == self.step:
                self.tracker.flush()
                self.checkpoints.add_evaluation(self.step, self.latest)
        self.evaluated = True
        if self.pictures.active:
            with models_to_evaluate(self.models, self.runners, self.world) as models:
                folder = self.pictures.draw(models, self.step)
            if folder is not None:
                self.tracker.pictures(self.step, folder)
        self.rates.leave_out(began)
        return True

    def _draw_figures(self) -> None:
        """Draw the pictures of the last evaluation, on rank 0."""
        if self.world.main and self.measured is not None:
            draw_figures(self.task, self.measured, self.paths.figures, self.tracker.note)

    def _save(self) -> None:
        """Start to save a checkpoint of this step, unless that was done already."""
        if self._saved == self.step:
            return
        self._read()
        began = time.perf_counter()  # after the device is done: the steps before the save count in the rates
        self.tracker.flush()
        found = self.latest if self.evaluated and self.eval_set is not None else None
        state = {
            "step": self.step, "total": self.total,
            "metrics": self.before.metrics, "best": self.before.best, "waited": self.before.waited,
            **watermark(self.setup), "tied": self.tied,
            "updates": {runner.update.name: runner.state() for runner in self.runners},
            task_state.KEY: task_state.values(self.task),
        }
        task_state.check_equal(self.task, self.world)
        share_buffers(self.models, self.world)
        with memory_for("checkpoint"):
            self.checkpoints.save(self.step, restore.fragments(self.setup, self.runners), state, found)
        if self.checkpoints.superseded:
            raise self._superseded()
        self._saved = self.step
        self.rates.leave_out(began)

    def _superseded(self) -> TrainingError:
        return TrainingError(f"step {self.step}: {self.checkpoints.wait()}",
                             f"`launch status {self.paths.id}` shows the attempt that continues the run")

    def _wait_for_commit(self, failure: str, hint: str) -> None:
        """Wait until the last checkpoint is committed. Raise a TrainingError with `failure` and `hint` if that failed."""
        if reason := self.checkpoints.wait():
            raise self._superseded() if self.checkpoints.superseded else TrainingError(f"{failure}: {reason}", hint)

    def _compare_with_best(self) -> None:
        """Set whether the evaluation of this step is among the best so far, and whether training ends with it. All ranks come to
        the same result."""
        settings, metrics = self.config.checkpoint, self.latest.metrics
        self._is_best = settings.keep_best > 0 and self.latest.best != self.before.best
        self.early = self.early or self._out_of_patience(self.latest)
        if settings.metric is not None and settings.metric not in metrics:
            missing = (f"`checkpoint.metric` is `{settings.metric}`, but the evaluation reports only "
                       f"{', '.join(metrics) or 'nothing'}")
            if self.config.train.patience is not None:
                raise UserError(f"{missing}, so `train.patience` can never be satisfied",
                                f"start a new run with another checkpoint.metric, or `launch resume {self.paths.id} "
                                "train.patience=null`")
            if settings.keep_best and not self._warned_of_metric:
                self._warned_of_metric = True
                self.tracker.note("warning", f"{missing}: no checkpoint is kept as a best one")

    def _out_of_patience(self, found: Evaluation) -> str | None:
        """Return why training ends with this evaluation; None if it goes on."""
        patience = self.config.train.patience
        if patience is None or found.waited < patience:
            return None
        metric, best = self.config.checkpoint.metric, f" (best: {number(found.best[0])})" if found.best else ""
        return f"{metric} has not become better in {found.waited} evaluation{'s' * (found.waited > 1)}{best}"

    def _log(self) -> None:
        """Report the losses, learning rates and rates since the last logged step. Waits for the device."""
        event = {"event": "step", "step": self.step, "total": self.total, "unit": self.task.unit}
        readings = self._read()
        for runner, reading in zip(self.runners, readings):
            prefix = "" if len(self.runners) == 1 else f"{runner.update.name}/"
            event |= {f"{prefix}loss": reading.loss, f"{prefix}lr": runner.lr, f"{prefix}grad_norm": reading.norm}
            if runner.skipped:
                event[f"{prefix}skipped"] = runner.skipped
        leader = self.runners.index(defines_epochs(self.runners))
        self.tracker.step(event | self.rates.measured(self.step, self.total, readings, leader))

    def _read(self) -> list[Reading]:
        # Called before the run logs, evaluates or saves: none of these may happen after a gradient or loss that is not finite.
        return read(self.runners)

    def _finish(self) -> int:
        """Save and close after the last step. Return the exit code."""
        self._save()
        self._wait_for_commit(f"training reached step {self.step}, but its last checkpoint could not be written",
                              f"make room on the disk, then use `launch resume {self.paths.id}`")
        if self.setup.test_set is not None:
            score = score_test_set(self.task, self.config, self.setup, self.runners, self.checkpoints, self.world, self.step)
            if score is None:
                return self._stop()  # everything is saved: the next attempt evaluates and scores again
            self.tracker.test(self.step, *score)
        heartbeat.report()
        self._draw_figures()  # after the commit: drawing cannot lose the checkpoint
        self._close("finished")
        return exit_codes.FINISHED

    def _stop(self) -> int:
        """Save and close before the last step, because a signal asked to stop. Return the exit code."""
        self._save()
        if reason := self.checkpoints.wait():
            if self.checkpoints.superseded:
                raise self._superseded()
            # A stop is no failure. A job that is requeued at its time limit may find room on the disk when it starts again.
            self.tracker.note("warning", f"stopped at step {self.step}, but the checkpoint of this step could not be written: "
                              f"{reason}; the run continues from the checkpoint before")
        self._close("preempted")
        return exit_codes.PREEMPTED

    def _close(self, state: str) -> None:
        heartbeat.rest()
        self.checkpoints.close()
        self.stopping.close()
        self.tracker.end(state, self.step, self.total, self.early if state == "finished" else None)
        close_process_group()
