"""Learning rates as functions of the number of applied optimizer steps. A schedule has no state to save."""

from __future__ import annotations

import math

from trainers.config.schema import Optim


def learning_rate(optim: Optim, applied: int, total: int) -> float:
    """Return the learning rate of the next optimizer step, after `applied` of `total` steps were applied.

    `optim.warmup` below 1 is a share of `total`, otherwise a number of steps. The schedule `onecycle` rises along a cosine
    from lr / 25 to lr during the warm-up (0.3 of `total` if `warmup` is 0), then falls to lr / 250,000. It follows Smith &
    Topin 2018 (arXiv:1708.07120) with the constants of PyTorch's OneCycleLR, but leaves the momentum constant.

    The schedule `inverse_sqrt` reaches lr in step number `warmup`, and from then on falls as 1 / sqrt(step) (Vaswani et al. 2017,
    arXiv:1706.03762, section 5.3). It does not depend on `total`, unless `warmup` is a share of it.
    """
    warmup = optim.warmup * total if optim.warmup < 1 else optim.warmup
    if optim.schedule == "inverse_sqrt":
        step, peak = applied + 1, max(1.0, warmup)
        return optim.lr * min(step / peak, math.sqrt(peak / step))
    if optim.schedule == "onecycle":
        peak = warmup or 0.3 * total
        if applied < peak:
            return _cosine(optim.lr / 25, optim.lr, applied / peak)
        return _cosine(optim.lr, optim.lr / 25 / 1e4, (applied - peak) / max(1.0, total - 1 - peak))
    if applied < warmup:
        return optim.lr * (applied + 1) / (warmup + 1)
    done = (applied - warmup) / max(1.0, total - warmup)
    match optim.schedule:
        case "constant":
            return optim.lr
        case "linear":
            return optim.lr * (1 + (optim.final_lr - 1) * min(1.0, done))
        case "cosine":
            return _cosine(optim.lr, optim.final_lr * optim.lr, done)


def _cosine(start: float, end: float, done: float) -> float:
    """Return the value at share `done` of a half cosine from `start` to `end`; `end` if `done` is above 1."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, done))) / 2
