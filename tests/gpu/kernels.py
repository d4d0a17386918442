"""Checks of what only a GPU can show about the engine's choices: waiting for the device, noise, and deterministic kernels."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

from gpu import engine
from gpu.exact import IMAGES
from gpu.place import Place

SYNC = "called a synchronizing CUDA operation"


def host_syncs(place: Place) -> None:
    """No training step under ddp waits for the device, except in fp16, which must know whether a step was skipped."""
    import torch

    from trainers.engine.loop import Loop

    take_step = Loop._take_step
    for precision in ("fp32", "bf16"):
        found: Counter[str] = Counter()
        watched = 0

        def watch(loop: Loop) -> None:
            nonlocal watched
            if loop.step < 3:  # the first steps start libraries and choose kernels
                return take_step(loop)
            watched += 1
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if not place.toy:
                    torch.cuda.set_sync_debug_mode("warn")
                try:
                    take_step(loop)
                finally:
                    if not place.toy:
                        torch.cuda.set_sync_debug_mode("default")
            found.update(f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught
                         if SYNC in str(warning.message))

        Loop._take_step = watch  # type: ignore[method-assign]
        try:
            keys = [*IMAGES, f"train.precision={precision}", f"train.steps={6 if place.toy else 23}", "eval.every=never",
                    "checkpoint.every=never", *(["model.width=0.125", "train.batch_size=4"] if place.toy else [])]
            engine.train("cifar10", keys, place.folder / precision, place.device)
        finally:
            Loop._take_step = take_step  # type: ignore[method-assign]
        place.say(**{f"{precision} waits": dict(found), f"{precision} steps": watched})
        place.expect(watched > 0 and not found, f"{precision}: {sum(found.values())} waits in {watched} steps")
    if not place.toy:  # the check itself: does torch warn at all?
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            torch.ones(1, device="cuda").item()
            torch.cuda.set_sync_debug_mode("default")
        place.expect(any(SYNC in str(warning.message) for warning in caught), "torch does not warn of waits, so none was found")


def noise(place: Place) -> None:
    """Noise by sample has the values of the CPU: uniform to the last bit, normal to within rounding."""
    import numpy as np
    import torch

    from trainers.engine.batches import noise
    from trainers.engine.task import Share

    share = Share(np.arange(100), np.arange(100), 100, 7)
    cpu, device = torch.device("cpu"), torch.device(place.device, None if place.toy else 0)
    uniform, normal = ([make(share, 1001, device=where).cpu() for where in (cpu, device)]
                       for make in (noise.uniform, noise.normal))
    difference = float((normal[0] - normal[1]).abs().max())
    place.say(normal_bits_equal=float((normal[0] == normal[1]).double().mean()), normal_difference=difference)
    place.expect(torch.equal(*uniform), "uniform noise has other bits than on the CPU")
    place.expect(difference < 1e-5, f"normal noise differs from the CPU's by {difference}")


def attention(place: Place) -> None:
    """Where errors are asked for, the backward of attention has the same bits each time."""
    import torch
    from torch.nn import functional as F

    from trainers.engine.precision import set_deterministic

    device = torch.device(place.device)
    heads, length = (2, 16) if place.toy else (16, 1024)
    set_deterministic(True, False, device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for kind in ("causal", "mask"):
            name = f"{str(dtype).removeprefix('torch.')} {kind}"
            torch.manual_seed(0)
            inputs = [torch.randn(4, heads, length, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
            mask = torch.ones(4, 1, length, length, dtype=torch.bool, device=device).tril() if kind == "mask" else None

            def gradients() -> tuple[torch.Tensor, ...]:
                out = F.scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=mask is None)
                return torch.autograd.grad(out.float().square().sum(), inputs)

            try:
                first = gradients()
                differ = sum(not all(map(torch.equal, first, gradients())) for _ in range(8))
                place.say(**{name: f"{differ} of 8 differ"})
                place.expect(not differ, f"{name}: the backward has other bits in {differ} of 8 repetitions")
            except RuntimeError as error:  # right too: the engine then goes on with warnings
                place.say(**{name: f"refused: {str(error).splitlines()[0][:120]}"})
    set_deterministic(False, False, device)
