"""Image sets for classification. They are loaded into memory, kept on a device as uint8, and made into batches there."""

from __future__ import annotations

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

from trainers.contract.cores import usable_cores
from trainers.contract.errors import UserError
from trainers.contract.events import emit
from trainers.data.augment import NOTHING, Augment
from trainers.data.folders import list_images
from trainers.engine.task import Share
from trainers.engine.world import World


class Raw(NamedTuple):
    """A set of images with their labels, in memory."""

    pixels: np.ndarray  # uint8 [N, 3, S, S]
    labels: np.ndarray  # int64 [N]


class RawSets(NamedTuple):
    """What a loader returns: a training set, an evaluation set if there is one, and the names of the classes."""

    train: Raw
    test: Raw | None
    classes: list[str]


class Images:
    """A set of images on a device (an `engine.task.Dataset`). Each batch is normalised and augmented when it is made."""

    def __init__(self, raw: Raw, classes: list[str], device: torch.device, *, mean: Sequence[float],
                 std: Sequence[float], augment: Augment = NOTHING):
        """`mean` and `std` have a value for each channel, for pixels in [0, 1]. `augment` is for a training set."""
        self.classes = classes
        self.augment = augment
        self.pixels = torch.from_numpy(raw.pixels).to(device)  # uint8 [N, 3, S, S]
        self.labels = torch.from_numpy(raw.labels).to(device)  # int64 [N]
        self._mean = 255 * torch.tensor(mean, dtype=torch.float32, device=device).view(3, 1, 1)
        self._scale = 1 / (255 * torch.tensor(std, dtype=torch.float32, device=device).view(3, 1, 1))

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, share: Share) -> tuple[Tensor, Tensor]:
        """Return (images float32 [n, 3, S, S], labels int64 [n]) of the samples `share.indices`. n may be 0."""
        side = self.pixels.shape[-1]
        if not self.augment.active:
            index = self._to_device(share.indices)
            return self._normalise(self.pixels[index]), self.labels[index]
        # One transfer to the device for all numbers.
        index, *rows = self._to_device(np.vstack([share.indices, self.augment.draw(share, side)]))
        drawn = torch.stack(rows)
        images = self._normalise(self.augment.crop(self.pixels[index], drawn))
        if self.augment.cutout:
            images.masked_fill_(self.augment.hole(drawn, side), 0.0)  # 0 is the mean colour
        return images, self.labels[index]

    def _to_device(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self.pixels.device, non_blocking=True)

    def _normalise(self, pixels: Tensor) -> Tensor:
        # Two operations, not a fused one: a fused operation may round differently at the end of a vector, and a sample must
        # not depend on its place in a batch.
        return pixels.float().sub_(self._mean).mul_(self._scale)


def resident(sets: RawSets, device: torch.device, size: int, augment: Augment) -> tuple[Images, Images | None]:
    """Return the training and evaluation sets on `device`, scaled to `size` pixels a side.

    Both are normalised by the mean and standard deviation of the training set.
    """
    train = _resized(sets.train, size)
    test = _resized(sets.test, size) if sets.test else None
    mean, std = mean_and_std(train.pixels)
    return (Images(train, sets.classes, device, mean=mean, std=std, augment=augment),
            Images(test, sets.classes, device, mean=mean, std=std) if test else None)


def mean_and_std(pixels: np.ndarray) -> tuple[list[float], list[float]]:
    """Return the mean and the standard deviation of each channel of uint8 [N, 3, S, S], as fractions of 255.

    The sums are sums of whole numbers, so every rank gets the same result, with any number of threads.
    """
    total, squares = np.zeros(3), np.zeros(3)
    for chunk in np.array_split(pixels, 1 + len(pixels) // 1024):
        values = chunk.transpose(1, 0, 2, 3).reshape(3, -1).astype(np.float64)
        total += values.sum(1)
        squares += (values * values).sum(1)
    mean = total / (pixels.size / 3)
    variance = squares / (pixels.size / 3) - mean**2
    # A channel without variation gets a standard deviation of 1, which keeps its scale.
    return (mean / 255).tolist(), (np.where(variance > 0, variance, 255**2) ** 0.5 / 255).tolist()


def _resized(raw: Raw, size: int) -> Raw:
    if raw.pixels.shape[-1] == size:
        return raw
    pixels = F.interpolate(torch.from_numpy(raw.pixels), (size, size), mode="bilinear", antialias=True)
    return Raw(pixels.numpy(), raw.labels)


# --- CIFAR-10


def load_cifar10(root: Path, world: World) -> RawSets:
    """Load torchvision's CIFAR10 from `root`, after downloading it if it is missing: 50,000 and 10,000 images of 32 x 32.

    Every file is checked against torchvision's md5 sums. The first rank of a node downloads while the others wait.

    Raises:
        UserError: CIFAR-10 is not in `root` and cannot be downloaded.
    """
    with world.local_main_first():
        sets = _read_cifar10(root) or _download_cifar10(root)
    return sets


def fetch_cifar10(root: Path) -> bool:
    """Download CIFAR-10 in advance, for ranks that cannot. Return whether it was missing or broken before."""
    return _read_cifar10(root) is None and _download_cifar10(root) is not None


def _read_cifar10(root: Path) -> RawSets | None:
    """Return CIFAR-10 from `root`, or None if it is missing or broken."""
    from torchvision.datasets import CIFAR10

    try:
        parts = [CIFAR10(str(root), train=train) for train in (True, False)]
    except (RuntimeError, OSError):
        return None
    train, test = (Raw(np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)), np.array(part.targets))
                   for part in parts)
    return RawSets(train, test, parts[0].classes)


