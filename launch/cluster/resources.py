"""The resources that a run gets, and the resources that this machine has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Mapping

from trainers.contract.cores import threads_asked_for, usable_cores
from trainers.contract.errors import UserError
from trainers.contract.text import either

if TYPE_CHECKING:
    from launch.cluster.config import ClusterConfig
    from trainers.config.schema import ScriptConfig, TaskConfig


USUAL_GPUS = 8      # so many GPUs are asked for on one node if it is not known how many a node has
NVIDIA_SMI_S = 20  # limit of `nvidia-smi`, which loads the driver


@dataclass(frozen=True)
class Resources:
    """What a run gets."""

    device: Literal["cuda", "cpu"]
    ranks: int        # over all nodes
    nodes: int = 1
    threads: int = 1  # CPU threads of one rank
    gpus: int = 0     # GPUs to ask SLURM for, over all nodes

    @property
    def ranks_per_node(self) -> int:
        return self.ranks // self.nodes

    def node_of(self, rank: int) -> int:
        """Return the number of the node, from 0, on which a rank runs."""
        return node_of_rank(rank, self.ranks, self.nodes)


def node_of_rank(rank: int, ranks: int, nodes: int) -> int:
    """Return the number of the node, from 0, on which a rank runs. Each node holds the same number of consecutive ranks."""
    return rank * nodes // ranks


@dataclass(frozen=True)
class Wanted:
    """What a command asks for, over all nodes; None: not given.

    Raises:
        UserError: both GPU ranks and CPU ranks are asked for.
    """

    gpus: int | None = None   # GPU ranks
    procs: int | None = None  # CPU ranks
    nodes: int | None = None
    cpus: int | None = None   # CPU cores of one rank of a search

    def __post_init__(self) -> None:
        if self.gpus is not None and self.procs is not None:
            raise UserError("both `--gpus` and `--procs` are given", "keep one: --gpus for GPU ranks, --procs for CPU ranks")

    def __bool__(self) -> bool:
        return self != Wanted()


def visible_gpus(env: Mapping[str, str], root: Path = Path("/")) -> int:
    """Return the number of GPUs of this machine that CUDA_VISIBLE_DEVICES does not hide."""
    gpus, uuids = _gpus(env, root)
    mask = env.get("CUDA_VISIBLE_DEVICES")
    if mask is None:
        return gpus
    if mask.startswith("MIG-"):  # a GPU may be divided into several MIG devices
        return _listed(mask, lambda entry: entry if entry.startswith("MIG-") else None) if gpus else 0
    if mask.startswith("GPU-"):
        return min(gpus, _listed(mask, lambda entry: entry if any(uuid.startswith(entry) for uuid in uuids or [entry]) else None))
    return _listed(mask, lambda entry: int(entry) if entry.isdecimal() and int(entry) < gpus else None)


def _gpus(env: Mapping[str, str], root: Path) -> tuple[int, list[str]]:
    """Return the number of NVIDIA GPUs of this machine, and their UUIDs; no UUIDs if the driver does not tell all of them.

    The first of these that names a GPU counts: the device files, the driver's files, nvidia-smi. The device files may be
    missing until some program uses a GPU.
    """
    nodes = sum(1 for path in root.glob("dev/nvidia*") if path.name.removeprefix("nvidia").isdigit())
    texts = [file.read_text(errors="replace") for file in root.glob("proc/driver/nvidia/gpus/*/information")]
    if gpus := nodes or len(texts):
        return gpus, _all_found(r"GPU UUID:\s*(GPU-[0-9a-f-]+)$", texts)
    if lines := _listed_by_nvidia_smi(env):
        return len(lines), _all_found(r"\(UUID: (GPU-[0-9a-f-]+)\)", lines)
    return int((root / "dev/dxg").exists()), []  # Linux on Windows shows only whether there is a GPU


def _listed_by_nvidia_smi(env: Mapping[str, str]) -> list[str]:
    """Return the lines of `nvidia-smi -L` that name a GPU, such as "GPU 0: NVIDIA H100 (UUID: GPU-...)"."""
    if not (program := shutil.which("nvidia-smi", path=env.get("PATH", ""))):
        return []
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, errors="replace", timeout=NVIDIA_SMI_S, check=True)
    except (OSError, subprocess.SubprocessError):  # the driver is not loaded, or does not answer
        return []
    return [line for line in done.stdout.splitlines() if re.match(r"GPU \d+:", line)]


def _all_found(pattern: str, texts: Sequence[str]) -> list[str]:
    """Return what the pattern's group matches in each text; an empty list if a text does not match."""
    found = [match[1] for text in texts if (match := re.search(pattern, text, re.MULTILINE))]
    return found if len(found) == len(texts) else []


def _listed(mask: str, device: Callable[[str], str | int | None]) -> int:
    """Return how many devices CUDA takes from CUDA_VISIBLE_DEVICES: all up to the first that does not exist; none if one repeats.

    Args:
        device: returns the device that an entry names, or None if it does not exist.
    """
    found = list(takewhile(lambda item: item is not None, (device(entry.strip()) for entry in mask.split(","))))
    return len(found) if len(set(found)) == len(found) else 0


