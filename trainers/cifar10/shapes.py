"""The sample set: drawn shapes, not CIFAR-10. The images are made by code, so a first run needs no download."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trainers.data.images import Raw, RawSets

SIDE = 32
TRAIN, TEST = 1000, 500

# Each function takes x and y [n, S, S], the coordinates of the pixels relative to the shape, whose radius is 1. It returns
# how far inside the shape each pixel lies (negative: outside), in the same unit.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "checkers": lambda x, y: np.sin(4 * x) * np.sin(4 * y) / 4,
    "circle": lambda x, y: 1 - np.hypot(x, y),
    "crescent": lambda x, y: np.minimum(1 - np.hypot(x, y), np.hypot(x - 0.6, y) - 0.9),
    "cross": lambda x, y: np.maximum(np.minimum(0.3 - abs(x), 1 - abs(y)), np.minimum(0.3 - abs(y), 1 - abs(x))),
    "diamond": lambda x, y: (1 - abs(x) * 1.4 - abs(y)) / 1.7,
    "dots": lambda x, y: 0.45 - np.hypot(np.sin(3 * x), np.sin(3 * y)),
    "ring": lambda x, y: 0.25 - abs(np.hypot(x, y) - 0.75),
    "square": lambda x, y: 0.85 - np.maximum(abs(x), abs(y)),
    "stripes": lambda x, y: np.sin(5 * x) / 5,
    "triangle": lambda x, y: np.minimum(y + 0.7, (0.9 - y) / 2 - abs(x) * 0.9),
}


def draw_shapes(seed: int = 0) -> RawSets:
    """Return 1,000 training and 500 test images of 32 x 32 in ten classes of equal size.

    Place, size, tilt, colours and noise vary.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    classes, n = list(SHAPES), TRAIN + TEST
    labels = np.arange(n) % len(classes)
    grid = np.arange(SIDE, dtype=np.float32) - (SIDE - 1) / 2

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return low + (high - low) * rng.random(shape, np.float32)

    radius = uniform(6, 12, n, 1, 1)
    x, y = grid - uniform(-5, 5, n, 1, 1), grid[:, None] - uniform(-5, 5, n, 1, 1)
    tilt = uniform(-0.25, 0.25, n, 1, 1)
    x, y = (np.cos(tilt) * x + np.sin(tilt) * y) / radius, (np.cos(tilt) * y - np.sin(tilt) * x) / radius
    inside = np.empty((n, SIDE, SIDE), np.float32)
    for number, shape in enumerate(SHAPES.values()):
        inside[number::len(classes)] = shape(x[number::len(classes)], y[number::len(classes)])
    cover = np.clip(inside * radius + 0.5, 0, 1)[:, None]  # smooth edges, one pixel wide

    ground = uniform(30, 225, n, 3, 1, 1)
    shift = uniform(50, 110, n, 3, 1, 1)
    colour = ground + np.where(ground > 127, -shift, shift)
    grey = uniform(5, 20, n, 1, 1, 1) * rng.standard_normal((n, 1, SIDE, SIDE), np.float32)
    pixels = (colour - ground) * cover
    pixels += ground
    pixels += grey
    pixels = np.clip(pixels, 0, 255, out=pixels).astype(np.uint8)
    return RawSets(Raw(pixels[:TRAIN], labels[:TRAIN]), Raw(pixels[TRAIN:], labels[TRAIN:]), classes)
