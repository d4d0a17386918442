"""One rank's view of checkpoints, and tensors of all kinds that are difficult to save, for tests of saving."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

from trainers.checkpoints.evaluation import Evaluation
from trainers.config import schema as config
from trainers.contract.paths import RunPaths
from trainers.engine.parallel.fragments import Fragment
from trainers.engine.saving.checkpoint import Checkpoints
from trainers.engine.world import World

ONE = World(0, 1, 0, 1, torch.device("cpu"))


def make(seed: int) -> dict[str, torch.Tensor]:
    """Return tensors of all kinds that are difficult to save; the same seed gives the same tensors."""
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
    """Return dtype, shape and hash of each tensor; they are equal only if the tensors are equal to the last bit."""
    plain = {name: t.detach().resolve_conj().contiguous() for name, t in tensors.items()}
    flat = {name: t.reshape(-1).clone(memory_format=torch.contiguous_format) for name, t in plain.items()}
    raw = {name: t.view(torch.uint8).numpy() for name, t in flat.items()}
    return {name: [str(t.dtype), list(t.shape), hashlib.sha256(raw[name]).hexdigest()] for name, t in plain.items()}


def whole(tensors) -> dict[str, Fragment]:
    """Return each tensor as a fragment that holds the entire tensor."""
    return {name: Fragment.whole(tensor) for name, tensor in tensors.items()}


class Run:
    """One rank's view of a run's checkpoints, with the events that saving has sent and the steps that it has committed."""

    def __init__(self, root: Path, world: World = ONE, attempt: int | None = None, **settings):
        self.paths = RunPaths(Path(root))
        self.paths.root.mkdir(parents=True, exist_ok=True)  # as `launch` does before the ranks start
        self.events: list[dict] = []
        self.committed: list[int] = []
        self.checkpoints = Checkpoints(self.paths, world, config.Checkpoint(**{"keep_last": 9, **settings}),
                                       strategy="ddp", attempt=attempt, emit=self.events.append, on_commit=self.committed.append)

    def save(self, step: int, metrics=None, tensors=None) -> str | None:
        """Save a checkpoint and wait until it is written. Return the reason if it could not be written, otherwise None."""
        found = None if metrics is None else Evaluation(metrics, [])
        self.checkpoints.save(step, whole(make(step) if tensors is None else tensors), {"step": step}, found)
        return self.checkpoints.wait()

    def load(self, step: int) -> dict[str, list]:
        """Load a checkpoint and return its tensors as `bits` describes them."""
        reader, state = self.checkpoints.load(step)
        assert state == {"step": step}
        return bits({name: reader.tensor(name) for name in reader.shapes})

    def notes(self) -> list[str]:
        """Return the messages of all notes."""
        return [event["message"] for event in self.events if event["event"] == "note"]

    def names(self) -> list[str]:
        """Return the sorted names of everything in the folder of checkpoints."""
        return sorted(os.listdir(self.paths.checkpoints))
