"""A task for the tests: a folder of images by class, read by worker processes, with transforms that draw from Python's, numpy's
and torch's global generators. The model has dropout."""

import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, ToTensor

from trainers.engine.map_style import MapStyle
from trainers.engine.task import Loss, Task

PACE = Path(os.environ.get("LAUNCH_RUN_DIR", ".")) / "pace"  # a test writes a new pause into this file


def draw_pictures(root, count=150):
    """Write `count` PNG files of noise, bright on the left or on the right, to train on, and a third of that to evaluate on."""
    numbers = np.random.default_rng(1)
    for number in range(count + count // 3):
        side = ("left", "right")[number % 2]
        folder = root / ("train" if number < count else "test") / side
        folder.mkdir(parents=True, exist_ok=True)
        pixels = numbers.integers(0, 128, (12, 12, 3), dtype=np.uint8)
        pixels[:, :6 if side == "left" else -7:-1] += 127
        Image.fromarray(pixels).save(folder / f"{number}.png")


def add_noise(image):
    """Change the brightness by Python's generator, and each pixel by numpy's."""
    return image * random.uniform(0.8, 1.2) + torch.from_numpy(np.random.normal(scale=0.1, size=image.shape)).float()


class Paced:
    def __init__(self, dataset, pause_s):
        self.dataset, self.pause_s = dataset, pause_s

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, row):
        if self.pause_s:
            time.sleep(float(PACE.read_text()) if PACE.exists() else self.pause_s)
        return self.dataset[row]


class Pictures(Task):
    def data(self, world):
        source, workers = Path(self.config.data["source"]), self.config.data["workers"]
        augment = Compose([RandomCrop(12, 2), RandomHorizontalFlip(0.1), ToTensor(), add_noise])
        train = Paced(ImageFolder(source / "train", augment), self.config.model["pause_s"])
        return MapStyle(train, workers=workers), MapStyle(ImageFolder(source / "test", ToTensor()), workers=workers)

    def model(self):
        return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(200, 2))

    def loss(self, model, batch):
        images, labels = batch
        return Loss(F.cross_entropy(model(images), labels, reduction="sum"), len(labels))


class Exact(Pictures):
    def model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(432, 2))
