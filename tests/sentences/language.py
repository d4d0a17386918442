"""A language model on sentences of very uneven lengths, for the tests of `train.batch_tokens`. A batch is as wide as its longest
sentence."""

import os
import time

import numpy as np
import torch
from sentences import PACE, WORDS, Model
from torch.nn import functional as F

from trainers.engine.task import Loss, Task

LONGEST = 60


class Text:
    """Sentences that count up by a fixed number. `drawn` keeps the rows and epochs of all batches that were not fillers."""

    def __init__(self, count, seed, device, pause_s=0.0):
        random = np.random.default_rng(seed)
        self.lengths = np.clip(random.gamma(2, 6, count).astype(int), 2, LONGEST)
        self.first, self.increment = random.integers(WORDS - 1, size=(2, count, 1))
        self.device, self.drawn, self.pause_s = device, [], pause_s

    def __len__(self):
        return len(self.first)

    def batch(self, share):
        assert len(share.indices), "tasks never see zero rows"
        if self.pause_s:
            time.sleep(float(PACE.read_text()) if PACE.exists() else self.pause_s)
        if not share.filler:
            self.drawn += zip(share.epochs.tolist(), share.indices.tolist())
        lengths = self.lengths[share.indices]
        places = np.arange(lengths.max())
        words = 1 + (self.first[share.indices] + self.increment[share.indices] * places) % (WORDS - 1)
        return torch.from_numpy(np.where(places < lengths[:, None], words, 0)).to(self.device)  # [B, T]


class Language(Task):
    unit = "tokens"

    def data(self, world):
        self.text = Text(500, 1, world.device, self.config.model.get("pause_s", 0.0))
        return self.text, Text(67, 2, world.device)

    def model(self):
        return Model(**{key: value for key, value in self.config.model.items() if key != "pause_s"}, longest=LONGEST)

    def loss(self, model, batch):
        logits, next_words = model(batch[:, :-1]), batch[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), next_words.flatten(), ignore_index=0, reduction="sum")
        return Loss(loss, int((next_words > 0).sum()))


class WithoutLengths(Language):
    def data(self, world):
        train, evaluated = super().data(world)
        del train.__dict__["lengths"]
        return train, evaluated


class Narrow(Language):
    """Rank 1 runs out of memory (simulated) where a training micro-batch has more than `data.max_tokens` tokens."""

    def loss(self, model, batch):
        if model.training and os.environ["RANK"] == "1" and batch.numel() > self.config.data["max_tokens"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate as much as this test wants")
        return super().loss(model, batch)
