"""The sentences task, where rank 1 runs out of memory if a micro-batch holds too many sentences (simulated)."""

import os

import torch
from sentences import Counting


class Narrow(Counting):
    """`data.max_sentences` is how many sentences of a training micro-batch fit into the memory of rank 1.

    In the first `data.unlimited_calls` training micro-batches (default 0) any number fits.
    """

    calls = 0

    def loss(self, model, batch):
        data = self.config.data
        self.calls += model.training
        limited = os.environ["RANK"] == "1" and model.training and self.calls > data.get("unlimited_calls", 0)
        if limited and len(batch[0]) > data["max_sentences"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate as much as this test wants")
        return super().loss(model, batch)
