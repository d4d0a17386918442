"""Tasks for the checks: two that go wrong on purpose, and a language model as large as asked for."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "sentences"))

import torch
from sentences import Counting, Sentences
from torch.nn import functional as F

from trainers.engine.device import to_device
from trainers.engine.task import Loss

SHARE = 0.02          # of the GPU's memory that the task `Narrow` may use
HANG_AT = 5           # the training loss in which `Hung` hangs
CYCLES = 10**11       # of the kernel that hangs: about a minute


class Narrow(Counting):
    """May use little memory, so that a large batch does not fit. On the CPU, more than 8 sentences do not fit."""

    def data(self, world):
        if world.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(SHARE, world.device)
        return Sentences(4096, 1, world.device), None

    def loss(self, model, batch):
        if not batch[0].is_cuda and len(batch[0]) > 8:
            raise torch.OutOfMemoryError("out of memory")
        return super().loss(model, batch)


class Hung(Counting):
    """Waits in one loss for a kernel that takes a minute. On the CPU the rank sleeps."""

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        if self.losses == HANG_AT and torch.is_grad_enabled():
            if not batch[0].is_cuda:
                time.sleep(60)
            else:
                torch.cuda._sleep(CYCLES)
                return Loss(loss.sum, int(loss.sum.detach().isfinite()) * loss.count)  # waits for the kernel
        return loss


class Tokens:
    """Random tokens: `count` sentences of one length."""

    def __init__(self, count, length, words, device):
        generator = torch.Generator().manual_seed(1)
        self.words = torch.randint(words, (count, length + 1), generator=generator).to(device)

    def __len__(self):
        return len(self.words)

    def batch(self, share):
        return self.words[to_device(share.indices, self.words.device)]


class Language(Counting):
    """A language model of random tokens. The keys of `model` are the arguments of sentences.Model."""

    def data(self, world):
        size = self.config.model
        return Tokens(256, size["longest"], size["words"], world.device), None

    def loss(self, model, batch):
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        return Loss(loss, batch[:, 1:].numel())
