"""Image files without labels, for predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainers.data.decode import decode_all
from trainers.data.images import Images, Raw, Statistics
from trainers.engine.task import Share


class ImageFiles:
    """A data set of image files (an `engine.task.Dataset`). The files of a batch are read when the batch is made."""

    def __init__(self, files: Sequence[str], device: torch.device, size: int, bits: int | None, statistics: Statistics):
        """`size` and `bits` are as in `decode`. The images are normalised by `statistics`."""
        self.files, self.device, self.size, self.bits, self.statistics = files, device, size, bits, statistics

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, share: Share) -> tuple[Tensor, None]:
        """Return (images float32 [n, 3, S, S], None) of the samples `share.indices`.

        Raises:
            UserError: a file cannot be read as an image.
        """
        pixels = decode_all([Path(self.files[number]) for number in share.indices.tolist()], self.size, self.bits).pixels
        everything = np.arange(len(pixels))
        images = Images(Raw(pixels, everything), [], self.device, mean=self.statistics.mean, std=self.statistics.std)
        return images.batch(Share(everything, everything, len(pixels), 0))[0], None