def resources_of(config: TaskConfig | ScriptConfig, cluster: ClusterConfig, wanted: Wanted, threads: int | None = None,
                 partition: str | None = None) -> Resources:
    """Return what a run of this config gets on this cluster, which may be this machine.

    Args:
        threads: CPU threads of a rank, on this machine; None: the rank's share of the cores.
        partition: on SLURM; None: the cluster's.

    Raises:
        UserError: the cluster or the machine does not have what the command asks for.
    """
    from trainers.config.schema import SearchConfig

    if isinstance(config, SearchConfig):
        return search_resources(cluster, replace(wanted, cpus=wanted.cpus or threads))
    if wanted.cpus is not None:
        raise UserError("`--cpus` is for search tasks, such as `wine`",
                        "use --procs N for N CPU ranks" if cluster.kind == "local" else
                        "set `cpus_per_gpu` or `cpus_per_rank` in the cluster's file")
    if cluster.kind == "slurm":
        return slurm_resources(_with_gpus_per_node(cluster, wanted, partition), wanted)
    return local_resources(wanted, threads=threads)


def local_resources(wanted: Wanted, env: Mapping[str, str] = os.environ, threads: int | None = None) -> Resources:
    """Return what a run gets on this machine.

    If the command asks for neither GPUs nor CPU ranks, the run gets one GPU, or one CPU rank if there is no GPU.

    Args:
        threads: CPU threads of a rank; None: the rank's share of this machine's cores.

    Raises:
        UserError: the command asks for more GPUs than this machine has.
    """
    visible = visible_gpus(env)
    gpus = wanted.gpus if wanted.gpus is not None or wanted.procs is not None or not visible else 1
    if gpus is None:
        procs = wanted.procs or 1
        return Resources("cpu", procs, threads=threads or _threads(procs, env))
    if gpus > visible:
        mask = env.get("CUDA_VISIBLE_DEVICES")
        masked = f" visible (CUDA_VISIBLE_DEVICES is `{mask}`)" if mask is not None else ""
        raise UserError(f"--gpus {gpus} was asked for, but this machine has {visible} NVIDIA GPU(s){masked}",
                        f"use --procs {gpus} for {gpus} CPU rank(s)" + (f", or --gpus {visible}" if visible else ""))
    return Resources("cuda", gpus, threads=threads or _threads(gpus, env))


def _with_gpus_per_node(cluster: ClusterConfig, wanted: Wanted, partition: str | None = None) -> ClusterConfig:
    """The cluster with `gpus_per_node` as sinfo tells it, if the cluster's file does not say it and the run depends on it."""
    depends = wanted.nodes is None and (wanted.gpus or 1) > 1 or wanted.nodes is not None and wanted.gpus is None
    if cluster.gpus_per_node or wanted.procs is not None or cluster.device == "cpu" or not depends:
        return cluster
    from launch.cluster import slurm

    try:
        partitions = slurm.partitions()
    except UserError:  # there is no SLURM here, or it does not answer
        return cluster
    names = str(partition or cluster.sbatch.get("partition") or cluster.partition or "").split(",")
    counts = [count for part in partitions if part.name in names or names == [""] and part.default
              for kind, count in part.gpus.items() if cluster.gpu_type in (None, kind) or not kind]
    return cluster.model_copy(update={"gpus_per_node": max(counts, default=None)})


