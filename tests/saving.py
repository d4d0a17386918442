"""Checkpoints as one rank sees them, and tensors of all awkward kinds, for tests of what is saved."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

from trainers.config import schema as config
from trainers.contract.paths import RunPaths
from trainers.engine.parallel.fragments import Fragment
from trainers.engine.saving.checkpoint import Checkpoints
from trainers.engine.world import World

ONE = World(0, 1, 0, 1, torch.device("cpu"))


def make(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of all awkward kinds; the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    return {
        "model.layers.0/weight": torch.randn(64, 33, generator=g),
        "model/names with spaces, ünd dots...": torch.nn.Parameter(torch.randn(40, 50, generator=g)),
        "bf16": torch.randn(129, generator=g).bfloat16(),
        "fp16": torch.randn(7, generator=g).half(),
        "int64": torch.randint(-2**62, 2**62, (5, 3), generator=g),
        "bytes": torch.randint(0, 256, (11,), generator=g).byte(),
        "mask": torch.rand(9, generator=g) > 0.5,
        "complex": torch.randn(3, generator=g) + 1j,
        "conjugated": (torch.randn(3, generator=g) + 1j).conj(),
        "step": torch.tensor(2**60 + seed),
        "empty": torch.empty(0, 3),
        "transposed": torch.randn(5, 7, generator=g).t(),
        "strided": torch.randn(20, generator=g)[::3],
        "expanded": torch.randn(4, 1, generator=g).expand(4, 6),
        "part of more": torch.randn(1000, generator=g)[10:14],
        "channels last": torch.randn(2, 3, 4, 5, generator=g).to(memory_format=torch.channels_last),
        "one of many": torch.randn(1, 20, generator=g)[:, ::20],
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    }


def bits(tensors) -> dict[str, list]:
    """Each tensor to the last bit: dtype, shape, hash."""
    plain = {name: t.detach().resolve_conj().contiguous() for name, t in tensors.items()}
    flat = {name: t.reshape(-1).clone(memory_format=torch.contiguous_format) for name, t in plain.items()}
    raw = {name: t.view(torch.uint8).numpy() for name, t in flat.items()}
    return {name: [str(t.dtype), list(t.shape), hashlib.sha256(raw[name]).hexdigest()] for name, t in plain.items()}


def whole(tensors) -> dict[str, Fragment]:
    return {name: Fragment.whole(tensor) for name, tensor in tensors.items()}


class Run:
    """One rank's view of a run's checkpoints, and what was said."""

    def __init__(self, root: Path, world: World = ONE, attempt: int | None = None, **settings):
        self.paths = RunPaths(Path(root))
        self.said: list[dict] = []
        self.committed: list[int] = []
        self.checkpoints = Checkpoints(self.paths, world, config.Checkpoint(**{"keep_last": 9, **settings}),
                                       strategy="ddp", attempt=attempt, say=self.said.append, committed=self.committed.append)

    def save(self, step: int, metrics=None, tensors=None) -> str | None:
        self.checkpoints.save(step, whole(make(step) if tensors is None else tensors), {"step": step}, metrics or {})
        return self.checkpoints.wait()

    def load(self, step: int) -> dict[str, list]:
        reader, state = self.checkpoints.load(step)
        assert state == {"step": step}
        return bits({name: reader.tensor(name) for name in reader.shapes})

    def notes(self) -> list[str]:
        return [event["message"] for event in self.said if event["event"] == "note"]

    def names(self) -> list[str]:
        return sorted(os.listdir(self.paths.checkpoints))
