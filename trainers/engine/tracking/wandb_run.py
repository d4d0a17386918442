"""The run in Weights & Biases: its id is the run's id, so that every attempt continues the same one."""

from __future__ import annotations

import struct
import threading
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

from trainers.config.schema import RunConfig, SearchConfig
from trainers.contract import exit_codes
from trainers.contract.files import read_json
from trainers.contract.paths import RunPaths

ONLINE_WITHIN_S = 30
STOP_WITHIN_S = 20
BLOCK = 32768


class WandbRun:
    """A W&B run, online or offline, whose own step is ours.

    W&B only appends: a step of its history cannot be taken back, and `wandb sync` moves a repeated one up.
    So steps that it has are not logged again, and what an attempt that was killed did not get to write is
    logged from metrics.jsonl.
    """

    def __init__(self, config: RunConfig | SearchConfig, paths: RunPaths, step: int, rows: Iterable[Mapping[str, Any]],
                 note: Callable[[str, str], None]):
        """`rows`: what metrics.jsonl holds up to `step`, from which the run resumes.
        `note(level, message)` tells the user why a run that was to be online is offline, or not tracked any more."""
        import wandb

        try:
            run_id = read_json(paths.record)["id"]  # the folder's name, unless that was changed
        except FileNotFoundError:
            run_id = paths.id
        common: dict[str, Any] = dict(
            id=run_id, name=run_id, project=config.wandb.project, entity=config.wandb.entity, resume="allow",
            dir=str(paths.root), config=config.model_dump(mode="json"), job_type=config.name,
        )
        self._note, self._broken = note, False
        self._stop_within_s = min(STOP_WITHIN_S, config.run.grace_s / 3)
        self._resumed_at: int | None = None
        self._late: dict[str, Any] = {}  # an evaluation that was still to come when its step was logged
        settings = wandb.Settings(console="off", silent=True, init_timeout=ONLINE_WITHIN_S)
        before = offline_step(paths.root)
        offline = "not asked for"
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
        self._logged = max(before, self._run.step - 1)  # of an online run, the server's last step
        if self._run.url:
            note("info", f"W&B: {self._run.url}")
        for row in rows:
            self.log(row)
        self._resumed_at = step

    def log(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl."""
        about = ("step", "split", "unit")
        values = {f"{row['split']}/{k}": v for k, v in row.items() if k not in about}
        if row["step"] > self._logged:
            self._safely(lambda: self._run.log({**self._late, **values}, step=row["step"]))
            self._late = {}
        elif row["step"] == self._resumed_at and row["split"] == "eval":
            self._late = values

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows that have the same keys, as a table, with what is logged next."""
        columns = list(rows[0])
        self._safely(lambda: self._run.log({name: self._wandb.Table(columns, [list(row.values()) for row in rows])},
                                           commit=False))

    def finish(self, step: int, figures: Path, finished: bool) -> None:
        """Log the pictures and end. `finished` False: stopped, to be resumed, and so within a time."""

        def last() -> None:
            pictures = {f"figures/{p.stem}": self._wandb.Image(str(p)) for p in sorted(figures.glob("*.png"))}
            if pictures or self._late:
                self._run.log({**self._late, **pictures}, step=max(step, self._logged + 1))

        def end() -> None:
            if not finished:
                self._run.mark_preempting()
            self._run.finish(exit_code=exit_codes.FINISHED if finished else exit_codes.PREEMPTED)

        self._safely(last)
        ending = threading.Thread(target=lambda: self._safely(end), daemon=True)
        ending.start()
        ending.join(None if finished else self._stop_within_s)
        if ending.is_alive():
            self._note("warning", f"W&B has not taken everything within {self._stop_within_s:g} s; the next attempt "
                                  "logs the rest")

    def _safely(self, call: Callable[[], Any]) -> None:
        """Training does not depend on W&B."""
        if self._broken:
            return
        try:
            call()
        except Exception as error:
            self._broken = True
            self._note("warning", f"W&B failed ({' '.join(str(error).split())}); the run goes on without it, "
                                  "metrics.jsonl has everything")


def offline_step(folder: Path) -> int:
    """The last step in the W&B files that earlier attempts have left in a run directory; 0 if there is none."""
    steps = (record.history.step.num for path in folder.glob("wandb/offline-run-*/*.wandb")
             for record in offline_records(path) if record.WhichOneof("record_type") == "history")
    return max(steps, default=0)


def offline_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file, as far as it was written: LevelDB's log format
    (https://github.com/google/leveldb/blob/main/doc/log_format.md), after 7 bytes of W&B's own."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        length, kind = struct.unpack("<HB", data[at + 4:at + 7]) if left >= 7 else (0, 0)
        if kind == 0:  # the rest of the block is empty
            at += left
            continue
        parts += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            try:
                record.ParseFromString(parts)
            except DecodeError:  # cut off
                return
            yield record
            parts = b""
