"""How large the models of `cifar10` are, by their own tables. Imports no torch."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from trainers.config.counts import Counts

if TYPE_CHECKING:
    from trainers.cifar10.config import Model

# Channels of vgg's 3x3 convolutions; "pool" halves the sides.
VGG: tuple[int | str, ...] = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool")
# Units of each of vgg's two hidden layers. Not the paper's 4,096, made for 25,088 features and 1,000 classes: they were
# no better (66.8 against 68.1 % on 4,000 images at width 0.25, one seed each) with 5 times the parameters.
HIDDEN = 512
# Channels in, out and stride of resnet18's blocks.
RESNET18 = ((64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1))


def counts(model: Model, classes: int, size: int) -> Counts | None:
    """None of a torchvision model, which only torchvision can count."""
    match model.arch:
        case "vgg":
            shapes, norms = _vgg(model, classes, size)
        case "resnet18":
            shapes, norms = _resnet18(classes)
        case _:
            return None
    shapes += [(channels,) for channels in norms for _ in ("weight", "bias")]
    sizes = [prod(shape) for shape in shapes]
    # Of each norm: mean, variance, and how many batches they are of.
    return Counts(parameters=sum(sizes), tensor=max(sizes), buffers=sum(2 * channels + 1 for channels in norms))


def pooled_side(size: int) -> tuple[int, int]:
    """(side of vgg's last feature maps, side of the windows they are averaged over; 1: they are not)"""
    side = -(-size // 16)
    return (side // (side // 2), side // 2) if side > 3 else (side, 1)


def _vgg(model: Model, classes: int, size: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """(shapes of parameters without those of norms, channels of each norm)"""
    channels = [3, *(max(1, round(item * model.width)) for item in VGG if item != "pool")]
    shapes: list[tuple[int, ...]] = [(out, inner, 3, 3) for inner, out in zip(channels, channels[1:])]
    if not model.batch_norm:
        shapes += [(out,) for out in channels[1:]]
    hidden = max(1, round(HIDDEN * model.width))
    units = [channels[-1] * pooled_side(size)[0] ** 2, hidden, hidden, classes]
    for inner, out in zip(units, units[1:]):
        shapes += [(out, inner), (out,)]
    return shapes, channels[1:] if model.batch_norm else []


def _resnet18(classes: int) -> tuple[list[tuple[int, ...]], list[int]]:
    shapes: list[tuple[int, ...]] = [(64, 3, 3, 3)]
    norms = [64]
    for inner, out, stride in RESNET18:
        shapes += [(out, inner, 3, 3), (out, out, 3, 3)]
        norms += [out, out]
        if stride != 1 or inner != out:
            shapes.append((out, inner, 1, 1))
            norms.append(out)
    return [*shapes, (classes, 512), (classes,)], norms
