"""The sizes of a task's models and data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """The sizes of a task's models, as counts of numbers, and of its data, in bytes."""

    parameters: int      # all parameters of all models
    tensor: int          # the largest parameter tensor
    block: int = 0       # the parameters of the largest block (trainers/engine/parallel/blocks.py); 0: there are no blocks
    blocks: int = 0      # the parameters of all blocks together
    buffers: int = 0     # BatchNorm statistics and other buffers
    data: int = 0        # bytes that the data sets keep on the device; 0 if this was not measured

    @property
    def rest(self) -> int:
        """The parameters outside of blocks. They are gathered together with the whole model."""
        return self.parameters - self.blocks
