"""The one training loop. It reads as the algorithm: resume, then evaluate, save, stop or take a step."""

from __future__ import annotations

import math
import shutil
import time
from typing import Mapping

from torch import Tensor, nn

from trainers.config.schema import RunConfig
from trainers.contract import events, exit_codes, heartbeat
from trainers.contract.errors import TrainingError, UserError
from trainers.contract.paths import RunPaths
from trainers.contract.signals import hold
from trainers.engine.evaluation import draw_figures, evaluate
from trainers.engine.parallel.fragments import Fragment, fill, no_others, tied
from trainers.engine.parallel.strategy import close, share_buffers
from trainers.engine.saving.checkpoint import Checkpoints
from trainers.engine.saving.huggingface import describe
from trainers.engine.saving.storage import Reader
from trainers.engine.saving.weights import open_source, take
from trainers.engine.setup import set_up
from trainers.engine.task import Task
from trainers.engine.tracking.tracker import NoTracker, Tracker
from trainers.engine.update_runner import UpdateRunner
from trainers.engine.world import World


def train(task: Task, config: RunConfig, world: World, paths: RunPaths, attempt: int | None) -> int:
    """Train until the end or until asked to stop; on all ranks. Returns the rank's exit code.

    Raises:
        UserError: bad input. TrainingError: the run failed in a way that would repeat.
    """
    loop = Loop(task, config, world, paths, attempt)
    try:
        return loop.run()
    except Exception as error:
        if isinstance(error, UserError) or world.size == 1:  # all ranks come here, or none saves
            loop.checkpoints.close()  # a save under way is worth its end
        raise


