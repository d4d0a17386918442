"""Buffers are untouched by forwards that are repeated."""

from __future__ import annotations

import copy

import torch
from torch import nn

from trainers.engine.parallel.blocks import checkpoint_activations
from trainers.engine.parallel.buffers import replaced, snapshot


class Block(nn.Module):
    """A forward reads `mean` and rebinds it, and BatchNorm writes into its statistics."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.2)
        self.register_buffer("mean", torch.ones(8))

    def forward(self, x):
        y = self.norm(self.linear(x)) - self.mean
        with torch.no_grad():
            self.mean = self.mean.lerp(y.mean(0), 0.1)
        return self.dropout(torch.relu(y * self.mean))


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_replaced_buffers_come_back_as_they_were():
    model = Deep()
    model.alias = model.blocks[0].norm  # a module that is found twice
    own, values = dict(model.named_buffers()), [b.clone() for b in model.buffers()]
    with replaced(snapshot([model])):
        model(torch.randn(4, 8))
        assert all(buffer is not own[name] for name, buffer in model.named_buffers())
        assert model.blocks[0].norm.num_batches_tracked == 1
    assert all(buffer is own[name] for name, buffer in model.named_buffers())
    assert all(map(torch.equal, model.buffers(), values))


def test_recomputed_blocks_count_each_batch_once_and_see_the_buffers_of_their_forward():
    torch.manual_seed(0)
    kept = Deep()
    recomputed = copy.deepcopy(kept)
    checkpoint_activations(recomputed)
    for step in range(3):
        for model in (kept, recomputed):
            torch.manual_seed(step)
            x = torch.randn(16, 8)
            model.zero_grad()
            (model(x).square().sum() + model(x + 1).square().sum()).backward()  # two forwards before one backward
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(kept.parameters(), recomputed.parameters(), strict=True))
        assert all(map(torch.equal, kept.buffers(), recomputed.buffers()))
    assert kept.blocks[0].norm.num_batches_tracked == 6 and kept.blocks[0].linear.weight.grad.abs().max() > 0
