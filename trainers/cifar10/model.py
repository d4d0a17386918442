"""Image classifiers: VGG and ResNet-18 for small images, and any torchvision classifier by name. All return logits."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.cifar10.config import Model
from trainers.contract.errors import UserError

# The layers of vgg. A number is the channels of a 3x3 convolution. "pool" halves the sides of the feature maps.
VGG: tuple[int | Literal["pool"], ...] = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool")
# Units of each of vgg's two hidden layers. The paper has 4,096, for 25,088 features and 1,000 classes. Here 4,096 units were
# no better (66.8 against 68.1 % on 4,000 images at width 0.25, one seed each), with 5 times the parameters.
HIDDEN = 512
# The blocks of resnet18: channels in, channels out, stride.
RESNET18 = ((64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1))


def make_model(config: Model, classes: int, size: int) -> nn.Module:
    """Return the model that maps images float32 [n, 3, size, size] to logits [n, classes].

    Raises:
        UserError: torchvision has no model `config.arch`, or the model cannot take images of this size.
    """
    match config.arch:
        case "vgg":
            return Vgg(classes, size, config.width, config.batch_norm, config.dropout)
        case "resnet18":
            return ResNet18(classes)
        case name:
            return torchvision_model(name, classes, size)


class Vgg(nn.Module):
    """Configuration A of Simonyan & Zisserman 2015 (arXiv:1409.1556) without its last block.

    Six convolutions, four poolings, two hidden layers. Images of 32 x 32 give 512 x 2 x 2 = 2,048 features (`features`).
    """

    def __init__(self, classes: int, size: int = 32, width: float = 1.0, batch_norm: bool = True,
                 dropout: float = 0.0):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for item in VGG:
            if item == "pool":
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
                continue
            out = max(1, round(item * width))
            layers.append(nn.Conv2d(channels, out, 3, padding=1, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(out))
            layers.append(nn.ReLU(inplace=True))
            channels = out
        # The feature maps of larger images are averaged to about 2 x 2. AdaptiveAvgPool2d is not used: its backward on
        # a GPU is not deterministic, and torch refuses it if train.deterministic is set.
        side, window = pooled_side(size)
        if window > 1:
            layers.append(nn.AvgPool2d(window))
        self.convolutions = nn.Sequential(*layers)
        self.features = channels * side * side
        hidden = max(1, round(HIDDEN * width))
        self.classifier = nn.Sequential(
            nn.Linear(self.features, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout),
            nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )
        if not batch_norm:  # He et al. 2015 (arXiv:1502.01852): with torch's own initial weights, accuracy stays at chance
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                    assert module.bias is not None  # without BatchNorm, every layer has a bias
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        # Convolutions keep this memory order, in which the channels of a pixel are neighbours. It is 1.3 to 1.5 times faster
        # on CPU (torch 2.15, one AVX2 core; resnet18 gained nothing). Parameters and checkpoints keep the usual order.
        images = images.contiguous(memory_format=torch.channels_last)
        return self.classifier(self.convolutions(images).flatten(1))


def pooled_side(size: int) -> tuple[int, int]:
    """Return (side of vgg's feature maps after averaging, side of the averaging windows) for images of `size` pixels a side.

    Windows of side 1 mean that nothing is averaged.
    """
    side = -(-size // 16)  # after four poolings, which round up
    return (side // (side // 2), side // 2) if side > 3 else (side, 1)


class ResNet18(nn.Module):
    """ResNet-18 of He et al. 2016 (arXiv:1512.03385), with a stem for 32 x 32 images: one 3x3 convolution, no pooling."""

    def __init__(self, classes: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(*(Block(*row) for row in RESNET18))
        self.classifier = nn.Linear(512, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(images)).mean((2, 3)))


class Block(nn.Module):
    """Two 3x3 convolutions plus a shortcut: the identity, or a 1x1 convolution if the shape changes."""

    def __init__(self, channels: int, out: int, stride: int = 1):
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(out)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(out)
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Sequential(
            nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.first_norm(self.first(x)), inplace=True)
        return F.relu(self.second_norm(self.second(inner)) + self.shortcut(x), inplace=True)


def torchvision_model(name: str, classes: int, size: int) -> nn.Module:
    """Return a classifier of torchvision.models, newly initialized, with its own stem and without auxiliary heads.

    Raises:
        UserError: torchvision has no model of this name, or the model cannot take images of this size.
    """
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        raise UserError(f"torchvision has no model `{name}` (`model.arch`)", "use a classifier of torchvision.models")
    more = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model = models.get_model(name, weights=None, num_classes=classes, **more)
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"`model.arch` {name} cannot take images of {size}x{size}: {str(error).splitlines()[0]}",
                        "use data.size=224, for which most torchvision models are made") from error
    return model.train()
