"""The memory that a run needs on each GPU under each strategy, and whether it fits. For `launch plan`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster.config import ClusterConfig, size_bytes
from launch.cluster.resources import Resources, visible_gpus
from launch.plan.spec import Spec
from trainers.config.compatibility import OFFLOADS, ZERO, unsupported
from trainers.config.counts import Counts
from trainers.config.memory import HALF, Memory, expected
from trainers.config.schema import RunConfig, SearchConfig
from trainers.contract.errors import UserError
from trainers.contract.files import read_json
from trainers.contract.text import size

# The parts of a rank's memory, by the names that trainers/config/memory.py gives them.
PARTS = ("parameters", "gradients", "optimizer", "buffers", "gathered", "data")
STRATEGIES = ("ddp", "zero1", "zero2", "fsdp", "zero3")  # in order of the data that ranks exchange, the least first
USABLE = 0.9  # the part of a GPU's memory that a run can use; CUDA's context and unused allocator blocks take the rest


@dataclass(frozen=True)
class Room:
    """The memory that one rank's device has."""

    bytes: int | None  # None: unknown
    source: str        # where the number comes from, or how to make it known


@dataclass(frozen=True)
class Row:
    """The memory that one rank needs under one strategy."""

    strategy: str
    refused: str | None           # why this run cannot use the strategy; then the other fields are None
    memory: Memory | None         # with micro-batches of `micro` samples, without activations
    activations: int | None = None  # bytes; None: not measured
    micro: int | None = None      # the largest micro-batch size that fits or may fit, or the smallest size if none fits
    fits: bool | None = None      # None: unknown

    @property
    def total(self) -> int | None:
        """Bytes that the rank needs at most; without activations where they were not measured."""
        return None if self.memory is None else self.memory.total + (self.activations or 0)


def memory_table(spec: Spec, cluster: ClusterConfig, resources: Resources, activations: bool) -> dict[str, Any]:
    """Return what `launch plan` prints, as plain data.

    torch counts the parameters of the models, in a separate process.

    Args:
        activations: also measure the activations, with one step on this machine.

    Raises:
        UserError: the spec is for a script or a search, the batch cannot be divided among the ranks, or the separate
            process failed.
    """
    config = spec.config
    if isinstance(config, SearchConfig):
        raise UserError(f"`{spec.name}` is a search on CPUs: it has no model whose memory could be planned",
                        f"use `launch {spec.name} --dry-run` to see what would run; `launch plan` is for training tasks")
    if not isinstance(config, RunConfig):
        raise UserError(f"`{spec.name}` is a script: its model is unknown until it runs", "use `launch plan` with a task")
    config.check()
    config.batching(resources.ranks)
    counts, measured = probe(spec, cluster, resources, activations)
    return _compare_strategies(spec.name, config, cluster, resources, counts, measured)


def _compare_strategies(name: str, config: RunConfig, cluster: ClusterConfig, resources: Resources, counts: Counts,
                        activations: Mapping[int, int] | None) -> dict[str, Any]:
    """Return the memory under every strategy, from the counts and measurements of `probe`."""
    room = room_of(cluster, resources)
    rows = [row(config, strategy, counts, activations, resources, room) for strategy in STRATEGIES]
    best = next((r for r in rows if r.fits), None)
    return {
        "task": name, "ranks": resources.ranks, "nodes": resources.nodes, "device": resources.device,
        "batch": config.batching(resources.ranks).described(config.train.micro_batch_size == "auto"),
        "batch_size": config.train.batch_size, "batch_tokens": config.train.batch_tokens, "strategy": config.train.strategy,
        "micro_batch_size": config.train.micro_batch_size, "precision": config.train.precision,
        "counts": {**vars(counts)}, "room": room.bytes, "room_said": room.source,
        "activations": activations,
        "rows": [{"strategy": r.strategy, "refused": r.refused, "memory": r.memory and r.memory.as_dict(),
                  "activations": r.activations, "micro_batch_size": r.micro, "total": r.total, "fits": r.fits}
                 for r in rows],
        "best": best and {"strategy": best.strategy, "micro_batch_size": best.micro},
    }


def row(config: RunConfig, strategy: str, counts: Counts, activations: Mapping[int, int] | None, resources: Resources,
        room: Room) -> Row:
    """Return what one strategy needs, with the largest micro-batch that fits.

    A micro-batch size that the spec sets is not changed.
    """
    changes: dict[str, Any] = {"strategy": strategy}
    if config.train.offload not in OFFLOADS[strategy]:
        changes["offload"] = "none"
    if strategy not in ZERO:
        changes["deepspeed"] = {}
    split = config.batching(resources.ranks)
    sizes = split.sizes() if split.most is None else [split.micro]
    for error in unsupported(_with(config, **changes), resources.device):
        return Row(strategy, error.message, None)
    for micro in sizes:
        candidate = _with(config, **changes, micro_batch_size=micro)
        memory = expected(candidate, counts, resources.ranks, resources.device)
        kept = _activations(candidate, counts, activations, micro)
        fits = None if room.bytes is None else memory.total + (kept or 0) <= USABLE * room.bytes
        if fits is None or fits or micro == sizes[-1]:
            return Row(strategy, None, memory, kept, micro, fits)
    raise AssertionError("unreachable: the last size always returns")


def _activations(config: RunConfig, counts: Counts, measured: Mapping[int, int] | None, micro: int) -> int | None:
    """Estimate the bytes of activations of a micro-batch, from a line through the measured sizes.

    Part of the measured memory does not grow with the micro-batch. In half precision this part is mostly the copies of
    the parameters, which `expected` has already counted, so they are subtracted.
    """
    if measured is None:
        return None
    (small, low), (large, high) = min(measured.items()), max(measured.items())
    slope = (high - low) / (large - small) if large > small else high / large
    fixed = max(0.0, high - slope * large)
    if config.train.precision in ("bf16", "fp16"):
        fixed = max(0.0, fixed - HALF * counts.parameters)
    return round(fixed + slope * micro)


