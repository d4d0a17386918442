"""Compare how fast training images are augmented: in batches by `trainers.data.images`, and one by one by torchvision.

    python tests/benchmarks/augmentation.py [--threads 1] [--rounds 5] [--cutout 0] [--device cpu]

Both sides read the 2,000 drawn shapes of `data=sample` from memory and return normalised float32 batches of 128 images. They
crop with a reflected border of 4 pixels, flip, and with --cutout blank a square. The torchvision side uses the v1 transforms on
PIL images, as in torchvision's examples, in a DataLoader with 0 and with 2 workers, which stay alive between rounds. The faster
of the two DataLoaders counts. A worker has one thread, and our side has --threads threads, 1 by default. All sides take turns in
each round, and the best round of each side counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from trainers.cifar10.shapes import draw_shapes
from trainers.data.augment import Augment
from trainers.data.images import Raw, mean_and_std, resident
from trainers.engine.batches.sampling import Shuffled

BATCH, PAD = 128, 4


class OneByOne(Dataset):
    """The raw images, one at a time, as torchvision's CIFAR10 returns them."""

    def __init__(self, raw: Raw, transform: Callable):
        self.pixels = np.ascontiguousarray(raw.pixels.transpose(0, 2, 3, 1))
        self.labels, self.transform = raw.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of our side (default: 1)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up (default: 5)")
    parser.add_argument("--cutout", type=int, default=0, help="side of the blanked square in pixels (default: 0, none)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="device of the batches (default: cpu)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sets = draw_shapes()

    train, _ = resident(sets, args.device, 32, Augment(PAD, True, args.cutout))
    order = Shuffled(len(train), BATCH, 0, "benchmark")
    draw = 0

    def batched() -> int:
        nonlocal draw
        images = 0
        for _ in range(200):  # 25,600 images take long enough to time
            batch, labels = train.batch(order.shares(draw, 0, 1)[0])
            batch, labels = batch.to(args.device), labels.to(args.device)
            draw, images = draw + 1, images + len(labels)
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        return images

    mean, std = mean_and_std(sets.train.pixels)
    steps = [transforms.RandomCrop(32, PAD, padding_mode="reflect"), transforms.RandomHorizontalFlip(),
             transforms.ToTensor(), transforms.Normalize(mean, std)]
    if args.cutout:
        share = (args.cutout / 32) ** 2
        steps.append(transforms.RandomErasing(p=1.0, scale=(share, share), ratio=(1, 1)))
    one_by_one = OneByOne(sets.train, transforms.Compose(steps))

    def loader(workers: int) -> Callable[[], int]:
        batches = DataLoader(one_by_one, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)

        def one_by_one_images() -> int:
            return sum(len(batch.to(args.device)) for _ in range(2) for batch, _ in batches)

        return one_by_one_images

    contestants = {"batched, resident": batched, "torchvision, 0 workers": loader(0),
                   "torchvision, 2 workers": loader(2)}
    best = dict.fromkeys(contestants, 0.0)
    for turn in range(args.rounds + 1):
        for name, augment in contestants.items():
            began = time.perf_counter()
            rate = augment() / (time.perf_counter() - began)
            if turn:  # the first turn is the warm-up
                best[name] = max(best[name], rate)
    for name, rate in best.items():
        print(f"{name:24} {rate:10,.0f} images/s")
    ours, *theirs = best.values()
    print(f"{'ratio to torchvision':24} {ours / max(theirs):10.1f}")
    print(f"torch {torch.__version__}, {args.device}, {args.threads} thread(s)")


if __name__ == "__main__":
    main()
