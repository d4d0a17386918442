"""The sentences task with an operation that has no deterministic kernel: `put_` without accumulation."""

import os

import torch
from sentences import Counting


class Scattered(Counting):
    """Rank 1 uses the operation from training micro-batch `data.from_call` on, so the other ranks wait for rank 1."""

    calls = 0

    def loss(self, model, batch):
        self.calls += model.training
        if os.environ["RANK"] == "1" and self.calls >= self.config.data["from_call"]:
            batch[0].put_(torch.tensor([0]), batch[0].flatten()[:1].clone())
        return super().loss(model, batch)