def _with(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def room_of(cluster: ClusterConfig, resources: Resources, meminfo: Path = Path("/proc/meminfo")) -> Room:
    """Return the memory that one rank can use, from the cluster's file or from this machine."""
    ranks_per_node = resources.ranks_per_node
    if resources.device == "cuda":
        if cluster.gpu_memory:
            return Room(size_bytes(cluster.gpu_memory), f"from `gpu_memory` of cluster `{cluster.name}`")
        if cluster.kind == "local" and (smallest := _smallest_gpu_bytes()):
            return Room(smallest, "from nvidia-smi")
        advice = (f"set `gpu_memory` in the file of cluster `{cluster.name}`" if cluster.kind == "slurm"
                  else "name a cluster with --cluster NAME")
        return Room(None, f"unknown: {advice}")
    if cluster.kind == "local":
        total = next(int(line.split()[1]) for line in meminfo.read_text().splitlines() if line.startswith("MemTotal")) * 1024
        return Room(total // ranks_per_node, f"this machine's {size(total)} shared by {ranks_per_node} rank(s)")
    if cluster.mem_per_cpu:
        return Room(size_bytes(cluster.mem_per_cpu) * cluster.cpus_per_rank,
                    f"from `mem_per_cpu` x `cpus_per_rank` of cluster `{cluster.name}`")
    return Room(None, f"unknown: set `mem_per_cpu` in the file of cluster `{cluster.name}`")


def _smallest_gpu_bytes() -> int | None:
    """Return the memory of this machine's smallest GPU; None if nvidia-smi gives none."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"], text=True,
                              capture_output=True, timeout=20, check=True)
        return min(int(line) for line in done.stdout.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def probe(spec: Spec, cluster: ClusterConfig, resources: Resources, activations: bool) -> tuple[Counts, dict[int, int] | None]:
    """Return the sizes of the models, and bytes of activations by micro-batch size (None if not asked for).

    A separate process finds both, because `launch` imports no torch. Counting needs no memory. Measuring takes one step on
    this machine, on a GPU if there is one.

    Raises:
        UserError: the model, the data or the settings are wrong; or the process failed, and its output is on standard error.
    """
    env = {**os.environ, **({"LAUNCH_DATA": cluster.data} if cluster.data and Path(cluster.data).exists() else {})}
    on_gpu = activations and resources.device == "cuda" and visible_gpus(os.environ) > 0
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        env.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        file, answer = Path(folder, "run.yaml"), Path(folder, "result.json")
        file.write_text(spec.text, encoding="utf-8")
        subprocess.run([sys.executable, "-P", "-m", "trainers.probe", str(file), str(resources.ranks), str(answer),
                        *(["--activations"] if activations else [])],
                       env={**env, "ACCELERATE_USE_CPU": str(not on_gpu).lower()}, stdin=subprocess.DEVNULL,
                       stdout=2, check=False)  # standard error: --json owns standard output
        result = read_json(answer) if answer.exists() else None
    if result is None:
        work = "one step on this machine" if activations else "counting the model's parameters"
        raise UserError(f"the probe failed ({work})", "see its output above")
    if "error" in result:
        raise UserError(**result["error"])
    measured = result["activations"]
    return Counts(**result["counts"]), measured and {int(micro): count for micro, count in measured.items()}


# Text for a person


def show(table: Mapping[str, Any]) -> str:
    """Return the result of `memory_table` as text for a person."""
    counts, probed = table["counts"], table["activations"] is not None
    room = size(table["room"]) + ", " if table["room"] is not None else ""
    device = "GPU" if table["device"] == "cuda" else "rank"
    blocks = f", {counts['block']:,} in the largest block" if counts["block"] else ""
    lines = [f"model      {counts['parameters']:,} parameters{blocks}",
             f"ranks      {table['ranks']} on {table['device']}, {table['nodes']} node(s)",
             f"{device:<10} {room}{table['room_said']}",
             f"batch      {table['batch']}"]
    columns = [*PARTS, "host"] + (["activations"] if probed else [])
    grid = [["", *columns, "peak", "micro-batch"]]
    for row in table["rows"]:
        name = row["strategy"] + (" *" if row["strategy"] == table["strategy"] else "")
        if row["refused"]:
            grid.append([name, f"refused: {row['refused']}"])
            continue
        parts = {**row["memory"], "activations": row["activations"]}
        verdict = {True: f"{row['micro_batch_size']} fits", False: f"{row['micro_batch_size']} does not fit",
                   None: str(row["micro_batch_size"])}[row["fits"]]
        grid.append([name, *(size(parts[part]) if parts[part] else "-" for part in columns), size(row["total"]), verdict])
    widths = [max(len(cells[column]) for cells in grid if len(cells) > 2) for column in range(len(grid[0]))]
    lines += ["", *(("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)) if len(cells) > 2 else
                     f"{cells[0]:<{widths[0]}}  {cells[1]}").rstrip() for cells in grid), ""]
    lines.append("* the spec's strategy; sizes are for one rank"
                 + ("" if probed else ", without activations and data (--probe measures them)"))
    if best := table["best"]:
        lines.append(f"--strategy {best['strategy']} train.micro_batch_size={best['micro_batch_size']} would fit"
                     + ("" if probed else ", not counting activations and data"))
    elif table["room"] is not None:
        lines.append("nothing fits: use more ranks, train.checkpoint_activations=true or train.offload=parameters")
    return "\n".join(lines)
