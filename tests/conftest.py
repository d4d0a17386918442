"""Commands run as a user runs them: `launch ...` in a folder of its own, real ranks over gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
BLOBS = TESTS / "blobs" / "blobs.yaml"
SENTENCES = TESTS / "sentences" / "sentences.yaml"

WORKERS = 2  # of which one may compute while the other's test waits, for SLURM or for a rank's end
# What takes longest, which the workers begin with, so that they end together.
LONGEST = ("slurm/test_interruptions.py", "test_same_run.py", "trainers/engine/parallel/test_strategies.py",
           "slurm/test_submission.py", "test_training.py", "slurm/test_explain.py", "slurm/test_many.py", "slurm/test_reading.py",
           "slurm/test_doctor.py")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes run the tests; none but this one for those of one file, or to see what they print (-s)."""
    places = [Path(arg.partition("::")[0]) for arg in config.args]
    one = len(set(places)) == 1 and places[0].is_file()
    return 0 if one or config.option.capture == "no" else WORKERS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def environment(**more: str) -> dict[str, str]:
    """This process's, without what would change what a run is."""
    drop = ("WANDB_", "LAUNCH_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    return {k: v for k, v in os.environ.items() if not k.startswith(drop)} | {"COLUMNS": "200"} | more


@dataclass
class Command:
    """`launch` in a folder."""

    folder: Path

    def start(self, *args: object, ignoring: tuple[int, ...] = (), **env: str) -> subprocess.Popen:
        """`ignoring`: the stop signals that the command is started to ignore. The rest it gets as from a terminal:
        a shell's background job, such as a CI's, would ignore some, and so would what it starts."""

        def signals() -> None:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
                signal.signal(number, signal.SIG_IGN if number in ignoring else signal.SIG_DFL)

        return subprocess.Popen(
            [sys.executable, "-P", "-m", "launch", *map(str, args)], cwd=self.folder, env=environment(**env),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=signals,
        )

    def __call__(self, *args: object, **env: str) -> subprocess.CompletedProcess:
        process = self.start(*args, **env)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def runs(self) -> list[Path]:
        return sorted((self.folder / "runs").glob("*"))

    def run(self) -> Path:
        """The only run."""
        (folder,) = self.runs()
        return folder


@pytest.fixture
def launch(tmp_path: Path) -> Command:
    return Command(tmp_path)


def rows(run: Path, split: str = "train") -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def record(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def attempt(run: Path, number: int) -> dict:
    return json.loads((run / "attempts" / str(number) / "attempt.json").read_text())


def wait_until(condition, timeout_s: float = 120, process: subprocess.Popen | None = None):
    """The first true value of `condition()`; a process that ends before it, or time, is a failure."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if value := condition():
            return value
        if process is not None and process.poll() is not None:
            out, err = process.communicate()
            pytest.fail(f"it ended with {process.returncode} before what was waited for:\n{out}\n{err}")
        time.sleep(0.005)
    pytest.fail(f"not within {timeout_s} s")


def pace(run: Path, pause_s: float) -> None:
    """From now on the ranks of a run that began with `model.pause_s` pause this long instead before each batch."""
    (run / "pace.new").write_text(str(pause_s))
    (run / "pace.new").replace(run / "pace")


def logged_steps(folder: Path) -> int:
    """Lines in the only run's metrics file so far."""
    try:
        (path,) = folder.glob("runs/*/metrics.jsonl")
        return path.read_text().count("\n")
    except (ValueError, FileNotFoundError):
        return 0


def ranks_of(pid: int) -> list[int]:
    """Pids of a node process's ranks."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
