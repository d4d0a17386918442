"""What the engine costs a step, against a plain loop: the same small model and batches, by turns in one run.

    python tests/benchmarks/overhead.py [turns]

The model is made wide enough for a plain step to take about 10 ms; gradients are clipped in both.
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

from trainers.config import RunConfig
from trainers.engine import loop
from trainers.engine.task import Loss, Task
from trainers.engine.world import World
from trainers.paths import RunPaths

STEPS, WARM, BATCH, STEP_S = 120, 20, 64, 0.010
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


def config(width: int) -> RunConfig:
    return RunConfig.model_validate({
        "name": "wide", "task": "overhead:Wide", "model": {"width": width}, "train": {"steps": STEPS, "batch_size": BATCH},
        "optim": OPTIM, "eval": {"every": "never"}, "checkpoint": {"every": "never"}})


def ours(width: int) -> float:
    """Seconds a step, after the warm-up."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        settings = config(width)
        run = loop.Loop(Wide(settings), settings, World.from_env(), RunPaths(Path(folder)), None)
        began: list[float] = []

        def at_boundary() -> bool:
            if run.step == WARM:
                began.append(time.perf_counter())
            if run.step == STEPS - 1:
                began.append(time.perf_counter())
            return False

        run.stopping.at_boundary = at_boundary
        run.run()
    return (began[1] - began[0]) / (STEPS - 1 - WARM)


def plain(width: int, steps: int = STEPS) -> float:
    torch.use_deterministic_algorithms(False)
    settings = config(width)
    rows, model = Rows(), Wide(settings).model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    order = torch.randperm(len(rows))
    for step in range(steps):
        if step == WARM:
            began = time.perf_counter()
        at = order[(step * BATCH) % 4096:][:BATCH]
        optimizer.zero_grad()
        F.cross_entropy(model(rows.inputs[at]), rows.labels[at]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return (time.perf_counter() - began) / (steps - WARM)


def main() -> None:
    width = 256
    while plain(width, 60) < STEP_S:
        width = width * 5 // 4
    ratios = []
    for turn in range(int(sys.argv[1]) if len(sys.argv) > 1 else 7):
        pair = (ours(width), plain(width)) if turn % 2 else (plain(width), ours(width))[::-1]
        ratios.append(pair[0] / pair[1])
        print(f"turn {turn}: ours {pair[0] * 1e3:.2f} ms a step, plain {pair[1] * 1e3:.2f}, ratio {ratios[-1]:.3f}", flush=True)
    print(f"width {width}: median ratio {statistics.median(ratios):.3f} ({torch.get_num_threads()} threads)")


if __name__ == "__main__":
    main()
