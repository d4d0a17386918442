"""What a run is given to run on, and what this machine has."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Mapping

from trainers.contract.errors import UserError
from trainers.contract.text import either

if TYPE_CHECKING:
    from launch.cluster.config import ClusterConfig
    from trainers.config.schema import ScriptConfig, TaskConfig


@dataclass(frozen=True)
class Resources:
    """`ranks` in all, over `nodes` nodes; `threads`: CPU threads of one rank; `gpus`: asked of SLURM, in all."""

    device: Literal["cuda", "cpu"]
    ranks: int
    nodes: int = 1
    threads: int = 1
    gpus: int = 0

    @property
    def ranks_per_node(self) -> int:
        return self.ranks // self.nodes

    def node_of(self, rank: int) -> int:
        """Which node, from 0, a rank is on."""
        return node_of_rank(rank, self.ranks, self.nodes)


def node_of_rank(rank: int, ranks: int, nodes: int) -> int:
    """Which of `nodes` nodes, from 0, a rank is on: each node holds equally many consecutive ranks."""
    return rank * nodes // ranks


@dataclass(frozen=True)
class Wanted:
    """What a command asks for, over all nodes; None: the command does not say.

    Raises:
        UserError: both GPU ranks and CPU ranks are asked for.
    """

    gpus: int | None = None   # GPU ranks
    procs: int | None = None  # CPU ranks
    nodes: int | None = None
    cpus: int | None = None   # cores of one rank of a search

    def __post_init__(self) -> None:
        if self.gpus is not None and self.procs is not None:
            raise UserError("both `--gpus` and `--procs` are given", "GPU ranks or CPU ranks: keep one")

    def __bool__(self) -> bool:
        return self != Wanted()


def visible_gpus(env: Mapping[str, str], dev: Path = Path("/dev")) -> int:
    """GPUs of this machine that the mask in CUDA_VISIBLE_DEVICES lets through."""
    there = sum(1 for path in dev.glob("nvidia*") if path.name.removeprefix("nvidia").isdigit())
    there = there or int((dev / "dxg").exists())  # Windows' Linux shows no more than that there is one
    mask = env.get("CUDA_VISIBLE_DEVICES")
    if mask is None:
        return there
    listed = 0
    for word in mask.split(","):
        word = word.strip()
        if not word or word.startswith("-"):  # CUDA stops at the first entry that is none
            break
        listed += 1
    return min(there, listed) if not mask.startswith("MIG") else listed * bool(there)


def resources_of(config: TaskConfig | ScriptConfig, cluster: ClusterConfig, wanted: Wanted, threads: int | None = None
                 ) -> Resources:
    """What a run of this config gets on this cluster, or on this machine.

    Args:
        threads: on this machine, CPU threads of a rank; None: a rank's share of the cores.

    Raises:
        UserError: the cluster or machine does not have what is asked for.
    """
    from trainers.config.schema import SearchConfig

    if isinstance(config, SearchConfig):
        return search_resources(cluster, replace(wanted, cpus=wanted.cpus or threads))
    if wanted.cpus is not None:
        raise UserError("`--cpus` is for tasks that run themselves, such as `wine`",
                        "--procs N asks for N CPU ranks" if cluster.kind == "local" else "a cluster's file has cpus_per_gpu and "
                        "cpus_per_rank")
    if cluster.kind == "slurm":
        return slurm_resources(cluster, wanted)
    return local_resources(wanted, threads=threads)


def local_resources(wanted: Wanted, env: Mapping[str, str] = os.environ, threads: int | None = None) -> Resources:
    """Resources on this machine: without a number of ranks, one GPU if there is one, else one CPU rank. `threads`
    of a rank are by default its share of this machine's cores.

    Raises:
        UserError: more GPUs were asked for than there are.
    """
    there = visible_gpus(env)
    gpus = wanted.gpus if wanted.gpus is not None or wanted.procs is not None or not there else 1
    if gpus is None:
        procs = wanted.procs or 1
        return Resources("cpu", procs, threads=threads or _threads(procs, env))
    if gpus > there:
        mask = env.get("CUDA_VISIBLE_DEVICES")
        masked = f" (CUDA_VISIBLE_DEVICES is `{mask}`)" if mask is not None else ""
        raise UserError(f"--gpus {gpus} was asked for; this machine has {there} NVIDIA GPU(s) to give{masked}",
                        f"use --procs {gpus} for as many CPU ranks" + (f", or --gpus {there}" if there else ""))
    return Resources("cuda", gpus, threads=threads or _threads(gpus, env))


def slurm_resources(cluster: ClusterConfig, wanted: Wanted) -> Resources:
    """Resources of a cluster: as few nodes as hold the ranks evenly, unless `nodes` says how many; `nodes` alone
    takes whole nodes. One GPU, or on a cluster of CPUs one rank, if nothing is given.

    Raises:
        UserError: it does not fit the cluster as its file describes it.
    """
    gpus, procs, nodes = wanted.gpus, wanted.procs, wanted.nodes
    what, a_node = ("gpus", cluster.gpus_per_node) if procs is None else ("procs", None)
    if procs is None and gpus is None and not cluster.gpus_per_node and cluster.device == "cpu":
        what = "procs"
    if what == "procs" and cluster.cpus_per_node:
        a_node = cluster.cpus_per_node // cluster.cpus_per_rank
        if not a_node:
            raise UserError(f"cluster `{cluster.name}` gives a rank {cluster.cpus_per_rank} cores (`cpus_per_rank`), and a node "
                            f"has {cluster.cpus_per_node} (`cpus_per_node`)", "mend its file")
    count = gpus if what == "gpus" else procs
    field = "gpus_per_node" if what == "gpus" else "cpus_per_node"
    if count is None and nodes is not None:
        if a_node is None:
            raise UserError(f"--nodes {nodes} alone takes whole nodes, and cluster `{cluster.name}` does not say how "
                            f"large they are", f"give --{what} too, or `{field}` in its file")
        count = nodes * a_node
    count = count or 1
    if nodes is None:
        nodes = 1 if a_node is None else _fewest(count, a_node)
    if count % nodes:
        near = [n for n in (count // nodes * nodes, (count // nodes + 1) * nodes) if n]
        raise UserError(f"--{what} {count} cannot be spread evenly over {nodes} nodes",
                        f"use --{what} {either(near)}")
    if a_node is not None and count // nodes > a_node:
        raise UserError(f"--{what} {count} on --nodes {nodes} is {count // nodes} a node; a node of cluster "
                        f"`{cluster.name}` has {a_node}", f"use --nodes {-(-count // a_node)} or more")
    if cluster.max_nodes is not None and nodes > cluster.max_nodes:
        raise UserError(f"--{what} {count} needs {nodes} nodes; cluster `{cluster.name}` has {cluster.max_nodes}"
                        + (f" of {a_node} {'GPUs' if what == 'gpus' else 'ranks'}" if a_node else ""),
                        f"use --{what} {cluster.max_nodes * a_node} or fewer" if a_node else None)
    if what == "gpus":
        return Resources(cluster.device, count, nodes, cluster.cpus_per_gpu or 1, count)
    return Resources("cpu", count, nodes, cluster.cpus_per_rank)


def planned_resources(cluster: ClusterConfig, wanted: Wanted) -> Resources:
    """Resources to reckon with: of this machine also more GPUs than it has.

    Raises:
        UserError: it does not fit the cluster as its file describes it.
    """
    if cluster.kind == "slurm":
        return slurm_resources(cluster, wanted)
    return local_resources(wanted) if wanted.gpus is None else Resources("cuda", wanted.gpus)


def search_resources(cluster: ClusterConfig, wanted: Wanted, env: Mapping[str, str] = os.environ) -> Resources:
    """Resources of a task that runs itself, on CPUs: `cpus` cores a rank, here by default its share of this machine's, on
    SLURM one rank a node with all cores of it.

    Raises:
        UserError: GPUs were asked for, or more nodes than there are.
    """
    procs, nodes, cpus = wanted.procs, wanted.nodes, wanted.cpus
    if wanted.gpus is not None:
        raise UserError("`--gpus`: this task computes on CPUs", "--cpus N gives it cores")
    if cluster.kind != "slurm":
        return Resources("cpu", procs or 1, threads=cpus or _threads(procs or 1, env))
    nodes = nodes or procs or 1
    ranks = procs or nodes
    if ranks % nodes:
        raise UserError(f"--procs {ranks} cannot be spread evenly over {nodes} nodes", f"use --procs {nodes}, one a node")
    if cluster.max_nodes is not None and nodes > cluster.max_nodes:
        raise UserError(f"--nodes {nodes}: cluster `{cluster.name}` has {cluster.max_nodes}", f"use --nodes {cluster.max_nodes}")
    whole = cluster.cpus_per_node // (ranks // nodes) if cluster.cpus_per_node else 0
    if cpus is not None and whole and cpus > whole:
        raise UserError(f"--cpus {cpus} for each of {ranks // nodes} rank(s) of a node: a node of cluster `{cluster.name}` has "
                        f"{cluster.cpus_per_node} cores", f"use --cpus {whole}" if whole else "use fewer --procs")
    if cpus is None and not whole:
        raise UserError(f"cluster `{cluster.name}` does not say how many cores a node has",
                        "give --cpus N, or `cpus_per_node` in its file")
    return Resources("cpu", ranks, nodes, cpus or whole)


def _fewest(count: int, a_node: int) -> int:
    """The fewest nodes that hold `count` evenly, unless that scatters them: then too few, which is refused."""
    least = -(-count // a_node)
    return next((n for n in range(least, 2 * least + 1) if count % n == 0), least)


def _threads(ranks: int, env: Mapping[str, str]) -> int:
    asked = env.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else max(1, len(os.sched_getaffinity(0)) // ranks)
