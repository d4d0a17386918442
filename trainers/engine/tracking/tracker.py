"""What rank 0 says of the run while it runs: to the terminal and log (events), metrics.jsonl, run.json, W&B."""

from __future__ import annotations

import threading
import time
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

RECORD_EVERY_S = 1.0


class NoTracker:
    """Ranks other than 0 say nothing."""

    def note(self, level: str, message: str) -> None: ...
    def say(self, event: Mapping[str, Any]) -> None: ...
    def step(self, event: Mapping[str, Any]) -> None: ...
    def evaluation(self, step: int, total: int, metrics: Mapping[str, float]) -> None: ...
    def committed(self, step: int) -> None: ...
    def before_checkpoint(self) -> None: ...
    def end(self, state: str, step: int, total: int) -> None: ...


class Tracker(NoTracker):
    def __init__(self, config: RunConfig, paths: RunPaths, step: int, total: int, metrics: Mapping[str, float],
                 evaluated: bool, attempt: int | None):
        """Where the run begins or resumes: its `step`, its last evaluation's `metrics`, and whether that of this
        step was done. `attempt`: this one's number; once there is a newer one, the record is that one's.

        Raises:
            TrainingError: the run directory cannot be written.
        """
        self.paths, self.attempt = paths, attempt
        self.metrics = dict(metrics)
        self.checkpoint: int | None = None
        self._recording = threading.Lock()  # checkpoints commit in a thread of their own
        self._recorded_at = 0.0
        self._record_fails = False
        try:
            self._file = MetricsFile(paths.metrics, step, evaluated, lambda text: self.note("warning", text))
        except OSError as error:
            raise TrainingError(f"{paths.metrics} cannot be written: {error.strerror}",
                                f"mend that, then `launch resume {paths.id}`") from error
        self._wandb = self._track(config, step) if config.wandb.mode != "off" else None
        self._record(step=step, total=total, metrics=self.metrics)

    def _track(self, config: RunConfig, step: int) -> WandbRun | None:
        """None, and a note, where W&B cannot work at all (a bad project name, a folder that it cannot write)."""
        try:
            return WandbRun(config, self.paths, step, self._file.kept, self.note)
        except Exception as error:
            self.note("warning", f"W&B cannot track this run ({' '.join(str(error).split())}); it goes on without, "
                                 "metrics.jsonl has everything")
            return None

    def say(self, event: Mapping[str, Any]) -> None:
        events.emit(event)

    def note(self, level: str, message: str) -> None:
        self.say({"event": "note", "level": level, "message": message})

    def step(self, event: Mapping[str, Any]) -> None:
        """A logged step: `event` as events.py describes it."""
        self.say(event)
        about = ("event", "step", "total", "eta_s")
        self._log({"step": event["step"], "split": "train", **{k: v for k, v in event.items() if k not in about}})
        if time.monotonic() - self._recorded_at > RECORD_EVERY_S:
            self._record(step=event["step"])

    def evaluation(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self.metrics = dict(metrics)
        self.say({"event": "eval", "step": step, "total": total, "metrics": self.metrics})
        self._log({"step": step, "split": "eval", **metrics})
        self._record(step=step, metrics=self.metrics)

    def _log(self, row: Mapping[str, Any]) -> None:
        self._file.append(row)
        if self._wandb:
            self._wandb.log(row)

    def before_checkpoint(self) -> None:
        """What a checkpoint's step has logged must be on disk when it commits."""
        self._file.flush(durable=True)

    def committed(self, step: int) -> None:
        self.checkpoint = step
        self._record(checkpoint=step)

    def end(self, state: str, step: int, total: int) -> None:
        """`state`: finished or preempted."""
        self._record(step=step, metrics=self.metrics)
        if self._wandb:
            self._wandb.finish(step, self.paths.figures, finished=state == "finished")
        self._file.close()
        self.say({"event": "end", "state": state, "step": step, "total": total, "metrics": self.metrics,
                  "checkpoint": self.checkpoint})

    def _record(self, **changes: Any) -> None:
        """run.json, if this run has one (ranks started by hand need none)."""
        with self._recording:
            self._recorded_at = time.monotonic()
            if self.attempt is not None and max(self.paths.attempt_numbers(), default=0) > self.attempt:
                request_stop()  # which ends in an error: nothing can be saved any more
                return
            try:
                update_json(self.paths.record, **changes, updated=utc_now())
                self._record_fails = False
            except FileNotFoundError:
                pass
            except OSError as error:
                if not self._record_fails:
                    self.note("warning", f"{self.paths.record} cannot be written: {error.strerror}; training goes on")
                self._record_fails = True