class Loop:
    def __init__(self, task: Task, config: RunConfig, world: World, paths: RunPaths, attempt: int | None):
        self.task, self.config, self.world, self.paths = task, config, world, paths
        train = config.train
        setup = set_up(task, config, world, made=self._made)
        self.strategy, self.stopping, self.models = setup.strategy, setup.stopping, setup.models
        self.train_set, self.eval_set = setup.train_set, setup.eval_set
        self.layout, self.parameters = setup.layout, setup.parameters
        self.runners = [UpdateRunner(update, config, world, self.strategy, self.train_set, self.models)
                         for update in task.updates()]
        self.samples = self.runners[0].samples
        self.total = train.steps or self.samples.steps(train.epochs)
        self.step = 0
        self.evaluated = False   # whether the evaluation due at this step was done
        self.metrics: dict[str, float] = {}
        self.best: list[float] = []  # the keep_best best values of checkpoint.metric so far
        self.tracker: NoTracker = NoTracker()
        self.checkpoints = Checkpoints(paths, world, config.checkpoint, strategy=train.strategy, attempt=attempt,
                                       say=events.emit,
                                       committed=self._has_committed)
        self._saved: tuple[int, bool] | None = None
        self._is_best = self._warned = False
        self.measured: Mapping[str, Tensor] | None = None  # by the last evaluation of this attempt
        self._logged_at = (0, 0.0)  # (step, time) since which rates are measured

    def _made(self, models: Mapping[str, nn.Module]) -> None:
        """Before they are placed, which changes their classes."""
        self.tied = tied(models)
        if self.world.main:
            describe(self.task, models, self.paths)

    def run(self) -> int:
        self._resume()
        hold()
        if self.strategy.settles and self.step < self.total:
            for runner in self.runners:
                runner.settle(self.step * runner.update.draws)
        self._logged_at = (self.step, time.perf_counter())
        while True:
            if not self.evaluated and self._due(self.config.eval.every) and not self._evaluate():
                return self._stop()
            if self._due(self.config.checkpoint.every) or self._is_best:
                self._save()
            if self.step == self.total:
                return self._finish()
            if self.stopping.at_boundary():
                return self._stop()
            heartbeat.step_begins()
            for runner in self.runners:
                first = self.step * runner.update.draws
                for draw in range(first, first + runner.update.draws):
                    runner.take_step(draw, self.total * runner.update.draws)
            self.step += 1
            heartbeat.step_ends(self.step)
            self.evaluated = self._is_best = False
            if self.step % self.config.log.every == 0 or self.step in (1, self.total):
                self._log()

    def _due(self, every: int | str) -> bool:
        if self.step == 0 or every == "never":
            return False
        if self.step == self.total:
            return True
        return self.samples.ends_epoch(self.step - 1) if every == "epoch" else self.step % every == 0

    def _resume(self) -> None:
        """Put the newest whole checkpoint's state in place, if there is one."""
        found = self.checkpoints.newest()
        said = self._start_from() if found is None and self.config.init.source else None
        if found is not None:
            reader, state = self.checkpoints.load(found)
            self.step, self.evaluated = found, state["evaluated"]
            self.metrics, self.best = state["metrics"], state["best"]
            self._same_data(state["samples"])
            self._fill(reader)
            for runner in self.runners:
                runner.load_state(state["updates"][runner.update.name])
            if self.step == self.total:
                self.evaluated = False  # once more: for the pictures that the end draws
            self._saved = (self.step, self.evaluated)
        if self.world.main:
            self.tracker = Tracker(self.config, self.paths, self.step, self.total, self.metrics, self.evaluated,
                                   self.checkpoints.attempt)
            self.tracker.checkpoint = found
        self.tracker.say({
            "event": "start", "step": self.step, "total": self.total, "world_size": self.world.size,
            "device": self.world.device.type, "precision": self.config.train.precision,
            "parameters": self.parameters,
            "samples": len(self.train_set), "resumed": found is not None,
        })
        if said:
            self.tracker.note("info", said)

    def _start_from(self) -> str:
        """Put the weights of `init.source` in place. Returns what was done, in words."""
        init, path = self.config.init, self.paths.first_weights(self.config.init.source)
        source = open_source(path, self.world)
        said = take(source, self.layout, self.strategy.fragments(self.models), init.skip, f"`{init.source}`")
        for runner in self.runners:
            runner.sharded.filled()
        return said

    def _has_committed(self, step: int) -> None:
        """On rank 0, in the writing thread."""
        self.tracker.committed(step)
        shutil.rmtree(self.paths.init, ignore_errors=True)  # from now on the run has a checkpoint of its own

    def _fragments(self) -> dict[str, Fragment]:
        """This rank's part of all that a checkpoint holds."""
        found = self.strategy.fragments(self.models)
        for runner in self.runners:
            found |= runner.sharded.fragments(runner.update.name)
        return found

    def _fill(self, reader: Reader) -> None:
        """Put a checkpoint's tensors in place."""
        shapes = reader.shapes
        no_others(shapes, {place.key for place in self.layout})
        for runner in self.runners:
            runner.sharded.allocate(runner.update.name, shapes)
        fill(self._fragments(), shapes, reader.read)
        for runner in self.runners:
            runner.sharded.filled()

    def _evaluate(self) -> bool:
        """False if the run is to stop first."""
        self._finite()
        began = time.perf_counter()
        if self.eval_set is not None:
            share_buffers(self.models, self.world)
            running = {**self.models, **{each.update.trains: each.sharded.evaluated for each in self.runners}}
            measured = evaluate(self.task, running, self.eval_set, self.config, self.world, self.stopping)
            if measured is None:
                return False
            heartbeat.rest()
            self.metrics = self.task.report(measured, None)
            self.measured = measured
            self.tracker.evaluation(self.step, self.total, self.metrics)
            self._rank_checkpoint()
        self.evaluated = True
        self._discount(began)
        return True

    def _draw(self) -> None:
        """The pictures of the last evaluation, once its checkpoint is safe."""
        if self.world.main and self.measured is not None:
            draw_figures(self.task, self.measured, self.paths.figures, self.tracker.note)

    def _samples(self) -> list[int]:
        return [len(self.train_set), len(self.eval_set) if self.eval_set is not None else 0]

    def _same_data(self, then: list[int]) -> None:
        """Another number of samples means other batches: it would be another run."""
        if then != self._samples():
            now = self._samples()
            raise UserError(f"the data has changed under this run: it had {then[0]} training and {then[1]} evaluation "
                            f"samples, now {now[0]} and {now[1]}", "put the data back as it was, or start a new run")

    def _save(self) -> None:
        if self._saved == (self.step, self.evaluated):
            return
        began = time.perf_counter()
        self._finite()
        self.tracker.before_checkpoint()
        state = {
            "step": self.step, "evaluated": self.evaluated, "metrics": self.metrics, "best": self.best,
            "samples": self._samples(), "tied": self.tied,
            "updates": {runner.update.name: runner.state() for runner in self.runners},
        }
        share_buffers(self.models, self.world)
        self.checkpoints.save(self.step, self._fragments(), state, self.metrics if self.evaluated else {})
        if self.checkpoints.superseded:
            raise self._superseded()
        self._saved = (self.step, self.evaluated)
        self._discount(began)

    def _superseded(self) -> TrainingError:
        return TrainingError(f"step {self.step}: {self.checkpoints.wait()}",
                             f"`launch status {self.paths.id}` shows the attempt that goes on")

    def _committed(self, otherwise: str, hint: str) -> None:
        """Wait for the last checkpoint. Raises: TrainingError if it was not committed."""
        if reason := self.checkpoints.wait():
            raise self._superseded() if self.checkpoints.superseded else TrainingError(f"{otherwise}: {reason}", hint)

    def _rank_checkpoint(self) -> None:
        """Note whether this step's evaluation is among the best so far; the same on all ranks."""
        wanted = self.config.checkpoint
        if wanted.metric is None or wanted.keep_best == 0:
            return
        value = self.metrics.get(wanted.metric)
        if value is None and not self._warned:
            self._warned = True
            self.tracker.note("warning", f"`checkpoint.metric` is `{wanted.metric}`, which the evaluation does not give "
                              f"({', '.join(self.metrics)}): no checkpoint is kept as a best one")
        if value is None or not math.isfinite(value):
            return
        ranked = sorted([*self.best, value], reverse=wanted.mode == "max")[:wanted.keep_best]
        self._is_best = ranked != self.best
        self.best = ranked

    def _log(self) -> None:
        steps = self.step - self._logged_at[0]
        self._finite()
        event = {"event": "step", "step": self.step, "total": self.total}
        alone = len(self.runners) == 1
        for runner in self.runners:
            prefix = "" if alone else f"{runner.update.name}/"
            event[f"{prefix}loss"] = runner.last_loss()
            event[f"{prefix}lr"] = runner.lr
            event[f"{prefix}grad_norm"] = runner.norm.item()
            if runner.skipped:
                event[f"{prefix}skipped"] = runner.skipped
        measured = [runner.measured() for runner in self.runners]
        seconds = max(time.perf_counter() - self._logged_at[1], 1e-9)  # the reads above waited for the device
        event |= {
            "rate": measured[0][0] / seconds, "unit": self.task.unit,
            "data_wait": sum(wait for _, wait in measured) / seconds,
            "eta_s": (self.total - self.step) * seconds / max(steps, 1),
        }
        self.tracker.step(event)
        self._logged_at = (self.step, time.perf_counter())

    def _discount(self, began: float) -> None:
        """Leave the time since `began` out of the rates."""
        step, since = self._logged_at
        self._logged_at = (step, since + time.perf_counter() - began)

    def _finite(self) -> None:
        """Neither log, evaluate nor save past a gradient or loss that is not a number."""
        for runner in self.runners:
            runner.check()

    def _finish(self) -> int:
        self._save()
        self._committed(f"training reached step {self.step}, but its last checkpoint could not be written",
                        f"make room, then `launch resume {self.paths.id}`")
        heartbeat.rest()
        self._draw()
        self._close("finished")
        return exit_codes.FINISHED

    def _stop(self) -> int:
        self._save()
        self._committed(f"stopped at step {self.step}, but its checkpoint could not be written",
                        f"make room, then `launch resume {self.paths.id}` goes on from the checkpoint before")
        self._close("preempted")
        return exit_codes.PREEMPTED

    def _close(self, state: str) -> None:
        heartbeat.rest()
        self.checkpoints.close()
        self.stopping.close()
        self.tracker.end(state, self.step, self.total)
        close()
