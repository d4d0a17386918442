"""The settings of a `cifar10` run. This module does not import torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from trainers.checkpoints import facts
from trainers.config.schema import Fraction, RunConfig, Section
from trainers.contract.errors import UserError
from trainers.contract.home import downloads, expanded
from trainers.contract.text import either

OWN_MODELS = ("vgg", "resnet18")
# The files that torchvision's CIFAR10 reads in its root. Importing torchvision to ask for them takes seconds.
CIFAR10_FILES = [f"cifar-10-batches-py/{name}"
                 for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")]


class Model(Section):
    arch: str = Field("vgg", description="vgg or resnet18 for small images, or any torchvision classifier's name")
    width: PositiveFloat = Field(1.0, description="only for vgg: multiplies the number of channels and hidden units")
    batch_norm: bool = Field(True, description="only for vgg: BatchNorm after each convolution")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="only for vgg: share of hidden units that are dropped")
    label_smoothing: Fraction = Field(0.0, description="share of the target that is spread over all classes in training")

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Model:
        if self.arch != "vgg":
            for key in ("width", "batch_norm", "dropout"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"model.{key} is only for vgg, but model.arch is {self.arch}")
        return self


class Data(Section):
    source: Annotated[str, Field(min_length=1)] = Field(
        "cifar10", description="cifar10, sample (drawn shapes, nothing to download), or a folder of images by class")
    root: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="where downloads go; null: $LAUNCH_DATA, else ~/.cache/launch")
    size: PositiveInt = Field(32, description="side of the images in pixels; other images are scaled to this size")
    pad: Annotated[int, Field(ge=0)] = Field(4, description="width of the reflected border for random crops, in pixels")
    flip: bool = Field(True, description="exchange left and right at random")
    cutout: Annotated[int, Field(ge=0)] = Field(0, description="side of a square that is blanked at random, in pixels; 0: none")
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of each class that is held out if the folder has no folder to evaluate on")
    eval_split: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="the folder to evaluate on; null: val, valid, validation or dev if there is one, otherwise test")
    bits: Annotated[int, Field(ge=8, le=16)] | None = Field(
        None, description="number of bits in use in the values of 16-bit images; null: 16, and images that are nearly black are "
                          "refused")

    @field_validator("source", "root")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        # Paths become absolute here, because a rank may have another working directory.
        return value if value in (None, "cifar10", "sample") else os.path.abspath(expanded(value))

    @model_validator(mode="after")
    def _fits(self) -> Data:
        if self.pad >= self.size:
            raise ValueError(f"data.pad is {self.pad}: a reflected border must be narrower than data.size, {self.size}")
        return self

    def download_root(self, environment: Mapping[str, str] = os.environ) -> Path:
        """Return the folder for downloads. Raises: UserError: it is in the user's home folder, which is not known."""
        return downloads(self.root, environment)


class Cifar10Config(RunConfig):
    """The spec of an image classifier."""

    model: Model = Model()
    data: Data = Data()

    def check(self) -> None:
        known = torchvision_models()
        if self.model.arch not in OWN_MODELS and known and self.model.arch not in known:
            near = ([name for name in known if name.startswith(self.model.arch)][:3]
                    or get_close_matches(self.model.arch, dict.fromkeys([*OWN_MODELS, *known]), n=3, cutoff=0.5))
            raise UserError(f"unknown architecture `{self.model.arch}` (`model.arch`)",
                            (f"did you mean {either(near)}? " if near else "") +
                            "use vgg, resnet18, or a classifier of torchvision.models")
        from_lines = self.eval.rows is not None and self.eval.rows.lines is not None
        if self.data.source not in ("cifar10", "sample") and not from_lines:
            from trainers.data.folders import list_images
            trained = facts.read(Path(self.init.source)) if self.eval.only and self.init.source else {}
            list_images(Path(self.data.source), self.data.eval_fraction, self.data.eval_split, trained or None)

    def missing(self, environment: Mapping[str, str] = os.environ) -> list[str]:
        if self.data.source != "cifar10":
            return []
        root = self.data.download_root(environment)
        return [] if all(os.path.isfile(root / file) for file in CIFAR10_FILES) else [f"CIFAR-10 in {root}"]


def torchvision_models() -> list[str]:
    """Return the names of the classifiers of the installed torchvision.

    They are read from torchvision's source, because importing it takes seconds. The list is empty if torchvision is not
    installed (a login node). Then the rank checks the name.
    """
    spec = find_spec("torchvision")
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in sorted(Path(folder, "models").glob("*.py"))]
    marked = re.compile(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
    return [name for file in files for name in marked.findall(file.read_text(encoding="utf-8"))]
