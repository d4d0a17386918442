"""The task `cifar10`: image classification, with top-1 accuracy, the confusion matrix and the accuracy of each class."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.cifar10.config import Cifar10Config
from trainers.cifar10.model import make_model
from trainers.contract.errors import UserError
from trainers.contract.events import emit
from trainers.contract.text import first_few
from trainers.data.augment import Augment
from trainers.data.folders import list_images, test_folder
from trainers.data.image_files import ImageFiles
from trainers.data.image_folder import load_folder
from trainers.data.images import Images, Statistics, as_trained, fetch_cifar10, load_cifar10, resident, to_evaluate
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
                sets = load_folder(Path(path), data.size, world, eval_fraction=data.eval_fraction, eval_split=data.eval_split,
                                   bits=data.bits, trained_on=trained or None)
        if trained:
            sets = as_trained(sets, trained["classes"])
            if world.main:
                self._compare_settings(trained)
        self.classes, self.from_folder = sets.classes, sets.facts
        self.evaluated = len(sets.test.labels) if sets.test else 0
        train, test = resident(sets, world.device, data.size, Augment(data.pad, data.flip, data.cutout),
                               Statistics(trained["mean"], trained["std"]) if trained else None)
        self.statistics = train.statistics
        self.final = sets.final
        return train, test

    def test_set(self, world: World) -> Images | None:
        """Return the images of `test/`, if the run evaluates another folder."""
        data, final = self.config.data, self.final
        if self.trained_facts and data.source not in ("cifar10", "sample"):  # `data` has loaded only the images to evaluate
            if name := test_folder(Path(data.source), data.eval_split):
                sets = load_folder(Path(data.source), data.size, world, eval_split=name, bits=data.bits,
                                   trained_on=self.trained_facts)
                final = as_trained(sets, self.classes).test
        return to_evaluate(final, self.classes, world.device, data.size, self.statistics) if final else None

    def inputs(self, lines: Sequence[str], world: World) -> ImageFiles:
        """Return the images whose paths are the lines. Each is scaled and normalised as in training."""
        data, trained = self.config.data, self.trained_facts
        if missing := [line for line in lines if not os.path.isfile(line)]:
            raise UserError(f"{len(missing):,} of {len(lines):,} lines are not the path of a file: "
                            f"{first_few([f'`{line}`' for line in missing])}", "give one path of an image in each line")
        if trained:
            if world.main:
                self._compare_settings(trained)
            self.classes, self.statistics = trained["classes"], Statistics(trained["mean"], trained["std"])
        else:  # a checkpoint of an older version says nothing of its training data
            self.data(world)
        return ImageFiles(lines, world.device, data.size, data.bits, self.statistics)

    def facts(self) -> dict[str, Any]:
        """Return `classes` (in the order of the logits), `mean` and `std` (of each channel, for pixels in [0, 1]), `size` (the
        side of the images in pixels), and for images from a folder `bits` (`data.bits`) and `Listing.facts`."""
        data = self.config.data
        return {"classes": self.classes, "mean": self.statistics.mean, "std": self.statistics.std, "size": data.size,
                **({"bits": data.bits, **self.from_folder} if self.from_folder else {})}

    def _compare_settings(self, trained: Mapping[str, Any]) -> None:
        """Warn if the images are read in another way than in training."""
        for key, now in (("size", self.config.data.size), ("bits", self.config.data.bits)):
            if key in trained and trained[key] != now:
                before, after = ("null" if value is None else value for value in (trained[key], now))
                emit({"event": "note", "level": "warning", "message": f"the model was trained with data.{key}={before}, but is "
                      f"evaluated with data.{key}={after}: the images look different to it"})

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
        # torch.bincount would wait for the GPU.
        pairs = torch.zeros(classes**2, dtype=torch.float64, device=labels.device).index_add_(
            0, labels * classes + predicted, torch.ones(n, dtype=torch.float64, device=labels.device)).view(classes, classes)
        return {
            "loss": (F.cross_entropy(logits, labels, reduction="sum"), n),
            "top1": (pairs.trace(), n),
            "class": (pairs.diagonal(), pairs.sum(1)),
            "confusion": (pairs, n),
        }

    def rows(self, models: Mapping[str, nn.Module], batch: tuple[Tensor, Any]) -> list[dict[str, Any]]:
        """Return the most probable class of each image, and its probability."""
        images, _ = batch
        probabilities, classes = models["model"](images).float().softmax(1).max(1)
        return [{"class": self.classes[number], "probability": round(probability, 4)}
                for number, probability in zip(classes.tolist(), probabilities.tolist())]

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
