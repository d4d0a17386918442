"""The names of files and folders in a run directory, for all writers and readers. Imports no torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPaths:
    """The paths in one run's directory. No other code spells these names."""

    root: Path

    @property
    def id(self) -> str:
        return self.root.name

    @property
    def spec(self) -> Path:
        """The resolved spec, which says what the run is. It never changes."""
        return self.root / "run.yaml"

    @property
    def changes(self) -> Path:
        """Keys that a resumption has changed, by section: how the models are distributed, limits, and where the data lies. They
        change no result."""
        return self.root / "changes.json"

    @property
    def record(self) -> Path:
        """The run's small record: its state and results."""
        return self.root / "run.json"

    @property
    def slurm(self) -> Path:
        """How the run's jobs ended, as SLURM said while it still remembered them."""
        return self.root / "slurm.json"

    @property
    def micro_batch(self) -> Path:
        """For `train.micro_batch_size=auto`: which sizes did not fit, and in which attempt."""
        return self.root / "micro_batch.json"

    @property
    def not_deterministic(self) -> Path:
        """For `train.deterministic`: the operation without a deterministic kernel, and the attempt that met it."""
        return self.root / "not_deterministic.json"

    @property
    def metrics(self) -> Path:
        """One JSON object for each logged step or evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def init(self) -> Path:
        """Folder with the checkpoint that the run starts from, until the run has its own checkpoint."""
        return self.root / "init"

    def first_weights(self, source: str) -> Path:
        """Return the path of the weights of `init.source`: the copy in `init`, if there is one."""
        kept = self.init / Path(source).name
        return kept if kept.exists() else Path(source)

    @property
    def evaluations(self) -> Path:
        """Folder with the runs that evaluate this run's checkpoints outside training."""
        return self.root / "evals"

    @property
    def pieces(self) -> Path:
        """A search's finished pieces of work, one file each."""
        return self.root / "pieces"

    @property
    def results(self) -> Path:
        """A search's table: `cv_results_`, one line for each grid point."""
        return self.root / "cv_results.csv"

    @property
    def model(self) -> Path:
        """A search's best forest, fitted to all rows."""
        return self.root / "model.npz"

    @property
    def figures(self) -> Path:
        """Folder with the pictures of the end, and with a folder for the pictures of each evaluation: see `pictures`."""
        return self.root / "figures"

    def pictures(self, step: int) -> Path:
        """Folder with the pictures that the task drew at the evaluation of a step."""
        return self.figures / f"step_{step}"

    def picture_steps(self) -> list[int]:
        """Return the steps with pictures, oldest first."""
        return _steps(self.figures)

    @property
    def rows(self) -> Path:
        """A prediction's rows, in the order of its input, unless they go into another file."""
        return self.root / "rows.txt"

    @property
    def row_parts(self) -> Path:
        """Folder with the rows of each rank, until rank 0 has merged them."""
        return self.root / "rows"

    @property
    def lines(self) -> Path:
        """The input of a prediction, if it did not come from one file."""
        return self.root / "lines.txt"

    def export(self, step: int) -> Path:
        """Folder with the models of a checkpoint, exported as files for other tools."""
        return self.root / "export" / f"step_{step}"

    @property
    def descriptions(self) -> Path:
        """Folder with a folder for each model: see `huggingface`."""
        return self.root / "huggingface"

    def huggingface(self, model: str) -> Path:
        """Folder with the files of a model's Hugging Face layout, without the weights."""
        return self.descriptions / model

    @property
    def code(self) -> Path:
        """The user's code as it was at submission."""
        return self.root / "code"

    def submission(self, number: int) -> Path:
        """Folder with what was given to SLURM, and with the output of the node processes."""
        return self.root / "submissions" / str(number)

    def submission_numbers(self) -> list[int]:
        """Return the numbers of the submissions so far, oldest first."""
        return _numbers(self.root / "submissions")

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step}"

    def attempt(self, number: int) -> Path:
        return self.attempts / str(number)

    def attempt_owner(self, number: int) -> Path:
        """The process that has taken this attempt: host, pid, and the start of the process."""
        return self.attempt(number) / "owner.json"

    def attempt_record(self, number: int) -> Path:
        """The attempt's record: who ran the attempt, on what, and how it ended."""
        return self.attempt(number) / "attempt.json"

    def slow(self, number: int) -> Path:
        """Which of this attempt's ranks were slower than the others. The file does not exist if no rank was."""
        return self.attempt(number) / "slow.json"

    def claim(self, number: int, key: str) -> Path:
        """A folder by which ranks claim a piece of the search: the rank that makes the folder does the piece in this attempt."""
        return self.attempt(number) / "claims" / key

    def cancellation(self, number: int) -> Path:
        """A file that exists if somebody asked to cancel this attempt."""
        return self.attempt(number) / "cancelled"

    def stop_reason(self, number: int) -> Path:
        """Why this attempt was asked to stop, in words, where the process that asked knows it better than the ranks' node."""
        return self.attempt(number) / "stopped"

    def life_sign(self, number: int, node: int) -> Path:
        """A file that the process which supervises the ranks of a node overwrites every few seconds."""
        return self.attempt(number) / "alive" / f"{node}.json"

    def plan(self, number: int) -> Path:
        return self.attempt(number) / "plan"

    def log(self, number: int, rank: int) -> Path:
        return self.attempt(number) / "logs" / f"{rank}.log"

    def logs(self, number: int) -> dict[int, Path]:
        """Return the existing logs by rank, in the order of the ranks."""
        logs = self.attempt(number).glob("logs/*.log")
        return dict(sorted((int(p.stem), p) for p in logs if p.stem.isdecimal()))

    def attempt_numbers(self) -> list[int]:
        """Return the numbers of the attempts so far, oldest first. A process takes an attempt by making its folder."""
        return _numbers(self.attempts)

    def checkpoint_steps(self) -> list[int]:
        """Return the steps with a committed checkpoint, oldest first. Only a checkpoint's manifest can prove it whole."""
        return _steps(self.checkpoints)


def _steps(folder: Path) -> list[int]:
    """Return the numbers of the names `step_<n>` in a folder, sorted."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(m[1]) for m in (re.fullmatch(r"step_(\d+)", name) for name in names) if m)


def _numbers(folder: Path) -> list[int]:
    """Return the numbers that are names in a folder, sorted."""
    try:
        return sorted(int(name) for name in os.listdir(folder) if name.isdecimal())
    except FileNotFoundError:
        return []
