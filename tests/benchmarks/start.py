"""Measure the time of `launch --help`, of `launch show`, and until the first training step, in alternating turns with other
tools.

    python tests/benchmarks/start.py [turns]
"""

from __future__ import annotations

import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BIN = Path(sys.executable).parent
FIRST_STEP = ["cifar10", "data=sample", "model.width=0.1", "train.steps=1", "train.batch_size=64", "eval.every=never",
              "checkpoint.every=never", "--procs", "2"]


def seconds(*command: str) -> float:
    """Run a command and return the seconds that it takes."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def seconds_to_first_step(command: list[str], folder: Path) -> float:
    """Return the seconds from the start of a command to its first logged step."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if line.startswith("step 1/"):
            passed = time.perf_counter() - began
            process.communicate()
            return passed
    raise SystemExit(f"the command ended without a first step: {shlex.join(command)}")


def torchrun_command(folder: Path) -> list[str]:
    """Return the torchrun command for the same run, in a new run directory."""
    dry_run = subprocess.run([str(BIN / "launch"), *FIRST_STEP, "--dry-run", "--json"], cwd=folder, check=True,
                           capture_output=True, text=True)
    plan = json.loads(dry_run.stdout)
    for path, text in plan["files"].items():
        (Path(plan["folder"]) / path).parent.mkdir(parents=True, exist_ok=True)
        (Path(plan["folder"]) / path).write_text(text)
    words = shlex.split(plan["equivalent"])
    return [str(BIN / "torchrun") if word == "torchrun" else word for word in words]


def compare(turns: int, first, second) -> None:
    """Call two functions in alternating order, and print the medians and the ratio of the seconds that they return."""
    pairs = []
    for turn in range(turns):
        pairs.append((first(), second()) if turn % 2 else (second(), first())[::-1])
    ratios = [a / b for a, b in pairs]
    print(f"  {statistics.median(a for a, _ in pairs):.2f} s against {statistics.median(b for _, b in pairs):.2f} s "
          f"(medians of {turns}); ratio {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}",
          flush=True)


def main() -> None:
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    folder = Path(tempfile.mkdtemp())
    try:
        launch = str(BIN / "launch")
        print("launch --help against accelerate launch --help")
        compare(turns, lambda: seconds(launch, "--help"), lambda: seconds(str(BIN / "accelerate"), "launch", "--help"))
        print("launch show cifar10 against launch --help")
        compare(turns, lambda: seconds(launch, "show", "cifar10"), lambda: seconds(launch, "--help"))
        print("first training step of 2 ranks, launch against torchrun")
        compare(turns, lambda: seconds_to_first_step([launch, *FIRST_STEP], folder),
                lambda: seconds_to_first_step(torchrun_command(folder), folder))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
