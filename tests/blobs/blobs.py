"""A task for the tests: the class of a small random image is the sign of its mean. The model has BatchNorm and dropout, unless
`model.exact_over_ranks` is true."""

import os
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from trainers.engine.device import to_device
from trainers.engine.task import Loss, Task

PACE = Path(os.environ.get("LAUNCH_RUN_DIR", ".")) / "pace"  # a test writes a new pause into this file


class Blobs:
    """A data set of `count` images.

    `pause_s` is the pause before each batch. At batch number `hang_at` (from 1) the data set hangs.
    """

    def __init__(self, count, seed, device, noise=0.0, pause_s=0.0, hang_at=None):
        self.noise, self.pause_s, self.hang_at, self.made = noise, pause_s, hang_at, 0
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(count, 3, 6, 6, generator=generator).to(device)
        self.labels = (self.images.mean((1, 2, 3)) > 0).long()

    def __len__(self):
        return len(self.labels)

    def batch(self, share):
        if self.pause_s:
            time.sleep(float(PACE.read_text()) if PACE.exists() else self.pause_s)
        self.made += 1
        if self.made == self.hang_at:
            time.sleep(1000)  # longer than any test waits
        rows = to_device(share.indices, self.images.device)
        noise = share.generator().normal(scale=0.1, size=share.size)[share.slots]
        images = self.images[rows] + to_device(noise, self.images.device).float().view(-1, 1, 1, 1)
        return images + self.noise * torch.randn_like(images), self.labels[rows]


class BlobsTask(Task):
    def data(self, world):
        noise = 0.0 if self.exact else 0.1
        pause_s = self.config.model.get("pause_s", 0.0)  # for runs that a test interrupts
        slow_rank, more_s = self.config.model.get("slow", (None, 0.0))
        hung_rank, batch = self.config.model.get("hang", (None, None))  # hangs only in the first attempt
        hang_at = batch if world.rank == hung_rank and os.environ.get("LAUNCH_ATTEMPT") == "1" else None
        pause_s += more_s if world.rank == slow_rank else 0.0
        return Blobs(300, 1, world.device, noise, pause_s, hang_at), Blobs(101, 2, world.device, noise)

    @property
    def exact(self):
        """Whether to leave out everything that depends on the rank: BatchNorm, dropout, noise from torch's generator."""
        return self.config.model.get("exact_over_ranks", False)

    def model(self):
        exact = self.exact
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.Identity() if exact else nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
            nn.Identity() if exact else nn.Dropout(0.2), nn.Linear(128, 300), nn.ReLU(), nn.Linear(300, 2),
        )

    def loss(self, model, batch):
        images, labels = batch
        return Loss(F.cross_entropy(model(images), labels, reduction="sum"), len(labels))

    def measure(self, model, batch):
        images, labels = batch
        logits = model(images)
        return {"loss": (F.cross_entropy(logits, labels, reduction="sum"), len(labels)),
                "top1": ((logits.argmax(1) == labels).sum(), len(labels))}

    def rows(self, models, batch):
        return models["model"](batch[0]).argmax(1)
