"""Measure the memory of the ranks under each strategy, next to the memory that `launch plan` expects.

    python tests/benchmarks/memory.py [--width 1024] [--depth 16] [--ranks 4] [--accumulation 1] [--ema 0.99]
        [strategy[+offload]...]

The model is the small Transformer of the tests, made large (1024 x 16: 202M parameters). The batches are so small that their
activations do not matter. Each CPU rank reports how far its resident memory rose above its memory before the model was made:
before the first loss is computed, and in the training steps. MALLOC_MMAP_THRESHOLD_ makes the C library return freed memory to
the system at once, so that resident memory is memory in use, as torch.cuda.max_memory_allocated counts.
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


def status_bytes(field: str) -> int:
    """Return a memory field of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Set VmHWM of this process to its present resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


class Measured(Counting):
    """The sentences task, which writes its peak memory to a file and ends after $CALLS losses."""

    calls = 0

    def model(self):
        reset_peak()
        self.before = status_bytes("VmRSS")
        return super().model()

    def loss(self, model, batch):
        peak = status_bytes("VmHWM") - self.before
        if self.calls == 0:
            self.ready = peak
            reset_peak()
        self.calls += 1
        if self.calls > int(os.environ["CALLS"]):
            Path(os.environ["OUT"], os.environ["RANK"]).write_text(json.dumps([self.ready, peak]))
            os._exit(0)  # no checkpoint, which would take gigabytes
        return super().loss(model, batch)


def measure(args: argparse.Namespace, strategy: str) -> list[int]:
    """Return the highest memory of all ranks in bytes: before the first loss is computed, and in the training steps."""
    name, _, offload = strategy.partition("+")
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder, "memory.yaml")
        spec.write_text(SPEC.read_text().replace("sentences:Counting", "memory:Measured") + f"path: {Path(__file__).parent}\n")
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OUT": folder, "CALLS": str(STEPS * args.accumulation)}
        done = subprocess.run(
            [sys.executable, "-P", "-m", "launch", str(spec), "--procs", str(args.ranks), "--strategy", name,
             f"train.batch_size={args.ranks * args.accumulation}", "train.micro_batch_size=1", "train.steps=100",
             f"model.width={args.width}", f"model.depth={args.depth}", "model.heads=8", f"train.offload={offload or 'none'}",
             f"optim.name={args.optim}", f"train.precision={args.precision}", f"train.ema={args.ema or 'null'}", *args.keys],
            cwd=folder, env=env, capture_output=True, text=True, check=False)
        peaks = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(args.ranks)
                 if Path(folder, str(rank)).exists()]
        if not peaks:
            sys.exit(done.stdout[-3000:] + done.stderr)
    return [max(pair) for pair in zip(*peaks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 1024), ("depth", 16), ("ranks", 4), ("accumulation", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--optim", default="adamw")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--ema", type=float, default=None)
    parser.add_argument("--keys", nargs="*", default=[], help="more overrides of the run, KEY=VALUE")
    parser.add_argument("strategies", nargs="*", default=["ddp", "zero1", "zero2", "zero3", "fsdp"])
    args = parser.parse_args()
    with torch.device("meta"):
        counts = count({"model": Model(args.width, 8, args.depth)})
    print(f"{counts.parameters:,} parameters, {args.ranks} ranks; MiB of the rank that uses most")
    print(f"{'':20}  {'measured':>9}  {'to first':>8}  {'expected':>9}  {'error':>7}  before training")
    first = 0
    for strategy in args.strategies:
        ready, steps = measure(args, strategy)
        most = max(ready, steps)
        first = first or most
        name, _, offload = strategy.partition("+")
        train = {"steps": 1, "batch_size": args.ranks * args.accumulation, "micro_batch_size": 1, "strategy": name,
                 "offload": offload or "none", "precision": args.precision, "ema": args.ema}
        spec = RunConfig(name="run", task="sentences:Counting", train=train, optim={"name": args.optim})
        expected_bytes = expected(spec, counts, args.ranks, "cpu").total
        print(f"{strategy:20}  {most / 2**20:9.0f}  {most / first:8.2f}  {expected_bytes / 2**20:9.0f}  "
              f"{expected_bytes / most - 1:7.1%}  {ready / 2**20:.0f}", flush=True)


if __name__ == "__main__":
    main()