def _download_cifar10(root: Path) -> RawSets:
    """Download CIFAR-10 into a temporary folder, and rename the result.

    So a download that is cut off, or a download by another node at the same time, leaves nothing half done. An archive that
    is already in `root` is used instead of a download.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    archive, final = root / CIFAR10.filename, root / CIFAR10.base_folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".cifar10-") as name:
            temporary = Path(name)
            if check_integrity(archive, CIFAR10.tgz_md5):
                copyfile(archive, temporary / archive.name)
            CIFAR10(name, download=True)
            if _read_cifar10(root) is None:
                if final.exists():
                    final.rename(temporary / "broken")
                (temporary / final.name).rename(final)
            sets = _read_cifar10(root)
    except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError) as error:
        broken = [path.name for path in (archive, final) if path.exists()]
        state = f"{' and '.join(broken)} in {root} {'is' if len(broken) == 1 else 'are'} broken" if broken else \
            f"CIFAR-10 is not in {root}"
        raise UserError(f"{state}, and it could not be downloaded: {' '.join(str(error).split()) or repr(error)}",
                        f"put {CIFAR10.url} there, set data.root to the folder that holds {CIFAR10.base_folder}/, "
                        "use your own images with data=PATH, or use drawn shapes with data=sample") from error
    if sets is None:
        raise UserError(f"CIFAR-10 in {root} changed while it was read", "start the run again")
    return sets


# --- Folders


def load_folder(path: Path, size: int, eval_fraction: float, world: World) -> RawSets:
    """Load a folder of images by class, as RGB, each image's centre square scaled to `size`.

    `folders.LAYOUT` states which layouts are possible.

    Raises:
        UserError: `list_images` refuses the folder, or an image cannot be read.
    """
    listing = list_images(path, eval_fraction)
    if listing.held_out and listing.test and world.main:
        emit({"event": "note", "level": "info", "message": f"{path} has no evaluation folder: {len(listing.test):,} of "
              f"{len(listing.train) + len(listing.test):,} images are held out (data.eval_fraction={eval_fraction:g}, "
              "the same images in every run)"})
    return RawSets(_decode_all(listing.train, size), _decode_all(listing.test, size) if listing.test else None,
                   listing.classes)


def _decode_all(files: list[tuple[Path, int]], size: int) -> Raw:
    # Threads are enough: PIL releases the GIL while it decodes and scales.
    with ThreadPoolExecutor(min(16, usable_cores())) as pool:
        pixels = np.empty((len(files), 3, size, size), np.uint8)
        for row, image in zip(pixels, pool.map(lambda item: decode(item[0], size), files)):
            row[:] = image
    return Raw(pixels, np.array([label for _, label in files]))


def decode(file: Path, size: int) -> np.ndarray:
    """Return an image file as uint8 [3, size, size]: the centre square, cropped and scaled to `size` in one resampling.

    Raises:
        UserError: the file cannot be read as an image.
    """
    from PIL import Image

    try:
        with Image.open(file) as opened:
            image: Image.Image = opened
            if image.mode.startswith("I"):  # 16 bits: convert() would clip the values at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGB")
            if image.size != (size, size):
                (width, height), short = image.size, min(image.size)
                left, top = (width - short) / 2, (height - short) / 2
                image = image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + short, top + short))
            return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # PIL's decoders raise nearly anything on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file} cannot be read as an image: {reason}", "fix or remove the file") from error
