"""What the engine costs a step, against a plain loop: the same small model and batches, a step of one after a step of the
other, so that both have the same machine.

    python tests/benchmarks/overhead.py [rounds]

The model is made wide enough for a plain step to take about 10 ms; gradients are clipped in both. A round is STEPS steps of
each: the ratio of what they took in all, and of the medians, which leaves out what other work on the machine took of some.
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
        rows = torch.from_numpy(share.indices)
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
    def __init__(self, width: int):
        self.rows, self.model = Rows(), Wide(config(width, 1)).model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
        self.order, self.done = torch.randperm(len(self.rows)), 0

    def step(self) -> float:
        """Seconds that it took."""
        began = time.perf_counter()
        at = self.order[(self.done * BATCH) % len(self.rows):][:BATCH]
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.rows.inputs[at]), self.rows.labels[at]).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1
        return time.perf_counter() - began


def plain_steps(width: int) -> list[float]:
    plain = Plain(width)
    return [plain.step() for _ in range(2 * WARM)][WARM:]


def by_turns(width: int, rounds: int) -> tuple[list[float], list[float]]:
    """(seconds of each of our steps, with its share of logging; of each plain one), after the warm-up."""
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
            torch.set_deterministic_debug_mode("warn")  # as the loop has it
            ended = time.perf_counter()
            return False

        run.stopping.at_boundary = at_boundary
        run.run()
    return ours[-rounds * STEPS:], theirs[-rounds * STEPS:]


def main() -> None:
    rounds, width = int(sys.argv[1]) if len(sys.argv) > 1 else 7, 256
    while statistics.median(plain_steps(width)) < STEP_S:
        width = width * 5 // 4
    ours, theirs = by_turns(width, rounds)
    ratios = []
    for first in range(0, len(ours), STEPS):
        a, b = ours[first:first + STEPS], theirs[first:first + STEPS]
        ratios.append((sum(a) / sum(b), statistics.median(a) / statistics.median(b)))
        print(f"ours {sum(a) / STEPS * 1e3:.2f} ms a step, plain {sum(b) / STEPS * 1e3:.2f}: {ratios[-1][0]:.3f}; "
              f"medians {statistics.median(a) * 1e3:.2f} and {statistics.median(b) * 1e3:.2f}: {ratios[-1][1]:.3f}")
    middle = statistics.median(ratio for ratio, _ in ratios)
    print(f"width {width}, {len(ours)} steps of each: in all {sum(ours) / sum(theirs):.3f}, rounds' median {middle:.3f}; of "
          f"medians {statistics.median(ours) / statistics.median(theirs):.3f} ({torch.get_num_threads()} threads)")


if __name__ == "__main__":
    main()
