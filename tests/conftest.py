"""Helpers that run `launch ...` as a user does, in a folder of its own and with real ranks over gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from ranks import Ranks

TESTS = Path(__file__).parent
BLOBS = TESTS / "blobs" / "blobs.yaml"
SENTENCES = TESTS / "sentences" / "sentences.yaml"
PAIRS = TESTS / "pairs" / "pairs.yaml"

# Test processes. With two, one can compute while the test of the other waits for SLURM or for a rank to end.
WORKERS = 2
# The slowest test files. The workers start with these files, so that all workers end at about the same time.
LONGEST = ("slurm/test_interruptions.py", "test_same_run.py", "trainers/engine/parallel/test_strategies.py",
           "slurm/test_submission.py", "test_training.py", "slurm/test_explain.py", "slurm/test_many.py", "slurm/test_reading.py",
           "slurm/test_doctor.py", "gpu/test_drive.py")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of worker processes: 0 (no workers) for the tests of a single file, or with `-s`."""
    paths = [Path(arg.partition("::")[0]) for arg in config.args]
    single_file = len(set(paths)) == 1 and paths[0].is_file()
    return 0 if single_file or config.option.capture == "no" else WORKERS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {TESTS / name: position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest) -> Iterator[Callable[[int], Ranks]]:
    """A function from a number of ranks to that many ranks of this test file (tests/ranks.py), which start on the first call."""
    started: dict[int, Ranks] = {}

    def start(size: int) -> Ranks:
        if size not in started:
            started[size] = Ranks(size, str(request.path))
        return started[size]

    yield start
    for each in started.values():
        each.close()


def environment(**more: str) -> dict[str, str]:
    """Return the environment of this process without the variables that would change a run, and with `more`."""
    drop = ("WANDB_", "LAUNCH_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    return {k: v for k, v in os.environ.items() if not k.startswith(drop)} | {"COLUMNS": "200"} | more


@dataclass
class Command:
    """The command `launch`, started in `folder`."""

    folder: Path

    def start(self, *args: object, ignoring: tuple[int, ...] = (), group: int | None = None, **env: str) -> subprocess.Popen:
        """Start `launch` with these arguments and do not wait for it.

        `ignoring` lists the stop signals that the command ignores from its start. All other stop signals have their default
        action, as in a terminal: a background job of a shell (in CI, for example) ignores some signals, and its child
        processes inherit that. With `group=0`, the command leads a process group, as a shell starts it.
        """

        def set_signal_actions() -> None:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
                signal.signal(number, signal.SIG_IGN if number in ignoring else signal.SIG_DFL)

        return subprocess.Popen(
            [sys.executable, "-P", "-m", "launch", *map(str, args)], cwd=self.folder, env=environment(**env),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=set_signal_actions,
            process_group=group,
        )

    def __call__(self, *args: object, **env: str) -> subprocess.CompletedProcess:
        """Run `launch` with these arguments until it ends."""
        process = self.start(*args, **env)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def runs(self) -> list[Path]:
        """Return the directories of all runs in the folder."""
        return sorted((self.folder / "runs").glob("*"))

    def run(self) -> Path:
        """Return the directory of the only run."""
        (folder,) = self.runs()
        return folder


@pytest.fixture
def launch(tmp_path: Path) -> Command:
    return Command(tmp_path)


def rows(run: Path, split: str = "train") -> list[dict]:
    """Return the rows of one split ("train" or "eval") in the run's metrics file."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def record(run: Path) -> dict:
    """Return the content of run.json."""
    return json.loads((run / "run.json").read_text())


def attempt(run: Path, number: int) -> dict:
    """Return the content of attempt.json of one attempt."""
    return json.loads((run / "attempts" / str(number) / "attempt.json").read_text())


def wait_until(condition, timeout_s: float = 120, process: subprocess.Popen | None = None):
    """Wait until `condition()` is true and return its value. Fail the test if `process` ends first, or after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if value := condition():
            return value
        if process is not None and process.poll() is not None:
            out, err = process.communicate()
            pytest.fail(f"the process ended with exit code {process.returncode} before the condition was true:\n{out}\n{err}")
        time.sleep(0.005)
    pytest.fail(f"the condition was not true within {timeout_s} s")


def set_pause(run: Path, pause_s: float) -> None:
    """Change how long the ranks of a run pause before each batch. The run must have been started with `model.pause_s`."""
    (run / "pace.new").write_text(str(pause_s))
    (run / "pace.new").replace(run / "pace")


def logged_steps(folder: Path) -> int:
    """Return the number of lines in the metrics file of the only run; 0 if the file does not exist."""
    try:
        (path,) = folder.glob("runs/*/metrics.jsonl")
        return path.read_text().count("\n")
    except (ValueError, FileNotFoundError):
        return 0


def ranks_of(pid: int) -> list[int]:
    """Return the pids of the ranks that the node process `pid` has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


def alive(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Make the folder and mount a file system of this size there, which needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> Path:
    """Fill a disk. Returns the file to delete to make room."""
    filler = disk / "filler"
    with suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler
