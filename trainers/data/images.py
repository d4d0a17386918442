"""Image classification sets: loaded into memory, resident on a device as uint8, batched there."""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from shutil import copyfile
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.contract.errors import UserError
from trainers.contract.events import emit
from trainers.data.augment import NOTHING, Augment
from trainers.data.folders import list_images
from trainers.engine.task import Share
from trainers.engine.world import World


class Raw(NamedTuple):
    pixels: np.ndarray  # uint8 [N, 3, S, S]
    labels: np.ndarray  # int64 [N]


class RawSets(NamedTuple):
    """What a loader gives: a training set, an evaluation set if there is one, the names of the classes."""

    train: Raw
    test: Raw | None
    classes: list[str]


class Images:
    """Images on a device (`engine.task.Dataset`), normalised and augmented a batch at a time."""

    def __init__(self, raw: Raw, classes: list[str], device: torch.device, *, mean: Sequence[float],
                 std: Sequence[float], augment: Augment = NOTHING):
        """`mean` and `std` are those of each channel, with pixels in [0, 1]. `augment` is for training."""
        self.classes = classes
        self.augment = augment
        self.pixels = torch.from_numpy(raw.pixels).to(device)  # uint8 [N, 3, S, S]
        self.labels = torch.from_numpy(raw.labels).to(device)  # int64 [N]
        self._mean = 255 * torch.tensor(mean, dtype=torch.float32, device=device).view(3, 1, 1)
        self._scale = 1 / (255 * torch.tensor(std, dtype=torch.float32, device=device).view(3, 1, 1))

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, share: Share) -> tuple[Tensor, Tensor]:
        """(images float32 [n, 3, S, S], labels int64 [n]) of `share.indices`; n may be 0."""
        side = self.pixels.shape[-1]
        if not self.augment.active:
            index = self._to_device(share.indices)
            return self._normalise(self.pixels[index]), self.labels[index]
        # One transfer for all that the host has to say.
        index, *drawn = self._to_device(np.vstack([share.indices, self.augment.draw(share, side)]))
        drawn = torch.stack(drawn)
        images = self._normalise(self.augment.crop(self.pixels[index], drawn))
        if self.augment.cutout:
            images.masked_fill_(self.augment.hole(drawn, side), 0.0)  # 0 is the mean
        return images, self.labels[index]

    def _to_device(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self.pixels.device, non_blocking=True)

    def _normalise(self, pixels: Tensor) -> Tensor:
        # Subtracted, then multiplied: a fused form may round differently at the end of a vector, and a
        # sample must not depend on its place in a batch.
        return pixels.float().sub_(self._mean).mul_(self._scale)


def resident(sets: RawSets, device: torch.device, size: int, augment: Augment) -> tuple[Images, Images | None]:
    """The training and evaluation sets on `device`, scaled to `size` pixels a side where they differ, both
    normalised by the training set's mean and standard deviation."""
    train, test = (raw and _resized(raw, size) for raw in (sets.train, sets.test))
    mean, std = mean_and_std(train.pixels)
    return (Images(train, sets.classes, device, mean=mean, std=std, augment=augment),
            test and Images(test, sets.classes, device, mean=mean, std=std))


