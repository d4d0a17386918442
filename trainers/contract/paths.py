"""The names in a run directory, for writers and readers alike. Imports no torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPaths:
    """One run's directory: every name in it is spelled here and nowhere else."""

    root: Path

    @property
    def id(self) -> str:
        return self.root.name

    @property
    def spec(self) -> Path:
        """The resolved spec: what the run is. Never changes."""
        return self.root / "run.yaml"

    @property
    def spread(self) -> Path:
        """Keys of `train` that a resumption has set anew: how the models are spread, which changes no number."""
        return self.root / "spread.json"

    @property
    def record(self) -> Path:
        """What became of it, small."""
        return self.root / "run.json"

    @property
    def micro_batch(self) -> Path:
        """Of `train.micro_batch_size=auto`: which sizes did not fit, in which attempt."""
        return self.root / "micro_batch.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step or evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def init(self) -> Path:
        """Holds the checkpoint that it starts from, until it has one of its own."""
        return self.root / "init"

    def first_weights(self, source: str) -> Path:
        """Where the weights of `init.source` lie: in `init`, if they are kept there."""
        kept = self.init / Path(source).name
        return kept if kept.exists() else Path(source)

    @property
    def evaluations(self) -> Path:
        """Where the evaluations of its checkpoints outside training lie, as runs do in theirs."""
        return self.root / "evals"

    @property
    def pieces(self) -> Path:
        """A search's finished pieces of work, a file each."""
        return self.root / "pieces"

    @property
    def results(self) -> Path:
        """A search's table: `cv_results_`, a line a grid point."""
        return self.root / "cv_results.csv"

    @property
    def model(self) -> Path:
        """A search's best forest, fitted to all rows."""
        return self.root / "model.npz"

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    def export(self, step: int) -> Path:
        """The models of a checkpoint as files for others."""
        return self.root / "export" / f"step_{step}"

    @property
    def descriptions(self) -> Path:
        return self.root / "huggingface"

    def huggingface(self, model: str) -> Path:
        """What Hugging Face's layout of a model has beside its weights."""
        return self.descriptions / model

    @property
    def code(self) -> Path:
        """The user's code as it was at submission."""
        return self.root / "code"

    def submission(self, number: int) -> Path:
        """What was handed to SLURM, and what its node processes say."""
        return self.root / "submissions" / str(number)

    def submission_numbers(self) -> list[int]:
        """The submissions so far, oldest first."""
        return _numbers(self.root / "submissions")

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step}"

    def attempt(self, number: int) -> Path:
        return self.attempts / str(number)

    def attempt_record(self, number: int) -> Path:
        """Who ran this attempt, on what, and how it ended."""
        return self.attempt(number) / "attempt.json"

    def slow(self, number: int) -> Path:
        """Which of this attempt's ranks are slower than the others; not there if none ever was."""
        return self.attempt(number) / "slow.json"

    def claim(self, number: int, key: str) -> Path:
        """A folder: which rank makes it has that piece of the search in this attempt."""
        return self.attempt(number) / "claims" / key

    def cancellation(self, number: int) -> Path:
        """Exists if somebody asked for this attempt to be cancelled."""
        return self.attempt(number) / "cancelled"

    def plan(self, number: int) -> Path:
        return self.attempt(number) / "plan"

    def log(self, number: int, rank: int) -> Path:
        return self.attempt(number) / "logs" / f"{rank}.log"

    def logs(self, number: int) -> dict[int, Path]:
        """The logs there are, by rank, in order."""
        found = self.attempt(number).glob("logs/*.log")
        return dict(sorted((int(p.stem), p) for p in found if p.stem.isdigit()))

    def attempt_numbers(self) -> list[int]:
        """The attempts taken so far, oldest first; an attempt is taken by making its folder."""
        return _numbers(self.attempts)

    def checkpoint_steps(self) -> list[int]:
        """Steps whose checkpoint was committed, oldest first. Whether one is whole, its manifest says."""
        try:
            names = os.listdir(self.checkpoints)
        except FileNotFoundError:
            return []
        return sorted(int(m[1]) for m in (re.fullmatch(r"step_(\d+)", name) for name in names) if m)


def _numbers(folder: Path) -> list[int]:
    """The folders in it that are named by a number."""
    try:
        return sorted(int(name) for name in os.listdir(folder) if name.isdigit())
    except FileNotFoundError:
        return []
