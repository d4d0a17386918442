"""`train.micro_batch_size=auto`: find the largest micro-batch that fits, by trying. Imports no torch.

A rank that runs out of memory cannot continue with a smaller micro-batch, because the other ranks wait for it in a collective.
The rank records the size that did not fit, and fails. The next attempt continues from the newest checkpoint with the next
smaller size. Such an end does not count as a failure (`retries.changes_settings`).
"""

from __future__ import annotations

from typing import Any

from trainers.config.schema import RunConfig
from trainers.contract.errors import OutOfMemory, Work
from trainers.contract.files import read_json, replace_json
from trainers.contract.paths import RunPaths

LESS = "train.checkpoint_activations=true, --strategy fsdp or more ranks (`launch plan` shows what each needs)"


def tried_sizes(paths: RunPaths) -> list[dict[str, Any]]:
    """Return the sizes that did not fit, oldest first.

    Each entry is {"attempt": number of the attempt (None if started without `launch`), "size": the size that did not fit,
    "next": the size to try next}.
    """
    try:
        return read_json(paths.micro_batch)
    except FileNotFoundError:
        return []


def settled(config: RunConfig, paths: RunPaths, ranks: int) -> RunConfig:
    """Return the config with a number in place of `auto`.

    The number is a rank's whole share of the batch. If that did not fit, it is the largest size that the ranks can use and
    that is not larger than the size to try next. Ranks may get different numbers, because a network file system may not show
    yet what another node has just written: the caller takes the smallest number of all ranks.
    """
    if config.train.micro_batch_size != "auto" or config.eval.only:
        return config
    entries = tried_sizes(paths)
    most = with_size(config, entries[-1]["next"]) if entries else config
    return with_size(config, most.batching(ranks).micro)


def note(settled: RunConfig, paths: RunPaths, ranks: int) -> str:
    """Return a line that tells the user which size was chosen."""
    split = settled.batching(ranks)
    too_large_sizes = [str(entry["size"]) for entry in tried_sizes(paths)]
    why = f" ({', '.join(too_large_sizes)} did not fit)" if too_large_sizes else ""
    return f"train.micro_batch_size=auto: {split.micro} micro-batch x {split.accumulation} accumulation{why}"


def out_of_memory(config: RunConfig, settled: RunConfig, paths: RunPaths, attempt: int | None, rank: int, ranks: int,
                  work: Work | None) -> OutOfMemory:
    """Return the error of a rank that ran out of memory. With `auto`, also record the size for the next attempt, if a smaller
    micro-batch needs less memory for this work.

    Args:
        config: the config in the spec.
        settled: the config that the rank used.
        work: what the rank was doing ("sample": a step, with a micro-batch of one sample); None: something else.
    """
    split = settled.batching(ranks)
    match work:
        case "step":
            message = f"rank {rank} ran out of memory with a micro-batch of {split.micro}{' tokens' if split.tokens else ''}"
        case "sample":
            message = f"rank {rank} ran out of memory with a micro-batch of 1{' sample' if split.tokens else ''}"
        case "evaluation":
            message = f"rank {rank} ran out of memory in an evaluation, {split.evaluation} {split.evaluation_unit} at a time"
        case "checkpoint":
            return OutOfMemory(f"rank {rank} ran out of memory while it copied a checkpoint into the host's memory",
                               "give each rank more of the host's memory (sbatch.mem=SIZE), or use train.strategy=fsdp on more "
                               "ranks", retry=False)
        case None:
            return OutOfMemory(f"rank {rank} ran out of memory outside of steps, evaluations and checkpoints: see its log",
                               f"use {LESS}", retry=False)
    # Whether a smaller micro-batch needs less memory.
    follows = work == "step" or work == "evaluation" and split.evaluated is None
    smaller = split.smaller() if follows and not config.eval.only else None
    if smaller and config.train.micro_batch_size == "auto":
        entry = {"attempt": attempt, "size": split.micro, "next": smaller}
        entries = tried_sizes(paths)
        if entry not in entries:  # another rank may have written the same entry
            replace_json(paths.micro_batch, [*entries, entry])
        return OutOfMemory(message, f"the next attempt uses a micro-batch of {smaller}", retry=True)
    if work == "evaluation":
        verb = "start again" if config.eval.only else f"use `launch resume {paths.id}`"
        return OutOfMemory(message, f"{verb} with {split.evaluation_key}={max(1, split.evaluation // 2)}", retry=False)
    if smaller is None:
        return OutOfMemory(f"{message}, the smallest possible", f"use {LESS}", retry=False)
    return OutOfMemory(message, f"start a new run with train.micro_batch_size={smaller} or auto, or use {LESS}", retry=False)


def with_size(config: RunConfig, micro: int | None) -> RunConfig:
    """Return the config with this micro-batch size; None: no limit."""
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": micro})})
