"""A task for the tests of the engine: a small Transformer learns to count up by a fixed number in sentences of uneven lengths.
The loss is counted in tokens."""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from trainers.engine.device import to_device
from trainers.engine.task import Loss, Task

WORDS, LONGEST = 17, 12
PACE = Path(os.environ.get("LAUNCH_RUN_DIR", ".")) / "pace"  # a test writes a new pause into this file
# Keys of `model` that tests use to disturb a run: a pause before each batch (seconds), the index of a sample that makes the
# logits of its micro-batch NaN, the numbers (from 1) of the training losses whose logits are multiplied by 1e30, and whether each
# rank of Queued has a queue of its own.
TEST_KEYS = ("pause_s", "bad_row", "big_steps", "apart")


class Sentences:
    def __init__(self, count, seed, device, pause_s=0.0):
        generator = torch.Generator().manual_seed(seed)
        self.pause_s = pause_s
        self.lengths = torch.randint(2, LONGEST + 1, (count,), generator=generator)
        first, increment = torch.randint(WORDS - 1, (2, count, 1), generator=generator)
        self.words = 1 + (first + increment * torch.arange(LONGEST)) % (WORDS - 1)
        self.words[torch.arange(LONGEST) >= self.lengths[:, None]] = 0
        self.words, self.lengths = self.words.to(device), self.lengths.to(device)

    def __len__(self):
        return len(self.words)

    def batch(self, share):
        if self.pause_s:
            time.sleep(float(PACE.read_text()) if PACE.exists() else self.pause_s)
        rows = to_device(share.indices, self.words.device)
        return self.words[rows], self.lengths[rows], rows


class Block(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):  # [B, T, W]
        B, T, W = x.shape
        q, k, v = self.attention(self.before(x)).view(B, T, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, W)
        x = x + F.dropout(self.out(mixed), self.dropout, self.training)
        return x + F.dropout(self.inner(self.between(x)), self.dropout, self.training)


class Model(nn.Module):
    def __init__(self, width=32, heads=2, depth=2, dropout=0.0, words=WORDS, longest=LONGEST):
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, words):
        x = self.words(words) + self.positions.weight[: words.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


class Counting(Task):
    unit = "tokens"
    losses = 0  # how many losses this rank has computed in training

    def data(self, world):
        pause_s = self.config.model.get("pause_s", 0.0)
        return Sentences(500, 1, world.device, pause_s), Sentences(67, 2, world.device)

    def model(self):
        return Model(**{key: value for key, value in self.config.model.items() if key not in TEST_KEYS})

    def loss(self, model, batch):
        words, lengths, rows = batch
        logits = model(words[:, :-1])
        if torch.is_grad_enabled():
            self.losses += 1
            if (rows == self.config.model.get("bad_row", -1)).any():
                logits = logits * float("nan")
            if self.losses in self.config.model.get("big_steps", ()):
                logits = logits * 1e30
        loss = F.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten(), ignore_index=0, reduction="sum")
        return Loss(loss, int((lengths - 1).sum()))


class Queued(Counting):
    """Keeps a queue of the mean losses of the last micro-batches, which weighs the loss."""

    def data(self, world):
        self.world, self.queue, self.pushed = world, torch.zeros(8, device=world.device), 0
        return super().data(world)

    def state(self):
        return {"queue": self.queue, "pushed": self.pushed}

    def load_state(self, values):
        self.pushed = values["pushed"]

    def loss(self, model, batch):
        total, count = super().loss(model, batch)
        if not torch.is_grad_enabled():
            return Loss(total, count)
        mean = total.detach().float() / count
        if self.world.size > 1 and not self.config.model.get("apart"):
            dist.all_reduce(mean)
        self.queue[self.pushed % 8] = mean
        self.pushed += 1
        return Loss(total * (1 + self.queue.mean() / 10), count)
