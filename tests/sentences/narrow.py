"""The small Transformer on ranks of which the second holds few sentences at a time."""

import os

import torch
from sentences import Counting


class Narrow(Counting):
    """`data.most`: those that fit in training; `data.calls`: after so many micro-batches in which any number did."""

    calls = 0

    def loss(self, model, batch):
        data = self.config.data
        self.calls += model.training
        if os.environ["RANK"] == "1" and model.training and len(batch[0]) > data["most"] and self.calls > data.get("calls", 0):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate as much as this test wants")
        return super().loss(model, batch)
