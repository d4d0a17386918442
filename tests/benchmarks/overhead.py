"""Compare the time of a step in the engine with a step of a plain PyTorch loop.

Both train the same small model with batches of the same size. They take turns after every step, so that other work on the
machine slows both.

    python tests/benchmarks/overhead.py [rounds]

The model is made so wide that a plain step takes about 10 ms. Both clip the gradients. A round has STEPS steps of each. It
prints the ratio of the total times and the ratio of the median times; the medians ignore single steps that other work on the
machine slowed.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
from torch import nn
from torch.nn import functional as F

from trainers.config.schema import RunConfig
from trainers.contract.paths import RunPaths
from trainers.engine import loop
from trainers.engine.device import to_device
from trainers.engine.task import Loss, Task
from trainers.engine.world import World

STEPS, WARM, BATCH, STEP_S = 100, 20, 64, 0.010
OPTIM = {"name": "adamw", "lr": 1e-3, "clip_norm": 1.0}


class Rows:
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.inputs, self.labels = torch.randn(4096, 256, generator=generator), torch.randint(10, (4096,), generator=generator)

    def __len__(self):
        return len(self.labels)

    def batch(self, share):
        rows = to_device(share.indices, self.labels.device)
        return self.inputs[rows], self.labels[rows]


class Wide(Task):
    def data(self, world):
        return Rows(), None

    def model(self):
        width = self.config.model["width"]
        return nn.Sequential(nn.Linear(256, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))

    def loss(self, model, batch):
        inputs, labels = batch
        return Loss(F.cross_entropy(model(inputs), labels, reduction="sum"), len(labels))


def config(width: int, steps: int) -> RunConfig:
    return RunConfig.model_validate({
        "name": "wide", "task": "overhead:Wide", "model": {"width": width}, "train": {"steps": steps, "batch_size": BATCH},
        "optim": OPTIM, "eval": {"every": "never"}, "checkpoint": {"every": "never"}})


class Plain:
    """The plain loop."""

    def __init__(self, width: int):
        self.rows, self.model = Rows(), Wide(config(width, 1)).model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
        self.order, self.done = torch.randperm(len(self.rows)), 0

    def step(self) -> float:
        """Take one step and return its seconds."""
        began = time.perf_counter()
        rows = self.order[(self.done * BATCH) % len(self.rows):][:BATCH]
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.rows.inputs[rows]), self.rows.labels[rows]).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1
        return time.perf_counter() - began


def plain_steps(width: int) -> list[float]:
    """Return the seconds of some plain steps after a warm-up."""
    plain = Plain(width)
    return [plain.step() for _ in range(2 * WARM)][WARM:]


def measure(width: int, rounds: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each engine step, which include logging, and of each plain step, after a warm-up."""
    ours, theirs, plain = [], [], Plain(width)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        settings = config(width, WARM + rounds * STEPS + 1)
        run = loop.Loop(Wide(settings), settings, World.from_env(), RunPaths(Path(folder)), None)
        ended = time.perf_counter()

        def at_boundary() -> bool:
            nonlocal ended
            ours.append(time.perf_counter() - ended)
            torch.set_deterministic_debug_mode("default")
            theirs.append(plain.step())
            torch.set_deterministic_debug_mode("error")  # as the loop sets it
            ended = time.perf_counter()
            return False

        run.stopping.at_boundary = at_boundary
        run.run()
    return ours[-rounds * STEPS:], theirs[-rounds * STEPS:]


def main() -> None:
    rounds, width = int(sys.argv[1]) if len(sys.argv) > 1 else 7, 256
    while statistics.median(plain_steps(width)) < STEP_S:
        width = width * 5 // 4
    ours, theirs = measure(width, rounds)
    ratios = []
    for first in range(0, len(ours), STEPS):
        a, b = ours[first:first + STEPS], theirs[first:first + STEPS]
        ratios.append((sum(a) / sum(b), statistics.median(a) / statistics.median(b)))
        print(f"mean step: ours {sum(a) / STEPS * 1e3:.2f} ms, plain {sum(b) / STEPS * 1e3:.2f} ms, ratio {ratios[-1][0]:.3f}; "
              f"median step: ours {statistics.median(a) * 1e3:.2f} ms, plain {statistics.median(b) * 1e3:.2f} ms, "
              f"ratio {ratios[-1][1]:.3f}")
    median_of_rounds = statistics.median(ratio for ratio, _ in ratios)
    print(f"width {width}, {len(ours)} steps of each, {torch.get_num_threads()} threads: ratio of the total times "
          f"{sum(ours) / sum(theirs):.3f}, median ratio of the rounds {median_of_rounds:.3f}, "
          f"ratio of the median steps {statistics.median(ours) / statistics.median(theirs):.3f}")


if __name__ == "__main__":
    main()
