"""What memory a run takes of a GPU under each strategy, and what of it would fit. For `launch plan`."""

from __future__ import annotations

import json
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
from launch.plan.plan import PARTS
from launch.plan.spec import Spec
from trainers.config.compatibility import OFFLOADS, ZERO, unsupported
from trainers.config.counts import Counts
from trainers.config.memory import HALF, Memory, expected
from trainers.config.schema import RunConfig, SearchConfig
from trainers.contract.errors import UserError
from trainers.contract.text import size

STRATEGIES = ("ddp", "zero1", "zero2", "fsdp", "zero3")  # those that send less between ranks first
USABLE = 0.9  # of a GPU: the rest is CUDA's own context and what its allocator cannot put to use


@dataclass(frozen=True)
class Room:
    """What a rank's device holds, in bytes; None: that is not known."""

    bytes: int | None
    said: str


@dataclass(frozen=True)
class Row:
    """What a strategy takes."""

    strategy: str
    refused: str | None           # why this run cannot have it
    memory: Memory | None         # at `micro`, without activations
    activations: int | None = None
    micro: int | None = None      # the micro-batch that this is of: the largest that fits, else the one asked for
    fits: bool | None = None      # None: not known

    @property
    def total(self) -> int:
        return self.memory.total + (self.activations or 0)


def memory_table(spec: Spec, cluster: ClusterConfig, resources: Resources, activations: bool) -> dict[str, Any]:
    """What `launch plan` says, as plain data. The models are counted by torch, in a process of its own.

    Args:
        activations: measure them too, by a step on this machine.

    Raises:
        UserError: the spec is a script's or a search's, the batch does not divide over the ranks, or the process failed.
    """
    config = spec.config
    if isinstance(config, SearchConfig):
        raise UserError(f"`{spec.name}` is a search on CPUs: there is no model whose memory could be planned",
                        f"`launch {spec.name} --dry-run` says what would run; `launch plan` is for tasks that train by steps")
    if not isinstance(config, RunConfig):
        raise UserError(f"`{spec.name}` is a script, whose model nobody knows before it runs", "`launch plan` is for tasks")
    config.check()
    config.train.split(resources.ranks)
    return lay_out(spec, cluster, resources, *probe(spec, cluster, resources, activations))


def lay_out(spec: Spec, cluster: ClusterConfig, resources: Resources, counts: Counts, activations: Mapping[int, int] | None
            ) -> dict[str, Any]:
    """The strategies side by side, from what was counted and measured: see `probe`."""
    config = spec.config
    room = room_of(cluster, resources)
    rows = [row(config, strategy, counts, activations, resources, room) for strategy in STRATEGIES]
    best = next((r for r in rows if r.fits), None)
    return {
        "task": spec.name, "ranks": resources.ranks, "nodes": resources.nodes, "device": resources.device,
        "batch_size": config.train.batch_size, "strategy": config.train.strategy,
        "micro_batch_size": config.train.micro_batch_size, "precision": config.train.precision,
        "counts": {**vars(counts)}, "room": room.bytes, "room_said": room.said,
        "activations": activations,
        "rows": [{"strategy": r.strategy, "refused": r.refused, "memory": r.memory and r.memory.as_dict(),
                  "activations": r.activations, "micro_batch_size": r.micro, "total": r.memory and r.total, "fits": r.fits}
                 for r in rows],
        "best": best and {"strategy": best.strategy, "micro_batch_size": best.micro},
    }


def row(config: RunConfig, strategy: str, counts: Counts, activations: Mapping[int, int] | None, resources: Resources,
        room: Room) -> Row:
    """The strategy with the largest micro-batch that fits, of those that a spec's own leaves open."""
    changes: dict[str, Any] = {"strategy": strategy}
    if config.train.offload not in OFFLOADS[strategy]:
        changes["offload"] = "none"
    if strategy not in ZERO:
        changes["deepspeed"] = {}
    given = config.train.micro_batch_size
    share = config.train.batch_size // resources.ranks
    sizes = [given] if isinstance(given, int) else [size for size in range(share, 0, -1) if share % size == 0]
    for error in unsupported(_with(config, **changes), resources.device):
        return Row(strategy, error.message, None)
    for micro in sizes:
        candidate = _with(config, **changes, micro_batch_size=micro)
        memory = expected(candidate, counts, resources.ranks, resources.device)
        kept = _activations(candidate, counts, activations, micro)
        fits = None if room.bytes is None else memory.total + (kept or 0) <= USABLE * room.bytes
        if fits is None or fits or micro == sizes[-1]:
            return Row(strategy, None, memory, kept, micro, fits)
    raise AssertionError("a share has divisors")


