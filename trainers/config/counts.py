"""How large a task's models are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """A task's models, in numbers that they hold."""

    parameters: int      # of all models
    tensor: int          # those of the largest parameter
    block: int = 0       # those of the largest block (trainers/engine/parallel/blocks.py); 0: there are no blocks
    blocks: int = 0      # those of all blocks together
    buffers: int = 0     # BatchNorm statistics and the like

    @property
    def rest(self) -> int:
        """Parameters in no block: gathered with the model as a whole."""
        return self.parameters - self.blocks
