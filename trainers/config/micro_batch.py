"""`train.micro_batch_size=auto`: the largest that fits, found by trying. Imports no torch.

A rank whose device is full cannot go on with a smaller micro-batch: the others wait for it in a collective. So it writes
down what did not fit, and ends as any rank that fails; the next attempt goes on from the newest checkpoint with the next
smaller size. Whoever starts attempts need not know of it: only that such an end is no failure to count (`gave_way`).
"""

from __future__ import annotations

from typing import Any

from trainers.config.schema import RunConfig
from trainers.contract.errors import OutOfMemory
from trainers.contract.files import read_json, replace_json
from trainers.contract.paths import RunPaths


def tried(paths: RunPaths) -> list[dict[str, Any]]:
    """What did not fit, oldest first: {"attempt": of which (None by hand), "size", "next"}."""
    try:
        return read_json(paths.micro_batch)
    except FileNotFoundError:
        return []


def gave_way(paths: RunPaths, attempt: int) -> bool:
    """Whether this attempt ended so that the next one takes a smaller micro-batch."""
    try:
        return any(entry["attempt"] == attempt for entry in tried(paths))
    except (OSError, ValueError):
        return False


def settled(config: RunConfig, paths: RunPaths, ranks: int) -> RunConfig:
    """The config with a number in place of `auto`: the whole share of a rank, or the largest part of it that is not
    larger than what was found to be worth a try. What another node has just written, a network file system may not show
    yet: ranks take the least of what each has found."""
    if config.train.micro_batch_size != "auto" or config.eval.only:
        return config
    share, _ = config.train.split(ranks)
    found = tried(paths)
    most = found[-1]["next"] if found else share
    return with_size(config, max(size for size in range(1, min(share, most) + 1) if share % size == 0))


def note(settled: RunConfig, paths: RunPaths, ranks: int) -> str:
    """What was chosen, in words."""
    micro, accumulation = settled.train.split(ranks)
    full = [str(entry["size"]) for entry in tried(paths)]
    why = f" ({', '.join(full)} did not fit)" if full else ""
    return f"train.micro_batch_size=auto: {micro}, {accumulation} to a step{why}"


def too_large(config: RunConfig, settled: RunConfig, paths: RunPaths, attempt: int | None, rank: int, ranks: int
              ) -> OutOfMemory:
    """What a rank says whose device was full; of `auto`, the next attempt's size is written down.

    Args:
        config: as the spec has it. settled: as the rank had it.
    """
    micro, _ = settled.train.split(ranks)
    said = f"rank {rank} ran out of memory with a micro-batch of {micro}"
    less = "train.checkpoint_activations=true, --strategy fsdp or more ranks need less; `launch plan` reckons it up"
    share = config.train.batch_size // ranks
    smaller = max((size for size in range(1, micro) if share % size == 0), default=None)
    if smaller is None:
        return OutOfMemory(f"{said}, the smallest there is", less, retry=False)
    if config.train.micro_batch_size != "auto":
        return OutOfMemory(said, f"a new run with train.micro_batch_size={smaller} or auto; or {less}", retry=False)
    entry = {"attempt": attempt, "size": micro, "next": smaller}
    found = tried(paths)
    if entry not in found:  # another rank may have said so
        replace_json(paths.micro_batch, [*found, entry])
    return OutOfMemory(said, f"the next attempt takes {smaller} at a time", retry=True)


def with_size(config: RunConfig, micro: int) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": micro})})