def _activations(config: RunConfig, counts: Counts, measured: Mapping[int, int] | None, micro: int) -> int | None:
    """Of a micro-batch, by the line through those that were measured. What of it does not grow with the size is, in half
    precision, mostly the copies of parameters, which the closed form has counted."""
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
    """What one rank can have, by the cluster's file, else as this machine is."""
    here = resources.ranks_per_node
    if resources.device == "cuda":
        if cluster.gpu_memory:
            return Room(size_bytes(cluster.gpu_memory), f"as cluster `{cluster.name}` says (`gpu_memory`)")
        if cluster.kind == "local" and (found := _smi()):
            return Room(found, "as nvidia-smi says")
        where = f"`gpu_memory` in the file of cluster `{cluster.name}`" if cluster.kind == "slurm" else "--cluster NAME"
        return Room(None, f"not known: {where} would say it")
    if cluster.kind == "local":
        total = next(int(line.split()[1]) for line in meminfo.read_text().splitlines() if line.startswith("MemTotal")) * 1024
        return Room(total // here, f"this machine's {size(total)} over {here} rank(s)")
    if cluster.mem_per_cpu:
        return Room(size_bytes(cluster.mem_per_cpu) * cluster.cpus_per_rank,
                    f"as cluster `{cluster.name}` says (`mem_per_cpu` x `cpus_per_rank`)")
    return Room(None, f"not known: `mem_per_cpu` in the file of cluster `{cluster.name}` would say it")


def _smi() -> int | None:
    """Bytes of this machine's smallest GPU."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"], text=True,
                              capture_output=True, timeout=20, check=True)
        return min(int(line) for line in done.stdout.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def probe(spec: Spec, cluster: ClusterConfig, resources: Resources, activations: bool) -> tuple[Counts, dict[int, int] | None]:
    """(how large the models are, bytes of activations by micro-batch size where they are asked for)

    Both are found in a process of its own, since `launch` imports no torch. Counting needs no memory; measuring takes one
    step on this machine, on a GPU if there is one.

    Raises:
        UserError: the process failed; what it said is on standard error.
    """
    env = {**os.environ, **({"LAUNCH_DATA": cluster.data} if cluster.data and Path(cluster.data).exists() else {})}
    on_gpu = activations and resources.device == "cuda" and visible_gpus(os.environ) > 0
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        env.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        file = Path(folder, "run.yaml")
        file.write_text(spec.text, encoding="utf-8")
        done = subprocess.run([sys.executable, "-P", "-m", "trainers.probe", str(file), str(resources.ranks),
                               *(["--activations"] if activations else [])],
                              env={**env, "ACCELERATE_USE_CPU": str(not on_gpu).lower()}, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        what = "made the model and took one step, on this machine" if activations else "made the model, to count its parameters"
        raise UserError(f"the probe failed: it {what}", "what it said is above")
    found = json.loads(done.stdout.splitlines()[-1])
    measured = found["activations"]
    return Counts(**found["counts"]), measured and {int(micro): count for micro, count in measured.items()}


# For a person


def show(found: Mapping[str, Any]) -> str:
    counts, probed = found["counts"], found["activations"] is not None
    room = size(found["room"]) + ", " if found["room"] is not None else ""
    device = "GPU" if found["device"] == "cuda" else "rank"
    lines = [f"ranks      {found['ranks']} on {found['device']}, {found['nodes']} node(s)",
             f"{device:<10} {room}{found['room_said']}"]
    blocks = f", the largest block {counts['block']:,}" if counts["block"] else ""
    lines.insert(0, f"model      {counts['parameters']:,} parameters{blocks}")
    lines.append(f"batch      {found['batch_size']} = {found['ranks']} rank(s) x "
                 f"{found['batch_size'] // found['ranks']} samples; micro-batch {found['micro_batch_size'] or 'not given'}")
    wanted = [*PARTS, "host"] + (["activations"] if probed else [])
    table = [["", *wanted, "most", "micro-batch"]]
    for row in found["rows"]:
        name = row["strategy"] + (" *" if row["strategy"] == found["strategy"] else "")
        if row["refused"]:
            table.append([name, f"refused: {row['refused']}"])
            continue
        parts = {**row["memory"], "activations": row["activations"]}
        verdict = {True: f"{row['micro_batch_size']} fits", False: f"{row['micro_batch_size']} does not fit",
                   None: str(row["micro_batch_size"])}[row["fits"]]
        table.append([name, *(size(parts[part]) if parts[part] else "-" for part in wanted), size(row["total"]), verdict])
    widths = [max(len(cells[place]) for cells in table if len(cells) > 2) for place in range(len(table[0]))]
    lines += ["", *(("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)) if len(cells) > 2 else
                     f"{cells[0]:<{widths[0]}}  {cells[1]}").rstrip() for cells in table), ""]
    lines.append("* the spec's; bytes of one rank" + ("" if probed else ", without activations, which --probe measures"))
    if best := found["best"]:
        lines.append(f"--strategy {best['strategy']} train.micro_batch_size={best['micro_batch_size']} would fit"
                     + ("" if probed else ", activations apart"))
    elif found["room"] is not None:
        lines.append("nothing fits: more ranks, train.checkpoint_activations=true or train.offload=parameters need less")
    return "\n".join(lines)
