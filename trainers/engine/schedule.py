"""Learning rates as functions of the number of applied updates: nothing to save, nothing to rewind."""

from __future__ import annotations

import math

from trainers.config.schema import Optim


def learning_rate(optim: Optim, updates: int, total: int) -> float:
    """The rate of the update after `updates` applied ones, of `total`.

    `warmup` below 1 is a share of `total`, else a number of updates. `onecycle` rises along a cosine
    from lr/25 to lr over the warm-up (0.3 of all if none is given) and falls to lr/250,000, as in
    Smith & Topin 2018 (arXiv:1708.07120) with PyTorch's OneCycleLR's constants; momentum stays.
    """
    warmup = optim.warmup * total if optim.warmup < 1 else optim.warmup
    if optim.schedule == "onecycle":
        peak = warmup or 0.3 * total
        if updates < peak:
            return _cosine(optim.lr / 25, optim.lr, updates / peak)
        return _cosine(optim.lr, optim.lr / 25 / 1e4, (updates - peak) / max(1.0, total - 1 - peak))
    if updates < warmup:
        return optim.lr * (updates + 1) / (warmup + 1)
    done = (updates - warmup) / max(1.0, total - warmup)
    match optim.schedule:
        case "constant":
            return optim.lr
        case "linear":
            return optim.lr * (1 + (optim.final_lr - 1) * min(1.0, done))
        case "cosine":
            return _cosine(optim.lr, optim.final_lr * optim.lr, done)


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, done))) / 2
