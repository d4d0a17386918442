"""What rank 0 reports during a run: events for the terminal and the log, metrics.jsonl, run.json and W&B."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, Mapping

from trainers.config.schema import RunConfig
from trainers.contract import events
from trainers.contract.clock import utc_now
from trainers.contract.errors import TrainingError
from trainers.contract.files import update_json
from trainers.contract.paths import RunPaths
from trainers.contract.signals import request_stop
from trainers.engine.tracking.metrics import MetricsFile
from trainers.engine.tracking.wandb_run import WandbRun

RECORD_EVERY_S = 1.0  # between two logged steps that write run.json, at least


class NoTracker:
    """The tracker of every rank but rank 0: reports nothing."""

    def note(self, level: str, message: str) -> None: ...
    def emit(self, event: Mapping[str, Any]) -> None: ...
    def step(self, event: Mapping[str, Any]) -> None: ...
    def evaluation(self, step: int, total: int, metrics: Mapping[str, float]) -> None: ...
    def test(self, step: int, checkpoint: int, metrics: Mapping[str, float]) -> None: ...
    def pictures(self, step: int, folder: Path) -> None: ...
    def committed(self, step: int) -> None: ...
    def flush(self) -> None: ...
    def end(self, state: str, step: int, total: int, early: str | None = None) -> None: ...


class Tracker(NoTracker):
    """The tracker of rank 0.

    Attributes:
        metrics: of the last evaluation.
        checkpoint: step of the last committed checkpoint; None if the run has no checkpoint yet.
    """

    def __init__(self, config: RunConfig, paths: RunPaths, step: int, total: int, metrics: Mapping[str, float],
                 evaluated: bool, attempt: int | None):
        """Open metrics.jsonl, start the W&B run and write run.json.

        Args:
            step: the step from which the run starts or resumes.
            total: number of training steps of the run.
            metrics: of the last evaluation; empty if there was none.
            evaluated: whether the evaluation of `step` is done.
            attempt: number of this attempt. Once a newer attempt has started, this attempt no longer writes run.json.
                None: write run.json in any case.

        Raises:
            TrainingError: metrics.jsonl cannot be written.
        """
        self.paths, self.attempt = paths, attempt
        self.metrics = dict(metrics)
        self.checkpoint: int | None = None
        self._record_lock = threading.Lock()  # the thread that commits checkpoints writes run.json too
        self._recorded_at = 0.0               # when run.json was written last
        self._record_fails = False
        try:
            self._file = MetricsFile(paths.metrics, step, evaluated, lambda text: self.note("warning", text))
        except OSError as error:
            raise TrainingError(f"{paths.metrics} cannot be written: {error.strerror}",
                                f"fix the problem, then use `launch resume {paths.id}`") from error
        self._wandb = self._start_wandb(config) if config.wandb.mode != "off" else None
        self._record(step=step, total=total, metrics=self.metrics, stopped_early=None)

    def _start_wandb(self, config: RunConfig) -> WandbRun | None:
        """Return the W&B run, or None after a warning if W&B cannot work (bad project name, folder that it cannot write)."""
        try:
            return WandbRun(config, self.paths, self._file.kept, self.note)
        except Exception as error:
            self.note("warning", f"W&B cannot track this run ({' '.join(str(error).split())}); training continues without "
                                 "W&B, and metrics.jsonl has everything")
            return None

    def emit(self, event: Mapping[str, Any]) -> None:
        """Write an event to standard output; events.py lists the events."""
        events.emit(event)

    def note(self, level: str, message: str) -> None:
        """Write a note for the user. `level`: "info" or "warning"."""
        self.emit({"event": "note", "level": level, "message": message})

    def step(self, event: Mapping[str, Any]) -> None:
        """Report a logged step. `event`: the event `step`, as events.py describes it."""
        self.emit(event)
        left_out = ("event", "step", "total", "eta_s")
        self._log({"step": event["step"], "split": "train", **{k: v for k, v in event.items() if k not in left_out}})
        if time.monotonic() - self._recorded_at > RECORD_EVERY_S:
            self._record(step=event["step"])

    def evaluation(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Report an evaluation."""
        self.metrics = dict(metrics)
        self.emit({"event": "eval", "step": step, "total": total, "metrics": self.metrics})
        self._log({"step": step, "split": "eval", **metrics})
        self._record(step=step, metrics=self.metrics)

    def test(self, step: int, checkpoint: int, metrics: Mapping[str, float]) -> None:
        """Report the score of a checkpoint on the test set, at the last step."""
        self.metrics |= {f"test_{name}": value for name, value in metrics.items()}
        self.emit({"event": "test", "checkpoint": checkpoint, "metrics": dict(metrics)})
        self._log({"step": step, "split": "test", "checkpoint": checkpoint, **metrics})

    def pictures(self, step: int, folder: Path) -> None:
        """Give the pictures (*.png) of a step to W&B."""
        if self._wandb:
            self._wandb.pictures(step, folder)

    def _log(self, row: Mapping[str, Any]) -> None:
        self._file.append(row)
        if self._wandb:
            self._wandb.log(row)

    def flush(self) -> None:
        """Flush metrics.jsonl to disk. A checkpoint or an evaluation counts as done only after its rows are on disk."""
        self._file.flush(durable=True)

    def committed(self, step: int) -> None:
        """Record the checkpoint of `step` as committed."""
        self.checkpoint = step
        self._record(checkpoint=step)

    def end(self, state: str, step: int, total: int, early: str | None = None) -> None:
        """Close everything and report the end.

        Args:
            state: "finished" or "preempted".
            early: why a finished run ended before its last step, in words.
        """
        self._record(step=step, metrics=self.metrics, stopped_early=early)
        if self._wandb:
            self._wandb.finish(step, self.paths.figures, finished=state == "finished")
        self._file.close()
        self.emit({"event": "end", "state": state, "step": step, "total": total, "metrics": self.metrics,
                   "checkpoint": self.checkpoint, "stopped_early": early})

    def _record(self, **changes: Any) -> None:
        """Write `changes` into run.json, if the file exists. Without `launch` the run directory may have no run.json."""
        with self._record_lock:
            self._recorded_at = time.monotonic()
            if self.attempt is not None and max(self.paths.attempt_numbers(), default=0) > self.attempt:
                # A newer attempt has taken the run over. The stop ends with an error, because this attempt can no longer save.
                request_stop()
                return
            try:
                update_json(self.paths.record, **changes, updated=utc_now())
                self._record_fails = False
            except FileNotFoundError:
                pass
            except OSError as error:
                if not self._record_fails:
                    self.note("warning", f"{self.paths.record} cannot be written: {error.strerror}; training continues")
                self._record_fails = True