def mean_and_std(pixels: np.ndarray) -> tuple[list[float], list[float]]:
    """Of each channel of uint8 [N, 3, S, S], as fractions of 255. Whole numbers are summed, so that every
    rank gets the same whatever its number of threads."""
    total, squares = np.zeros(3), np.zeros(3)
    for chunk in np.array_split(pixels, 1 + len(pixels) // 1024):
        values = chunk.transpose(1, 0, 2, 3).reshape(3, -1).astype(np.float64)
        total += values.sum(1)
        squares += (values * values).sum(1)
    mean = total / (pixels.size / 3)
    variance = squares / (pixels.size / 3) - mean**2
    # A channel without any variation keeps its scale.
    return (mean / 255).tolist(), (np.where(variance > 0, variance, 255**2) ** 0.5 / 255).tolist()


def _resized(raw: Raw, size: int) -> Raw:
    if raw.pixels.shape[-1] == size:
        return raw
    pixels = F.interpolate(torch.from_numpy(raw.pixels), (size, size), mode="bilinear", antialias=True)
    return Raw(pixels.numpy(), raw.labels)


# --- CIFAR-10


def load_cifar10(root: Path, world: World) -> RawSets:
    """Torchvision's CIFAR10 in `root`, downloaded if it is not there: 50,000 and 10,000 images of 32 x 32.

    Every file is checked against torchvision's md5 sums. The node's first rank downloads, the others wait.

    Raises:
        UserError: it is neither in `root` nor downloadable.
    """
    with world.local_main_first():
        sets = _read_cifar10(root) or _download_cifar10(root)
    return sets


def fetch_cifar10(root: Path) -> bool:
    """As `load_cifar10`, for ranks that cannot download. Whether it was not in `root`, or not whole, before."""
    return _read_cifar10(root) is None and _download_cifar10(root) is not None


def _read_cifar10(root: Path) -> RawSets | None:
    """None if it is not there, or not whole."""
    from torchvision.datasets import CIFAR10

    try:
        parts = [CIFAR10(str(root), train=train) for train in (True, False)]
    except (RuntimeError, OSError):
        return None
    train, test = (Raw(np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)), np.array(part.targets))
                   for part in parts)
    return RawSets(train, test, parts[0].classes)


def _download_cifar10(root: Path) -> RawSets:
    """Download beside and rename: a download that was cut off, or one by another node at the same time,
    leaves nothing half done. An archive that lies in `root` already is used in place of a download."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    archive, final = root / CIFAR10.filename, root / CIFAR10.base_folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".cifar10-") as name:
            beside = Path(name)
            if check_integrity(archive, CIFAR10.tgz_md5):
                copyfile(archive, beside / archive.name)
            CIFAR10(name, download=True)
            if _read_cifar10(root) is None:
                if final.exists():
                    final.rename(beside / "broken")
                (beside / final.name).rename(final)
            sets = _read_cifar10(root)
    except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError) as error:
        broken = [path.name for path in (archive, final) if path.exists()]
        found = f"{' and '.join(broken)} in {root} {'is' if len(broken) == 1 else 'are'} broken" if broken else \
            f"CIFAR-10 is not in {root}"
        raise UserError(f"{found}, and it could not be downloaded: {' '.join(str(error).split()) or repr(error)}",
                        f"put {CIFAR10.url} there, set data.root to where {CIFAR10.base_folder}/ lies, use your own "
                        "images by data=PATH, or drawn shapes by data=sample") from error
    if sets is None:
        raise UserError(f"CIFAR-10 in {root} changed while it was read", "start again")
    return sets


# --- Folders


def load_folder(path: Path, size: int, eval_fraction: float, world: World) -> RawSets:
    """Folder-per-class images, RGB, the centre square scaled to `size`. See `folders.list_images` for layouts.

    Raises:
        UserError: what `list_images` refuses; an image that cannot be read, by name.
    """
    listing = list_images(path, eval_fraction)
    if listing.held_out and listing.test and world.main:
        emit({"event": "note", "level": "info", "message": f"{path} has no evaluation folder: {len(listing.test):,} of "
              f"{len(listing.train) + len(listing.test):,} images held out (data.eval_fraction={eval_fraction:g}, the "
              "same ones in every run)"})
    return RawSets(_decode_all(listing.train, size), _decode_all(listing.test, size) if listing.test else None,
                   listing.classes)


def _decode_all(files: list[tuple[Path, int]], size: int) -> Raw:
    # Threads do: PIL lets go of the interpreter while it decodes and scales.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        pixels = np.empty((len(files), 3, size, size), np.uint8)
        for row, image in zip(pixels, pool.map(lambda item: decode(item[0], size), files)):
            row[:] = image
    return Raw(pixels, np.array([label for _, label in files]))


def decode(file: Path, size: int) -> np.ndarray:
    """uint8 [3, size, size]: the shorter side scaled to `size`, the centre cropped, both in one resampling.

    Raises:
        UserError: the file cannot be read as an image.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGB")
            if image.size != (size, size):
                (width, height), short = image.size, min(image.size)
                left, top = (width - short) / 2, (height - short) / 2
                image = image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + short, top + short))
            return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # PIL's decoders raise nearly anything on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file} cannot be read as an image: {reason}", "mend or remove the file") from error
