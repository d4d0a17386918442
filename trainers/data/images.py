"""Image sets for classification. They are loaded into memory, kept on a device as uint8, and made into batches there."""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from shutil import copyfile
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.contract.errors import UserError
from trainers.contract.text import first_few
from trainers.data.augment import NOTHING, Augment
from trainers.data.folders import same_class
from trainers.engine.device import to_device
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
    facts: Mapping[str, Any] = {}  # `Listing.facts`, if the training images are from a folder
    final: Raw | None = None       # images that are scored once, at the end of a run


class Statistics(NamedTuple):
    """The mean and the standard deviation of each channel, as fractions of 255."""

    mean: list[float]
    std: list[float]


class Images:
    """A set of images on a device (an `engine.task.Dataset`). Each batch is normalised and augmented when it is made."""

    def __init__(self, raw: Raw, classes: list[str], device: torch.device, *, mean: Sequence[float],
                 std: Sequence[float], augment: Augment = NOTHING):
        """`mean` and `std` have a value for each channel, for pixels in [0, 1]. `augment` is for a training set."""
        self.classes = classes
        self.statistics = Statistics(list(mean), list(std))
        self.augment = augment
        self._fingerprint = hashlib.sha256(raw.labels.astype("<i8").tobytes()).hexdigest()[:16]
        self.pixels = torch.from_numpy(raw.pixels).to(device)  # uint8 [N, 3, S, S]
        self.labels = torch.from_numpy(raw.labels).to(device)  # int64 [N]
        self._mean = 255 * torch.tensor(mean, dtype=torch.float32, device=device).view(3, 1, 1)
        self._scale = 1 / (255 * torch.tensor(std, dtype=torch.float32, device=device).view(3, 1, 1))

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """Return a hash of the labels. Pixels are not hashed, because versions of a library decode images differently."""
        return self._fingerprint

    def batch(self, share: Share) -> tuple[Tensor, Tensor]:
        """Return (images float32 [n, 3, S, S], labels int64 [n]) of the samples `share.indices`."""
        side = self.pixels.shape[-1]
        if not self.augment.active:
            index = to_device(share.indices, self.pixels.device)
            return self._normalise(self.pixels[index]), self.labels[index]
        # One transfer to the device for all numbers.
        index, *rows = to_device(np.vstack([share.indices, self.augment.draw(share, side)]), self.pixels.device)
        drawn = torch.stack(rows)
        images = self._normalise(self.augment.crop(self.pixels[index], drawn))
        if self.augment.cutout:
            images.masked_fill_(self.augment.hole(drawn, side), 0.0)  # 0 is the mean colour
        return images, self.labels[index]

    def _normalise(self, pixels: Tensor) -> Tensor:
        # Two operations, not a fused one: a fused operation may round differently at the end of a vector, and a sample must
        # not depend on its place in a batch.
        return pixels.float().sub_(self._mean).mul_(self._scale)


def as_trained(sets: RawSets, classes: list[str]) -> RawSets:
    """Return the sets with the labels that these classes had when the model was trained. Only the evaluation set is kept.

    Raises:
        UserError: the evaluation set has a class that the model does not know.
    """
    numbers = {same_class(name): number for number, name in enumerate(classes)}
    if unknown := [name for name in sets.classes if same_class(name) not in numbers]:
        raise UserError(f"the model was trained on the classes {first_few(classes, 10)}, which do not include "
                        f"{first_few([f'`{name}`' for name in unknown])}",
                        "evaluate it on images of its own classes")
    if sets.test is None:
        return sets._replace(classes=classes)
    own = np.array([numbers[same_class(name)] for name in sets.classes])
    test = Raw(sets.test.pixels, own[sets.test.labels])
    return sets._replace(train=test, test=test, classes=classes)


def resident(sets: RawSets, device: torch.device, size: int, augment: Augment, statistics: Statistics | None = None
             ) -> tuple[Images, Images | None]:
    """Return the training and evaluation sets on `device`, scaled to `size` pixels a side.

    Both are normalised by `statistics`; None: by those of the training set.
    """
    train = _resized(sets.train, size)
    mean, std = statistics or mean_and_std(train.pixels)
    return (Images(train, sets.classes, device, mean=mean, std=std, augment=augment),
            to_evaluate(sets.test, sets.classes, device, size, Statistics(mean, std)) if sets.test else None)


def to_evaluate(raw: Raw, classes: list[str], device: torch.device, size: int, statistics: Statistics) -> Images:
    """Return images on `device` as an evaluation sees them: scaled to `size` pixels a side, normalised, not augmented."""
    return Images(_resized(raw, size), classes, device, mean=statistics.mean, std=statistics.std)


def mean_and_std(pixels: np.ndarray) -> Statistics:
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
    return Statistics((mean / 255).tolist(), (np.where(variance > 0, variance, 255**2) ** 0.5 / 255).tolist())


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
