"""The task `cifar10`: image classification, with top-1 accuracy, the confusion matrix and the accuracy of each class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.cifar10.config import Cifar10Config
from trainers.cifar10.model import make_model
from trainers.data.augment import Augment
from trainers.data.folders import list_images
from trainers.data.image_folder import load_folder
from trainers.data.images import Images, Statistics, as_trained, fetch_cifar10, load_cifar10, resident
from trainers.engine.task import Loss, Measures, Task
from trainers.engine.world import World

Batch = tuple[Tensor, Tensor]  # images float32 [n, 3, S, S], labels int64 [n]


class Cifar10(Task):
    """Image classification, as a task."""

    unit = "images"
    config: Cifar10Config

    def prefetch(self) -> list[str]:
        if self.config.data.source != "cifar10":
            return []
        root = self.config.data.download_root()
        return [f"CIFAR-10: {'fetched into' if fetch_cifar10(root) else 'already in'} {root}"]

    def data(self, world: World) -> tuple[Images, Images | None]:
        data, trained = self.config.data, self.trained_facts
        match data.source:
            case "cifar10":
                sets = load_cifar10(data.download_root(), world)
            case "sample":
                from trainers.cifar10.shapes import draw_shapes
                sets = draw_shapes()
            case path:
                trained_on = trained.get("files", "") if trained else None
                sets = load_folder(Path(path), data.size, world, eval_fraction=data.eval_fraction, eval_split=data.eval_split,
                                   bits=data.bits, trained_on=trained_on)
        if trained:
            sets = as_trained(sets, trained["classes"])
        self.classes, self.files = sets.classes, sets.names
        self.evaluated = len(sets.test.labels) if sets.test else 0
        train, test = resident(sets, world.device, data.size, Augment(data.pad, data.flip, data.cutout),
                               Statistics(trained["mean"], trained["std"]) if trained else None)
        self.statistics = train.statistics
        return train, test

    def facts(self) -> dict[str, Any]:
        """Return `classes` (in the order of the logits), `mean` and `std` (of each channel, for pixels in [0, 1]), `size` (the
        side of the images in pixels) and `files` (a hash of the names of the image files)."""
        return {"classes": self.classes, "mean": self.statistics.mean, "std": self.statistics.std, "size": self.config.data.size,
                **({"files": self.files} if self.files else {})}

    def model(self) -> nn.Module:
        return make_model(self.config.model, self.class_count(), self.config.data.size)

    def class_count(self) -> int:
        """Return the number of classes, without reading an image: `launch plan` counts a model's parameters without its data."""
        if hasattr(self, "classes"):  # `data` was called
            return len(self.classes)
        source = self.config.data.source
        if source in ("cifar10", "sample"):
            return 10
        return len(list_images(Path(source), self.config.data.eval_fraction, self.config.data.eval_split).classes)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        images, labels = batch
        smoothing = self.config.model.label_smoothing
        return Loss(F.cross_entropy(model(images), labels, reduction="sum", label_smoothing=smoothing), len(labels))

    def measure(self, model: nn.Module, batch: Batch) -> Measures:
        """Return `loss` (without smoothing), `top1`, `class` [C] and `confusion` [C, C], as sums and counts.

        `class` is the accuracy of each class. `confusion` is the share of all images that have the true class of the row and
        the predicted class of the column.
        """
        images, labels = batch
        logits, n, classes = model(images), len(labels), len(self.classes)
        predicted = logits.argmax(1)
        pairs = torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes).double()
        return {
            "loss": (F.cross_entropy(logits, labels, reduction="sum"), n),
            "top1": (pairs.trace(), n),
            "class": (pairs.diagonal(), pairs.sum(1)),
            "confusion": (pairs, n),
        }

    def report(self, measured: Mapping[str, Tensor], figures: Path | None) -> dict[str, float]:
        metrics = super().report(measured, figures)
        for name, accuracy in zip(self.classes, measured["class"].tolist()):
            if not math.isnan(accuracy):  # nan: no image of this class was evaluated
                metrics[f"class/{name}"] = accuracy
        if figures is not None:
            from trainers.cifar10.figure import draw_confusion
            counts = (measured["confusion"] * self.evaluated).round().long()
            draw_confusion(counts.cpu().numpy(), self.classes, figures / "confusion.png")
        return metrics