def slurm_resources(cluster: ClusterConfig, wanted: Wanted) -> Resources:
    """Return what a run gets on a SLURM cluster.

    Without `nodes`, the run gets as few nodes as hold its ranks evenly. With only `nodes`, the run gets these nodes whole.
    Without any number, the run gets one GPU, or one CPU rank on a cluster of CPUs.

    Raises:
        UserError: the run does not fit the cluster as the cluster's file describes it.
    """
    gpus, procs, nodes = wanted.gpus, wanted.procs, wanted.nodes
    option, per_node = ("gpus", cluster.gpus_per_node) if procs is None else ("procs", None)
    if procs is None and not cluster.gpus_per_node and cluster.device == "cpu":
        if gpus is not None:
            raise UserError(f"--gpus {gpus}: cluster `{cluster.name}` has no GPUs (its file says `device: cpu`)",
                            f"use --procs {gpus}, or set `gpus_per_node` in the file")
        option = "procs"
    if option == "procs" and cluster.cpus_per_node:
        per_node = cluster.cpus_per_node // cluster.cpus_per_rank
        if not per_node:
            raise UserError(f"cluster `{cluster.name}` gives a rank {cluster.cpus_per_rank} cores (`cpus_per_rank`), but a node "
                            f"has {cluster.cpus_per_node} (`cpus_per_node`)", "fix the cluster's file")
    count = gpus if option == "gpus" else procs
    field = "gpus_per_node" if option == "gpus" else "cpus_per_node"
    if count is None and nodes is not None:
        if per_node is None:
            raise UserError(f"--nodes {nodes} without --{option} asks for whole nodes, but the file of cluster `{cluster.name}` "
                            "does not say how large a node is", f"add --{option}, or set `{field}` in that file")
        count = nodes * per_node
    count = count or 1
    if option == "gpus" and nodes is None and per_node is None and count > USUAL_GPUS:
        raise UserError(f"--gpus {count}: the file of cluster `{cluster.name}` does not say how many GPUs a node has",
                        "set `gpus_per_node` in that file, or add --nodes N")
    if nodes is None:
        nodes = 1 if per_node is None else _fewest_nodes(count, per_node)
    if count % nodes:
        near = [n for n in (count // nodes * nodes, (count // nodes + 1) * nodes) if n]
        raise UserError(f"--{option} {count} cannot be spread evenly over {nodes} nodes",
                        f"use --{option} {either(near)}")
    if per_node is not None and count // nodes > per_node:
        raise UserError(f"--{option} {count} on --nodes {nodes} is {count // nodes} per node, but a node of cluster "
                        f"`{cluster.name}` has {per_node}", f"use --nodes {-(-count // per_node)} or more")
    if cluster.max_nodes is not None and nodes > cluster.max_nodes:
        size = f", each with {per_node} {'GPUs' if option == 'gpus' else 'ranks'}" if per_node else ""
        raise UserError(f"--{option} {count} needs {nodes} nodes, but cluster `{cluster.name}` has {cluster.max_nodes}{size}",
                        f"use --{option} {cluster.max_nodes * per_node} or fewer" if per_node else None)
    if option == "gpus":
        return Resources(cluster.device, count, nodes, cluster.cpus_per_gpu or 1, count)
    return Resources("cpu", count, nodes, cluster.cpus_per_rank)


def planned_resources(cluster: ClusterConfig, wanted: Wanted) -> Resources:
    """Return the resources for an estimate. Unlike for a run, this machine may have fewer GPUs than the command asks for.

    Raises:
        UserError: the run does not fit the cluster as the cluster's file describes it.
    """
    if cluster.kind == "slurm":
        return slurm_resources(_with_gpus_per_node(cluster, wanted), wanted)
    return local_resources(wanted) if wanted.gpus is None else Resources("cuda", wanted.gpus)


def search_resources(cluster: ClusterConfig, wanted: Wanted, env: Mapping[str, str] = os.environ) -> Resources:
    """Return what a search task gets. A search computes on CPUs, with `cpus` cores for each rank.

    Without `cpus`, a rank on this machine gets its share of the cores. On SLURM, a rank gets its share of the node's cores,
    and by default there is one rank per node.

    Raises:
        UserError: the command asks for GPUs, or the search does not fit the cluster as the cluster's file describes it.
    """
    procs, nodes, cpus = wanted.procs, wanted.nodes, wanted.cpus
    if wanted.gpus is not None:
        raise UserError("`--gpus`: this task computes on CPUs", "use --cpus N to give each rank N cores")
    if cluster.kind != "slurm":
        return Resources("cpu", procs or 1, threads=cpus or _threads(procs or 1, env))
    nodes = nodes or procs or 1
    ranks = procs or nodes
    if ranks % nodes:
        raise UserError(f"--procs {ranks} cannot be spread evenly over {nodes} nodes", f"use --procs {nodes}, one per node")
    if cluster.max_nodes is not None and nodes > cluster.max_nodes:
        raise UserError(f"--nodes {nodes}, but cluster `{cluster.name}` has {cluster.max_nodes}",
                        f"use --nodes {cluster.max_nodes}")
    whole = cluster.cpus_per_node // (ranks // nodes) if cluster.cpus_per_node else 0
    if cluster.cpus_per_node and not whole:
        raise UserError(f"--procs {ranks} on {nodes} node(s) is {ranks // nodes} ranks on a node, but a node of cluster "
                        f"`{cluster.name}` has {cluster.cpus_per_node} cores",
                        f"use --procs {nodes * cluster.cpus_per_node} or fewer, or more --nodes")
    if cpus is not None and whole and cpus > whole:
        raise UserError(f"--cpus {cpus} for each of {ranks // nodes} rank(s) on a node, but a node of cluster `{cluster.name}` "
                        f"has {cluster.cpus_per_node} cores", f"use --cpus {whole}")
    if cpus is None and not whole:
        raise UserError(f"the file of cluster `{cluster.name}` does not say how many cores a node has",
                        "add --cpus N, or set `cpus_per_node` in that file")
    return Resources("cpu", ranks, nodes, cpus or whole)


def _fewest_nodes(count: int, per_node: int) -> int:
    """Return the fewest nodes that hold `count` ranks evenly.

    Let `least` be the smallest number of nodes with room for all ranks. If no number from `least` to 2 x `least` divides
    `count`, return `least`. The caller refuses this number, because the ranks cannot be spread evenly over it.
    """
    least = -(-count // per_node)
    return next((n for n in range(least, 2 * least + 1) if count % n == 0), least)


def _threads(ranks: int, env: Mapping[str, str]) -> int:
    """Return the CPU threads of each of `ranks` ranks: OMP_NUM_THREADS, or the rank's share of this machine's cores."""
    return threads_asked_for(env) or max(1, usable_cores() // ranks)
