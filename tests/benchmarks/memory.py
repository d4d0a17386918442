"""The memory of ranks under each strategy, beside what `launch plan` expects of it.

    python tests/benchmarks/memory.py [--width 1024] [--depth 16] [--ranks 4] [--accumulation 1] [strategy[+offload]...]

The tests' small Transformer, made large (1024 x 16: 202M parameters), on batches so small that their activations are
nothing. Each CPU rank says how far its resident memory rose above what it was before the model was made: while it got
ready, and in its steps. What is freed goes back to the system at once here (MALLOC_MMAP_THRESHOLD_), so that it counts
bytes in use, as torch.cuda.max_memory_allocated does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "sentences"))

import torch
from sentences import Counting, Model

from trainers.config.memory import expected
from trainers.config.schema import RunConfig
from trainers.probe import count

STEPS = 4
SPEC = Path(__file__).parents[1] / "sentences" / "sentences.yaml"


def status(field: str) -> int:
    """Bytes, of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Measured(Counting):
    calls = 0

    def model(self):
        forget_peak()
        self.before = status("VmRSS")
        return super().model()

    def loss(self, model, batch):
        peak = status("VmHWM") - self.before
        if self.calls == 0:
            self.ready = peak
            forget_peak()
        self.calls += 1
        if self.calls > int(os.environ["CALLS"]):
            Path(os.environ["OUT"], os.environ["RANK"]).write_text(json.dumps([self.ready, peak]))
            os._exit(0)  # without a checkpoint of gigabytes
        return super().loss(model, batch)


def measure(words: argparse.Namespace, strategy: str) -> list[int]:
    """The highest of all ranks, in bytes: while they got ready, in steps."""
    name, _, offload = strategy.partition("+")
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder, "memory.yaml")
        spec.write_text(SPEC.read_text().replace("sentences:Counting", "memory:Measured") + f"path: {Path(__file__).parent}\n")
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OUT": folder, "CALLS": str(STEPS * words.accumulation)}
        done = subprocess.run(
            [sys.executable, "-P", "-m", "launch", str(spec), "--procs", str(words.ranks), "--strategy", name,
             f"train.batch_size={words.ranks * words.accumulation}", "train.micro_batch_size=1", "train.steps=100",
             f"model.width={words.width}", f"model.depth={words.depth}", "model.heads=8", f"train.offload={offload or 'none'}",
             f"optim.name={words.optim}", f"train.precision={words.precision}", *words.keys],
            cwd=folder, env=env, capture_output=True, text=True, check=False)
        found = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(words.ranks)
                 if Path(folder, str(rank)).exists()]
        if not found:
            sys.exit(done.stdout[-3000:] + done.stderr)
    return [max(pair) for pair in zip(*found)]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("width", 1024), ("depth", 16), ("ranks", 4), ("accumulation", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--optim", default="adamw")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--keys", nargs="*", default=[])
    parser.add_argument("strategies", nargs="*", default=["ddp", "zero1", "zero2", "zero3", "fsdp"])
    words = parser.parse_args()
    with torch.device("meta"):
        counts = count({"model": Model(words.width, 8, words.depth)})
    print(f"{counts.parameters:,} parameters, {words.ranks} ranks, MiB of the rank that takes most")
    print(f"{'':20}  {'measured':>9}  {'of first':>8}  {'expected':>9}  {'off by':>7}  getting ready")
    first = 0
    for strategy in words.strategies:
        ready, steps = measure(words, strategy)
        most = max(ready, steps)
        first = first or most
        name, _, offload = strategy.partition("+")
        train = {"steps": 1, "batch_size": words.ranks * words.accumulation, "micro_batch_size": 1, "strategy": name,
                 "offload": offload or "none", "precision": words.precision}
        spec = RunConfig(name="run", task="sentences:Counting", train=train, optim={"name": words.optim})
        told = expected(spec, counts, words.ranks, "cpu").total
        print(f"{strategy:20}  {most / 2**20:9.0f}  {most / first:8.2f}  {told / 2**20:9.0f}  {told / most - 1:7.1%}  "
              f"{ready / 2**20:.0f}", flush=True)


if __name__ == "__main__":
    main()
