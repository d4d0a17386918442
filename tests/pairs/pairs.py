"""A task for the tests with two models and two updates: a generator learns to make points on a circle, and a critic learns to
tell these points from real ones (Goodfellow et al. 2014, arXiv:1406.2661). The critic takes several optimizer steps in each
training step.
"""

import math
import os
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from trainers.engine.batches.noise import normal
from trainers.engine.task import Loss, Task, Update

PACE = Path(os.environ.get("LAUNCH_RUN_DIR", ".")) / "pace"  # a test writes a new pause into this file


class Circle:
    def __init__(self, count, device, pause_s=0.0):
        self.device, self.pause_s = device, pause_s
        angles = torch.arange(count) * (2 * math.pi / count)
        self.points = torch.stack([angles.cos(), angles.sin()], 1).to(device)

    def __len__(self):
        return len(self.points)

    def batch(self, share):
        if self.pause_s:
            time.sleep(float(PACE.read_text()) if PACE.exists() else self.pause_s)
        # Noise of the share is the same on any number of ranks; torch.randn would give each rank its own.
        return self.points[torch.from_numpy(share.indices)], normal(share, 4, device=self.device)


class Drift(nn.Module):
    """Subtracts a running mean, also in training. Each rank has a mean of its own inputs, until ranks share their buffers."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x):
        y = x - self.mean
        if self.training:
            with torch.no_grad():
                self.mean = self.mean.lerp(x.mean(0), 0.2)
        return y


class Net(nn.Module):
    def __init__(self, inputs, outputs, norm, drift):
        super().__init__()
        self.blocks = nn.ModuleList([
            nn.Sequential(nn.Linear(inputs, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.LeakyReLU(0.2)),
            nn.Sequential(Drift(16) if drift else nn.Identity(), nn.Linear(16, 16), nn.LeakyReLU(0.2))])
        self.out = nn.Linear(16, outputs)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Pairs(Task):
    """Keys of `model`: norm (BatchNorm, default true), drift (default true), draws of the critic (default 2), alone (train only
    the critic, by one forward over all points; default false), pause_s (before each batch)."""

    unit = "points"

    def data(self, world):
        return Circle(100, world.device, self.config.model.get("pause_s", 0.0)), Circle(30, world.device)

    def models(self):
        options = self.config.model.get("norm", True), self.config.model.get("drift", True)
        return {"generator": Net(4, 2, *options), "critic": Net(2, 1, *options)}

    def updates(self):
        critic = Update("critic", trains="critic", loss=self.critic_loss, draws=self.config.model.get("draws", 2))
        if self.config.model.get("alone"):
            return [critic]
        return [Update("generator", trains="generator", loss=self.generator_loss), critic]

    def generator_loss(self, models, batch):
        _, noise = batch
        return Loss(F.softplus(-models["critic"](models["generator"](noise))).sum(), len(noise))

    def critic_loss(self, models, batch):
        points, noise = batch
        made = models["generator"](noise)
        if self.config.model.get("alone"):
            real, fake = models["critic"](torch.cat([points, made])).chunk(2)
        else:
            real, fake = models["critic"](points), models["critic"](made)  # two forwards before one backward
        return Loss(F.softplus(-real).sum() + F.softplus(fake).sum(), len(points))

    def evaluate(self, models, batch):
        loss = self.critic_loss(models, batch)
        return {"loss": (loss.sum, loss.count)}
