"""The run in Weights & Biases (W&B). Its id is the id of the run, so every attempt continues the same W&B run."""

from __future__ import annotations

import struct
import threading
import time
from itertools import groupby
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

from trainers.config.schema import RunConfig, SearchConfig
from trainers.contract import exit_codes
from trainers.contract.files import read_json
from trainers.contract.paths import RunPaths
from trainers.contract.signals import stop_requested

ONLINE_WITHIN_S = 30   # how long W&B may take to connect to its server
STOP_WITHIN_S = 20     # how long W&B may take to upload the rest when a run stops and will be resumed
FINISH_WITHIN_S = 600  # the same when a run has finished: its pictures and tables may be large
LOOK_EVERY_S = 0.5     # how soon a signal shortens the wait of a finished run
BLOCK = 32768          # bytes in a block of LevelDB's log format
HEADER = 7             # bytes of the header of a .wandb file, and of the header of each record in it


class WandbRun:
    """A W&B run, online or offline. The steps of its history are the training steps.

    W&B only appends: a step in its history cannot be removed, and `wandb sync` gives a repeated step a later number.
    Therefore a step that W&B has already is not logged again. Rows of metrics.jsonl that a killed attempt could not give to
    W&B are logged when the run resumes. An evaluation whose step W&B has, without the evaluation, is logged with the next row.
    """

    def __init__(self, config: RunConfig | SearchConfig, paths: RunPaths, rows: Iterable[Mapping[str, Any]],
                 note: Callable[[str, str], None]):
        """Start or continue the W&B run, and log the rows that W&B does not have yet.

        Args:
            rows: the rows of metrics.jsonl up to the step from which the run starts or resumes.
            note: called with (level, message): where the W&B page is, why the run is offline instead of online, or why W&B
                failed.

        Raises:
            Exception: W&B cannot start a run, even offline.
        """
        import wandb

        try:
            run_id = read_json(paths.record)["id"]  # the name of the run directory, unless somebody renamed it
        except FileNotFoundError:
            run_id = paths.id
        common: dict[str, Any] = dict(
            id=run_id, name=run_id, project=config.wandb.project, entity=config.wandb.entity, resume="allow",
            dir=str(paths.root), config=config.model_dump(mode="json"), job_type=config.name,
        )
        self._note, self._broken = note, False
        self._stop_within_s = min(STOP_WITHIN_S, config.run.grace_s / 3)
        self._late: dict[str, Any] = {}  # an evaluation whose step is in W&B already; logged together with the next row
        settings = wandb.Settings(console="off", silent=True, init_timeout=ONLINE_WITHIN_S)
        before, self._evaluated = offline_steps(paths.root)
        offline = "not asked for"  # why the run is offline; empty if it is online
        if config.wandb.mode == "online":
            try:
                offline = "" if wandb.login(prompt=False) else "no API key: set WANDB_API_KEY or use `wandb login`"
                if not offline:
                    self._run = wandb.init(mode="online", settings=settings, **common)
            except wandb.errors.Error as error:
                offline = " ".join(str(error).split()) or type(error).__name__
            if offline:
                note("warning", f"W&B is not online ({offline}); this run is tracked offline: upload it later with "
                                f"`launch sync {paths.id}`")
        if offline:
            self._run = wandb.init(mode="offline", settings=settings, **common)
        self._wandb = wandb
        self._logged = max(before, self._run.step - 1)  # of an online run, _run.step - 1 is the server's last step
        self._summary = {} if offline else dict(self._run.summary)  # the server's last value of each metric
        if self._run.url:
            note("info", f"W&B: {self._run.url}")
        drawn = set(paths.picture_steps())
        for step, of_step in groupby(rows, key=lambda row: row["step"]):
            for row in of_step:
                self.log(row)
            if step in drawn:
                self.pictures(step, paths.pictures(step))

    def log(self, row: Mapping[str, Any]) -> None:
        """Log a row of metrics.jsonl, unless W&B has its step already."""
        left_out = ("step", "split", "unit")
        values = {f"{row['split']}/{k}": v for k, v in row.items() if k not in left_out}
        if row["step"] > self._logged:
            self._safely(lambda: self._run.log({**self._late, **values}, step=row["step"]))
            self._late = {}
        elif row["split"] == "eval":
            self._late = {} if self._has_evaluation(row["step"], values) else values
        elif row["split"] == "test":
            self._late = {**self._late, **values}

    def pictures(self, step: int, folder: Path) -> None:
        """Log the pictures (*.png) of a step, next to its rows. A step that W&B has already keeps the pictures that it has; where
        its evaluation is logged late, the pictures are too."""

        def log() -> None:
            images = self._images(folder)
            if step > self._logged:
                self._run.log(images, step=step)
            elif self._late:
                self._late |= images

        self._safely(log)

    def _images(self, folder: Path) -> dict[str, Any]:
        return {f"figures/{path.stem}": self._wandb.Image(str(path)) for path in sorted(folder.glob("*.png"))}

    def _has_evaluation(self, step: int, values: Mapping[str, Any]) -> bool:
        """Return whether W&B has this evaluation from an earlier attempt. An evaluation that is repeated has the same values, so
        online, where only the last values are known, equal values tell."""
        return step <= self._evaluated or all(self._summary.get(name) == value for name, value in values.items())

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a table to the next row that is logged. All `rows` have the same keys, the names of the columns."""
        columns = list(rows[0])
        self._safely(lambda: self._run.log({name: self._wandb.Table(columns, [list(row.values()) for row in rows])},
                                           commit=False))

    def finish(self, step: int, figures: Path, finished: bool) -> None:
        """Log the pictures and end the W&B run.

        Args:
            step: the last training step.
            figures: the folder of the pictures (*.png).
            finished: W&B gets at most FINISH_WITHIN_S. If this is False, the run has stopped and will be resumed, or if a
                signal asks to stop meanwhile, W&B gets at most STOP_WITHIN_S, or a third of `run.grace_s` if that is shorter.
        """

        def log_last() -> None:
            pictures = self._images(figures)
            if pictures or self._late:
                self._run.log({**self._late, **pictures}, step=max(step, self._logged + 1))

        def end() -> None:
            if not finished:
                self._run.mark_preempting()
            self._run.finish(exit_code=exit_codes.FINISHED if finished else exit_codes.PREEMPTED)

        self._safely(log_last)
        ending = threading.Thread(target=lambda: self._safely(end), daemon=True)
        ending.start()
        began = time.monotonic()
        deadline = began + (FINISH_WITHIN_S if finished else self._stop_within_s)
        while ending.is_alive() and time.monotonic() < deadline:
            if finished and stop_requested():  # a run that is still there after the grace is killed, and counts as failed
                deadline = min(deadline, began + self._stop_within_s)
            ending.join(LOOK_EVERY_S)
        if ending.is_alive():
            rest = f"`wandb sync {Path(self._run.dir).parent}` uploads the rest" if finished else "the next attempt logs the rest"
            self._note("warning", f"W&B could not take all data in {time.monotonic() - began:.0f} s; {rest}")

    def _safely(self, call: Callable[[], Any]) -> None:
        """Call W&B. If W&B fails, warn the user and do not call W&B again: training does not depend on W&B."""
        if self._broken:
            return
        try:
            call()
        except Exception as error:
            self._broken = True
            self._note("warning", f"W&B failed ({' '.join(str(error).split())}); the run continues without W&B, and "
                                  "its folder has everything")


def offline_steps(folder: Path) -> tuple[int, int]:
    """Return the last step, and the last step with an evaluation, in the offline W&B files of earlier attempts in a run
    directory. Both are 0 if there is no such step."""
    last = evaluated = 0
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        for record in offline_records(path):
            if record.WhichOneof("record_type") == "history":
                step = record.history.step.num
                last = max(last, step)
                if any((item.key or item.nested_key[0]).startswith("eval/") for item in record.history.item):
                    evaluated = max(evaluated, step)
    return last, evaluated


def offline_records(path: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file, up to a record that was not written completely.

    The file is in LevelDB's log format (https://github.com/google/leveldb/blob/main/doc/log_format.md), after a header of 7
    bytes that W&B adds.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf comes without types
    from wandb.proto import wandb_internal_pb2

    data, offset, parts = path.read_bytes(), HEADER, b""
    while offset + HEADER <= len(data):
        left_in_block = BLOCK - offset % BLOCK
        # A record's header: 4 bytes of checksum, 2 bytes of length, 1 byte of kind.
        length, kind = struct.unpack("<HB", data[offset + 4:offset + HEADER]) if left_in_block >= HEADER else (0, 0)
        if kind == 0:  # the rest of the block is empty
            offset += left_in_block
            continue
        parts += data[offset + HEADER:offset + HEADER + length]
        offset += HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of a record
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]  # protobuf makes its classes at run time
            try:
                record.ParseFromString(parts)
            except DecodeError:  # the record was cut off
                return
            yield record
            parts = b""
