"""Train with the engine in this process, without `launch`, to compare runs to the last bit.

    python -m gpu.engine JOBS      # JOBS: a JSON list of the arguments of `train`, each an object
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LAUNCH_SHARE_GPU")
SENTENCES = TESTS / "sentences" / "sentences.yaml"


@dataclass(frozen=True)
class Trained:
    """What a run has computed.

    Attributes:
        steps: (step, loss, norm of the gradients) of each logged step.
        evaluations: the metrics of each evaluation.
        files: the hash of the tensors in each file of the last checkpoint. (A resumed run may write them in another order.)
    """

    steps: list[tuple[int, float, float]]
    evaluations: list[dict[str, Any]]
    files: dict[str, str]


class Cut(Exception):
    """Training was cut off, as asked for."""


def config_of(task: str | Path, keys: list[str]):
    """Return the config of a task with these overrides. A later one replaces an earlier one of the same key."""
    from launch.cluster.config import load_cluster
    from launch.plan.spec import load_spec

    keys = list({key.partition("=")[0]: key for key in keys}.values())
    return load_spec(str(task), keys, cluster=load_cluster("local"), environment={}).config


def train(task: str | Path, keys: list[str], folder: str | Path, device: str, cut: int | None = None,
          every: int = 1) -> Trained | None:
    """Train, or continue the run in `folder`. Return what is in the folder at the end, on rank 0.

    Args:
        device: "cpu" or "cuda".
        cut: the step after which training fails; None: it goes on to the end. Then the result is None.
        every: steps from one logged step to the next.
    """
    from trainers.config.spec import resolve
    from trainers.contract.paths import RunPaths
    from trainers.engine import loop
    from trainers.engine.parallel.strategy import close_process_group
    from trainers.engine.world import World

    config, paths = config_of(task, [*keys, f"log.every={every}"]), RunPaths(Path(folder))
    paths.root.mkdir(parents=True, exist_ok=True)
    # `launch` is not here, so torchrun's variables count only for jobs that several ranks do together.
    variables = {key: value for key, value in os.environ.items() if key.startswith(RANK_VARIABLES)}
    world = World.from_env(variables | ({"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {}))
    world.start_process_group() if world.size > 1 else None
    with _cut_after(cut):
        try:
            loop.train(resolve(config.task, config.path)(config), config, world, paths, None)
        except Cut:
            return None
        finally:
            close_process_group()
    return read(paths.root) if world.main else None


@contextmanager
def _cut_after(step: int | None) -> Iterator[None]:
    from trainers.engine.loop import Loop

    take_step = Loop._take_step

    def cut(loop: Loop) -> None:
        if loop.step == step:
            raise Cut
        take_step(loop)

    Loop._take_step = cut  # type: ignore[method-assign]
    try:
        yield
    finally:
        Loop._take_step = take_step  # type: ignore[method-assign]


def read(root: Path) -> Trained:
    """Return what a run has computed, from its folder."""
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    newest = max((root / "checkpoints").glob("step_*"), key=lambda folder: int(folder.name.removeprefix("step_")))
    return Trained(
        [(row["step"], row["loss"], row["grad_norm"]) for row in rows if row["split"] == "train"],
        [{key: value for key, value in row.items() if key != "time"} for row in rows if row["split"] == "eval"],
        {file.name: _hash(file) for file in sorted(newest.glob("*.safetensors"))})


def _hash(file: Path) -> str:
    from safetensors.torch import load_file

    from trainers.engine.saving.storage import raw

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw(tensor))
    return digest.hexdigest()


if __name__ == "__main__":
    for job in json.loads(sys.argv[1]):
        train(**job)
    sys.stdout.flush()
    os._exit(0)  # at once, as ranks end
