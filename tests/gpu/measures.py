"""Checks that measure: how long a save holds training up, how fast training is, how much memory it needs."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from gpu import engine
from gpu.facts import timed
from gpu.place import Place

HEADROOM = 0.15  # by which the memory in use may differ from the estimate


def stall(place: Place) -> None:
    """A save holds training up for less time than accelerate's `save_state`, and copies what was there."""
    import torch
    from accelerate import Accelerator
    from made import make_run
    from torch import nn

    from trainers.config import schema
    from trainers.engine.parallel.fragments import Fragment
    from trainers.engine.saving.checkpoint import Checkpoints
    from trainers.engine.saving.staging import Staging
    from trainers.engine.world import World

    layers, width = (2, 64) if place.toy else (20, 2500)  # 500 MB
    device = torch.device("cpu") if place.toy else torch.device("cuda", 0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).to(device)
    tensors = dict(model.named_parameters())
    size = sum(tensor.nbytes for tensor in tensors.values())

    def seconds(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    staging = Staging()
    first, second = (seconds(lambda: staging.copies(tensors)) for _ in range(2))
    copies = staging.copies(tensors)
    place.say(megabytes=round(size / 1e6), first_copy_s=round(first, 4), next_copy_gb_s=round(size / second / 1e9, 2),
              pinned=staging._block.is_pinned())
    place.expect(all(torch.equal(copies[name], tensor.detach().cpu()) for name, tensor in tensors.items()), "copies differ")
    place.expect(place.toy or staging._block.is_pinned(), "the block for copies is not pinned")
    checkpoints = Checkpoints(make_run(place.folder / "run"), World(0, 1, 0, 1, device), schema.Checkpoint(keep_last=1),
                              strategy="ddp", attempt=None, emit=lambda event: None, on_commit=lambda step: None)
    accelerator = Accelerator(cpu=place.toy)
    accelerator.prepare(model)
    fragments = {f"models/model/{name}": Fragment.whole(tensor) for name, tensor in tensors.items()}

    def theirs() -> None:
        shutil.rmtree(place.folder / "state", ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()):
            accelerator.save_state(str(place.folder / "state"))

    ratios, stalls = [], []
    for turn in range(4):  # the first does not count: it allocates
        our_s = seconds(lambda: checkpoints.save(turn + 1, fragments, {}))
        place.expect(checkpoints.wait() is None, "a checkpoint was not written")
        their_s = seconds(theirs)
        if turn:
            ratios.append(our_s / their_s)
            stalls.append(our_s)
    checkpoints.close()
    place.say(stall_s=round(statistics.median(stalls), 4), ratio_to_save_state=round(statistics.median(ratios), 3))
    place.expect(place.toy or statistics.median(ratios) < 0.5, f"the stall is {statistics.median(ratios):.2f} of save_state's")


def throughput(place: Place) -> None:
    """Training is about as fast as the shortest plain loop with the same model and kernels."""
    import torch
    from torch.nn import functional as F

    from trainers.cifar10.task import Cifar10
    from trainers.engine.precision import set_deterministic
    from trainers.engine.world import World

    steps, skipped = (6, 2) if place.toy else (100, 20)
    for batch in (8,) if place.toy else (64, 512):
        for deterministic in (True,) if place.toy else (True, False):
            keys = ["data=sample", "data.pad=0", "data.flip=false", "eval.every=never", "checkpoint.every=never",
                    "train.precision=bf16", f"train.batch_size={batch}", f"train.steps={steps}",
                    f"train.deterministic={str(deterministic).lower()}", *(["model.width=0.125"] if place.toy else [])]
            name = f"batch {batch}, {'deterministic' if deterministic else 'fastest'} kernels"
            folder = place.folder / name
            engine.train("cifar10", keys, folder, place.device, every=10 if not place.toy else 2)
            rates = [json.loads(line)["rate"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
            ours = len(rates[2:]) / sum(1 / rate for rate in rates[2:])

            config = engine.config_of("cifar10", keys)
            task = Cifar10(config)
            world = World.from_env({"ACCELERATE_USE_CPU": "true"} if place.toy else {})
            set_deterministic(deterministic, False, world.device)
            data, _ = task.data(world)
            model = task.model().to(world.device, memory_format=torch.channels_last)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-3, fused=True)
            images, labels = data.pixels.float().div(255).sub(0.5).div(0.25), data.labels

            def step() -> None:
                rows = torch.randint(len(labels), (batch,), device=world.device)
                with torch.autocast(world.device.type, torch.bfloat16):
                    loss = F.cross_entropy(model(images[rows]), labels[rows], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

            for _ in range(skipped):
                step()
            plain = batch / timed(step, place, steps - skipped)
            place.say(**{name: {"images_per_s": round(ours), "of the plain loop": round(ours / plain, 3)}})
            place.expect(place.toy or ours > 0.7 * plain, f"{name}: {ours / plain:.2f} of the plain loop's images a second")


def memory(place: Place) -> None:
    """The memory that a run needs is what `launch plan` expects."""
    import sys

    import torch

    sys.path.append(str(Path(__file__).parents[1] / "sentences"))
    from sentences import Model

    from trainers.config.memory import expected
    from trainers.probe import count

    size = {"width": 32, "heads": 2, "depth": 2} if place.toy else {"width": 1024, "heads": 8, "depth": 16}
    for ema in (None, 0.99):
        keys = [*(f"model.{key}={value}" for key, value in size.items()), "train.batch_size=1", "train.steps=3",
                "eval.every=never", "checkpoint.every=never", f"train.ema={ema or 'null'}"]
        with torch.device("meta"):
            counts = count({"model": Model(**size)})
        estimate = expected(engine.config_of(engine.SENTENCES, keys), counts, 1, place.device).total
        place.expect(estimate > 0, "nothing is expected")
        if place.toy:
            engine.train(engine.SENTENCES, keys, place.folder / str(ema), "cpu")
            continue
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        engine.train(engine.SENTENCES, keys, place.folder / str(ema), "cuda")
        used = torch.cuda.max_memory_allocated() - before
        place.say(**{f"ema {ema}": {"mib": round(used / 2**20), "expected_mib": round(estimate / 2**20)}})
        place.expect(abs(estimate / used - 1) < HEADROOM, f"ema {ema}: {estimate / used:.2f} of the memory in use was expected")


def language_model(place: Place) -> None:
    """How much of the card's speed a Transformer of 100M parameters reaches, eager and compiled."""
    import torch

    width, depth, words, length, batch = (16, 1, 50, 16, 2) if place.toy else (768, 12, 32000, 1024, 16)
    keys = [f"model.width={width}", f"model.depth={depth}", f"model.words={words}", f"model.longest={length}",
            f"model.heads={max(1, width // 64)}", f"train.batch_size={batch}", f"train.steps={4 if place.toy else 40}",
            "train.precision=bf16", "train.deterministic=false", "eval.every=never", "checkpoint.every=never"]
    parameters = 12 * depth * width**2 + words * width  # that take part in matrix products
    operations = 6 * parameters + 6 * depth * length * width  # a token, forward and backward; causal attention does half
    task, side = place.task("Language"), 64 if place.toy else 8192
    a, b = (torch.randn(side, side, device=place.device, dtype=torch.bfloat16) for _ in range(2))
    best = 2 * side**3 / timed(lambda: a @ b, place, 10)
    for compiled in (False,) if place.toy else (False, True):
        name = "compiled" if compiled else "eager"
        try:
            engine.train(task, [*keys, f"train.compile={str(compiled).lower()}"], place.folder / name, place.device,
                         every=2 if place.toy else 10)
        except Exception as error:
            place.expect(False, f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            continue
        rate = json.loads((place.folder / name / "metrics.jsonl").read_text().splitlines()[-1])["rate"]
        share = rate * operations / best
        place.say(**{name: {"tokens_per_s": round(rate), "of the matrix product's speed": round(share, 3)}})
        place.expect(place.toy or share > 0.2, f"{name}: {share:.2f} of the matrix product's speed")
