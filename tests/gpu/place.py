"""Where a check runs, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


class Wrong(Exception):
    """A check found something wrong, and cannot go on."""


@dataclass(frozen=True)
class Place:
    """Where a check runs.

    Attributes:
        toy: whether the check runs on the CPU at toy size, so that the check itself is tested.
        folder: an empty folder for the check's files.
        answers: the file that takes what the check says. A check that is killed has said it all the same.
    """

    toy: bool
    folder: Path
    answers: Path

    @property
    def device(self) -> str:
        return "cpu" if self.toy else "cuda"

    def say(self, **figures: Any) -> None:
        """Add figures to what the check reports."""
        self._write({"said": figures})

    def expect(self, right: bool, otherwise: str) -> bool:
        """Let the check fail with the words `otherwise` unless `right`. The check goes on. Return `right`."""
        if not right:
            self._write({"wrong": otherwise})
        return right

    def end(self) -> None:
        """Say that the check has come to its end."""
        self._write({"end": True})

    def launch(self, *words: object, codes: tuple[int, ...] = (0,), **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `launch` with these words in the check's folder, as a user does.

        Raises:
            Wrong: the exit code is none of `codes`.
        """
        return self.run([sys.executable, "-P", "-m", "launch", *map(str, words)], variables, codes)

    def ranks(self) -> tuple[str, str]:
        """Return the words that ask `launch` for one rank."""
        return ("--procs", "1") if self.toy else ("--gpus", "1")

    def task(self, name: str) -> Path:
        """Write the spec of a task of tasks.py, and return its file."""
        text = (TESTS / "sentences" / "sentences.yaml").read_text().replace("sentences:Counting", f"tasks:{name}")
        file = self.folder / f"{name.lower()}.yaml"
        file.write_text(f"{text}path: {Path(__file__).parent}\n")
        return file

    def python(self, module: str, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a module in a new Python. Raises: Wrong: the exit code is not 0."""
        return self.run([sys.executable, "-m", module, *map(str, words)], variables)

    def run(self, command: list[str], variables: Mapping[str, str] = {}, codes: tuple[int, ...] = (0,)
            ) -> subprocess.CompletedProcess[str]:
        """Run a command in the check's folder. Raises: Wrong: the exit code is none of `codes`."""
        done = subprocess.run(command, cwd=self.folder, env={**os.environ, **variables}, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, errors="replace")
        print(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}", flush=True)
        if done.returncode not in codes:
            raise Wrong(f"exit code {done.returncode} of `{' '.join(command[1:])}`: {last_line(done.stdout + done.stderr)}")
        return done

    def run_folder(self) -> Path:
        """Return the folder of the only run that `launch` has made here."""
        (folder,) = (self.folder / "runs").iterdir()
        return folder

    def _write(self, answer: Mapping[str, Any]) -> None:
        with self.answers.open("a") as file:
            file.write(json.dumps(answer, default=str) + "\n")


def last_line(text: str, most: int = 300) -> str:
    """Return the last line of a text that is not empty."""
    return next((line.strip()[:most] for line in reversed(text.splitlines()) if line.strip()), "")
