"""Augmentation of a whole batch by index arithmetic: pad and crop, flip, cutout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainers.engine.task import Share


@dataclass(frozen=True)
class Augment:
    """What is done to training images. The defaults do nothing."""

    pad: int = 0        # pixels of reflected border, then a random crop of the old size
    flip: bool = False  # left and right exchanged in half of the images
    cutout: int = 0     # side of the square that is blanked, in pixels (DeVries & Taylor 2017, arXiv:1708.04552)

    @property
    def active(self) -> bool:
        return self != NOTHING

    def draw(self, share: Share, side: int) -> np.ndarray:
        """int64 [5, n]: top, left of the crop in the padded image, mirrored (0 or 1), centre row and column of
        the hole. Drawn for the whole global batch, so that a sample's do not depend on how it is shared out."""
        rng = share.generator()
        ends = (2 * self.pad + 1, 2 * self.pad + 1, 1 + self.flip, side, side)
        return np.stack([rng.integers(0, end, share.size) for end in ends])[:, share.slots]

    def crop(self, pixels: Tensor, drawn: Tensor) -> Tensor:
        """[n, C, S, S] -> the same shape, cropped from the reflected border and flipped.

        No padded image is made: each target pixel knows its source. Row i of a reflected border is row |i|
        above, and S-1 - |S-1 - i| below.
        """
        n, channels, side, _ = pixels.shape
        top, left, mirrored = drawn[:3, :, None]
        to = torch.arange(side, device=pixels.device)
        rows = _reflect(top + to - self.pad, side)
        columns = _reflect(left + torch.where(mirrored == 1, side - 1 - to, to) - self.pad, side)
        source = (rows[:, :, None] * side + columns[:, None, :]).view(n, 1, side * side)
        return pixels.flatten(2).gather(2, source.expand(-1, channels, -1)).view_as(pixels)

    def hole(self, drawn: Tensor, side: int) -> Tensor:
        """bool [n, 1, S, S]: the pixels to blank; a hole at the border is cut off there."""
        to = torch.arange(side, device=drawn.device)
        inside = to - (drawn[3:, :, None] - self.cutout // 2)  # [2, n, S]
        rows, columns = (inside >= 0) & (inside < self.cutout)
        return (rows[:, :, None] & columns[:, None, :])[:, None]


NOTHING = Augment()


def _reflect(position: Tensor, side: int) -> Tensor:
    """Positions in (-side, 2 side - 1) as positions in [0, side)."""
    return (side - 1) - ((side - 1) - position.abs()).abs()
