"""Augmentation of a whole batch by index arithmetic: pad and crop, flip, cutout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainers.engine.task import Share


@dataclass(frozen=True)
class Augment:
    """The augmentation of training images. The defaults change nothing."""

    pad: int = 0        # width of the reflected border in pixels; then a random crop of the original size
    flip: bool = False  # exchange left and right in half of the images
    cutout: int = 0     # side of the blanked square, in pixels (DeVries & Taylor 2017, arXiv:1708.04552)

    @property
    def active(self) -> bool:
        return self != NOTHING

    def draw(self, share: Share, side: int) -> np.ndarray:
        """Draw the random numbers of a share, int64 [5, n].

        The rows are: top and left of the crop in the padded image, mirrored (0 or 1), row and column of the hole's centre.
        The numbers are drawn for the whole global batch. So the numbers of a sample do not depend on how the batch is divided
        over ranks and micro-batches.
        """
        rng = share.generator()
        ends = (2 * self.pad + 1, 2 * self.pad + 1, 1 + self.flip, side, side)
        return np.stack([rng.integers(0, end, share.size) for end in ends])[:, share.slots]

    def crop(self, pixels: Tensor, drawn: Tensor) -> Tensor:
        """Return images [n, C, S, S] padded, cropped and flipped as `drawn`, in the same shape.

        No padded image is made: the source of each target pixel is computed. Row i of a padded image, counted from the
        image's first row, is row |i| of the image in the border above, and row S-1 - |S-1 - i| in the border below.
        """
        n, channels, side, _ = pixels.shape
        top, left, mirrored = drawn[:3, :, None]
        target = torch.arange(side, device=pixels.device)
        rows = _reflect(top + target - self.pad, side)
        columns = _reflect(left + torch.where(mirrored == 1, side - 1 - target, target) - self.pad, side)
        source = (rows[:, :, None] * side + columns[:, None, :]).view(n, 1, side * side)
        return pixels.flatten(2).gather(2, source.expand(-1, channels, -1)).view_as(pixels)

    def hole(self, drawn: Tensor, side: int) -> Tensor:
        """Return bool [n, 1, S, S], the pixels to blank. A hole at the border is cut off there."""
        target = torch.arange(side, device=drawn.device)
        inside = target - (drawn[3:, :, None] - self.cutout // 2)  # [2, n, S]
        rows, columns = (inside >= 0) & (inside < self.cutout)
        return (rows[:, :, None] & columns[:, None, :])[:, None]


NOTHING = Augment()


def _reflect(position: Tensor, side: int) -> Tensor:
    """Map positions in (-side, 2 side - 1) of the padded image to positions in [0, side) of the image."""
    return (side - 1) - ((side - 1) - position.abs()).abs()
