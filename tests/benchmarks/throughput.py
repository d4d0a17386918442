"""Compare the throughput of the engine's loop with the shortest plain PyTorch loop, in alternating turns. Both use the same
model, data and batch size.

    python tests/benchmarks/throughput.py [turns]
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
from torch.nn import functional as F

from launch.cluster.config import load_cluster
from launch.plan.spec import load_spec
from trainers.cifar10.task import Cifar10
from trainers.contract.paths import RunPaths
from trainers.engine.loop import train
from trainers.engine.world import World

STEPS, BATCH = 100, 64
KEYS = ["data=sample", "model.width=0.25", f"train.steps={STEPS}", f"train.batch_size={BATCH}", "data.pad=0",
        "data.flip=false", "eval.every=never", "checkpoint.every=never", "log.every=10"]
CONFIG = load_spec("cifar10", KEYS, cluster=load_cluster("local"), environment={}).config


def ours() -> float:
    """Train with the engine and return images per second, without the first two logged intervals, which hold the warm-up."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        paths = RunPaths(Path(folder))
        train(Cifar10(CONFIG), CONFIG, World.from_env(), paths, None)
        rates = [json.loads(line)["rate"] for line in paths.metrics.read_text().splitlines()]
    return len(rates[2:]) / sum(1 / rate for rate in rates[2:])


def plain() -> float:
    """Train with a plain loop and return images per second, without the first 10 steps."""
    torch.use_deterministic_algorithms(False)
    task = Cifar10(CONFIG)
    data, _ = task.data(World.from_env())
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=CONFIG.optim.lr, momentum=0.9, nesterov=True,
                                weight_decay=CONFIG.optim.weight_decay, fused=True)
    images, labels = data.pixels.float().div(255).sub(0.5).div(0.25), data.labels
    for step in range(STEPS):
        if step == 10:
            began = time.perf_counter()
        rows = torch.randperm(len(labels))[:BATCH]
        loss = F.cross_entropy(model(images[rows]), labels[rows], label_smoothing=CONFIG.model.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (STEPS - 10) * BATCH / (time.perf_counter() - began)


def main() -> None:
    ratios = []
    for turn in range(int(sys.argv[1]) if len(sys.argv) > 1 else 7):
        pair = (ours(), plain()) if turn % 2 else (plain(), ours())[::-1]
        ratios.append(pair[0] / pair[1])
        print(f"turn {turn}: ours {pair[0]:.0f} images/s, plain {pair[1]:.0f}, ratio {ratios[-1]:.3f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f} ({torch.get_num_threads()} threads)")


if __name__ == "__main__":
    main()
