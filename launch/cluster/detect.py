"""List the cluster files, and draft a cluster file for the cluster that this host belongs to."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.cluster import slurm
from launch.cluster.config import clusters, folders, read_cluster
from launch.cluster.times import seconds, slurm_time
from trainers.config import yaml12
from trainers.contract.errors import UserError

DAY_S = 86400
MAX_NAMES = 12  # that a comment lists

Row = defaultdict[str, str]  # "" for keys that this release of SLURM does not print
Line = tuple[str, Any, str]  # (key, value, comment); key: "# ..." for the user to fill in, "" for a line with only a comment


@dataclass(frozen=True)
class Node:
    """A node as scontrol describes it."""

    cpus: int
    memory_mib: int
    gpus: Mapping[str, int]  # by type
    features: list[str]
    partitions: list[str]


def listing() -> list[dict[str, Any]]:
    """Return {"name", "kind", "description", "file", "own", "problem"} for each cluster.

    `own` is False for built-in clusters. `problem` says what is wrong with the file, or is None. `kind` is None if the file
    is wrong.
    """
    rows: list[dict[str, Any]] = []
    for name, path in clusters().items():
        row = {"name": name, "kind": None, "description": "", "file": str(path), "own": path.parent == folders()[0],
               "problem": None}
        try:
            cluster = read_cluster(path)
            row |= {"kind": cluster.kind, "description": cluster.description}
        except UserError as error:
            row["problem"] = error.message
        rows.append(row)
    return rows


def draft(name: str = "detected") -> str:
    """Return a cluster file for the cluster of this host, as scontrol describes the cluster.

    A comment next to each value says where the value comes from.

    Raises:
        UserError: this host has no SLURM, SLURM does not answer, or SLURM shows no partition for users.
    """
    config = Row(str, re.findall(r"^(\S+)\s+= (.*?)\s*$", slurm.call("scontrol", "show", "config"), re.MULTILINE))
    partitions = [row for row in _rows("partition") if row["RootOnly"] != "YES"]
    partitions = [row for row in partitions if row["State"] == "UP"] or partitions
    if not partitions:
        raise UserError("SLURM shows you no partition",
                        "`scontrol show partition --all` shows hidden partitions: ask your site about them")
    nodes = [_node(row) for row in _rows("node")]
    partition = max(partitions, key=lambda row: _preference(row, nodes))
    own_nodes = [node for node in nodes if partition["PartitionName"] in node.partitions]
    lines = [
        ("description", f"{config['ClusterName']}, partition {partition['PartitionName']}", ""),
        ("kind", "slurm", ""),
        *_place(partition, partitions, config), *_nodes(partition, own_nodes, config), *_end(partition, config),
        ("# internet", False, "if nodes cannot download"),
        ("# runs", "/scratch/$USER/runs", "a folder that all nodes and this host share, and that you can write"),
        ("# data", "/scratch/data", "a folder for downloaded data, also shared"),
        ("", None, "For NCCL's variables, which runs on several nodes may need, see dgx-infiniband.yaml"),
    ]
    return "\n".join([
        f"# Drafted from what scontrol prints about cluster {config['ClusterName']} (SLURM {config['SLURM_VERSION']}).",
        f"# Check this file, save it as {folders()[0]}/{name}.yaml, and try it: `--slurm --cluster {name} --dry-run`.",
        *map(_line, lines)]) + "\n"


def _place(partition: Row, partitions: Sequence[Row], config: Row) -> list[Line]:
    """Return the lines that say where jobs go, on which account, and for how long."""
    reason = ("the default" if partition["Default"] == "YES" else
              "the default has no GPUs" if any(row["Default"] == "YES" for row in partitions) else "no default is up")
    others = [f"{row['PartitionName']} (up to {row['MaxTime']})" for row in partitions if row is not partition]
    lines: list[Line] = [
        ("partition", partition["PartitionName"], reason + (f"; others: {_listed(others)}" if others else ""))]
    for key, rules in (("account", ("AllowAccounts", "DenyAccounts")), ("qos", ("AllowQos", "DenyQos"))):
        notes = [f"{rule}={partition[rule]}" for rule in rules if partition.get(rule, "ALL") != "ALL"]
        if key == "account" and "associations" in config["AccountingStorageEnforce"]:
            notes.append("`sacctmgr show associations user=$USER` lists yours")
        if notes:
            lines.append((f"# {key}", "NAME", "; ".join(notes)))
    try:
        limit_s = seconds(partition["MaxTime"])
    except ValueError:  # UNLIMITED
        limit_s = None
    lines.append(("time", slurm_time(min(limit_s or DAY_S, DAY_S)),
                  f"at most {partition['MaxTime']} here; a longer run continues in its next job"))
    return lines


def _nodes(partition: Row, nodes: Sequence[Node], config: Row) -> list[Line]:
    """Return the lines that say what a node has, and which share of it goes with each GPU."""
    lines: list[Line] = []
    kinds: Counter[str] = Counter()
    for node in nodes:
        kinds.update(node.gpus)
    gpus = 0
    if kinds:
        (kind, count), *others = kinds.most_common()
        sizes = Counter(node.gpus[kind] for node in nodes if kind in node.gpus).most_common()
        gpus = sizes[0][0]
        nodes = [node for node in nodes if node.gpus.get(kind) == gpus]
        if kind:
            rest = "".join(f", {other_count} {other or 'without a type'}" for other, other_count in others)
            lines.append(("gpu_type", kind, f"GPUs here: {count} {kind}{rest}"))
        lines += [("gpu_request", "gpus-per-node" if "cons_tres" in config["SelectType"] else "gres", config["SelectType"]),
                  ("gpus_per_node", gpus, ", ".join(f"{number} nodes have {size}" for size, number in sizes))]
    else:
        lines += [("device", "cpu", "no node has GPUs"), ("gpu_request", "none", "")]
    features = Counter(feature for node in nodes for feature in node.features)
    if features:
        lines.append(("# constraint", "FEATURE", f"nodes have {_listed([name for name, _ in features.most_common()])}"))
    if partition["OverSubscribe"] == "EXCLUSIVE" or "linear" in config["SelectType"]:
        lines.append(("", None, "Jobs get whole nodes here: ask for all GPUs of each node"))
    if not nodes:
        return lines
    cpus, most = min(node.cpus for node in nodes), max(node.cpus for node in nodes)
    memory = min([*(node.memory_mib for node in nodes), *_allowed(partition, cpus), *_allowed(config, cpus)])
    limited = "MEMORY" in config["SelectTypeParameters"].upper()  # otherwise SLURM does not allocate memory to jobs
    if gpus and cpus >= gpus:
        lines.append(("cpus_per_gpu", cpus // gpus, f"{cpus} cores / {gpus}"))
    if gpus and limited and memory >= gpus:
        lines.append(("mem_per_gpu", _size(memory // gpus), f"{memory} MiB / {gpus}"))
    lines.append(("cpus_per_node", cpus, f"of the smallest node; other nodes have up to {most}" if most > cpus else ""))
    if limited and memory >= cpus:
        lines.append(("mem_per_cpu", _size(memory // cpus), f"{memory} MiB / {cpus}; for ranks without GPUs"))
    limit = partition["MaxNodes"]
    lines.append(("max_nodes", min(len(nodes), int(limit)) if limit.isdigit() else len(nodes),
                  f"of {len(nodes)}, MaxNodes={limit}" if limit.isdigit() else ""))
    return lines


def _end(partition: Row, config: Row) -> list[Line]:
    """Return the lines that say how jobs end, and whether SLURM requeues them."""
    requeue, wait, grace = config["JobRequeue"], config["KillWait"], partition["GraceTime"]
    preempted = "OFF" not in (config["PreemptMode"], partition["PreemptMode"])
    return [
        ("requeue", True, f"JobRequeue={requeue}" + (
            ": SLURM requeues only jobs that ask for it, and launch's jobs do" if requeue == "0" else "")),
        ("", None, f"Time for a checkpoint when a job is preempted or requeued: KillWait, {wait}" + (
            f", after GraceTime, {grace} sec" if grace.strip("0") else "") + (
            f" (PreemptMode={partition['PreemptMode']})" if preempted else " (no job here preempts another job)")),
    ]


def _preference(row: Row, nodes: Sequence[Node]) -> tuple[bool, bool, int]:
    """Sort key: the best partition has the largest key.

    A partition with GPUs is better than one without. Then the default partition is best, then the one with the most GPUs.
    """
    gpus = sum(sum(node.gpus.values()) for node in nodes if row["PartitionName"] in node.partitions)
    return gpus > 0, row["Default"] == "YES", gpus


def _rows(what: str) -> list[Row]:
    """Return the rows of `scontrol show WHAT -o`, which prints KEY=VALUE pairs on one line for each object.

    If a key comes twice, the first counts. Texts that people have written come last, because they may contain KEY=VALUE.
    """
    lines = slurm.call("scontrol", "show", what, "-o").splitlines()
    return [Row(str, reversed(re.findall(r"(\w+)=(\S*)", line))) for line in lines if line.startswith(f"{what.title()}Name=")]


def _node(row: Row) -> Node:
    """Return the node that a row of scontrol describes."""
    def names(key: str) -> list[str]:
        return [name for name in row[key].split(",") if name not in ("", "(null)")]

    # CPUEfctv and MemSpecLimit tell what is left after the share that the system keeps for itself.
    return Node(int(row.get("CPUEfctv", row["CPUTot"])), int(row["RealMemory"]) - int(row.get("MemSpecLimit", 0)),
                slurm.gpus(row["Gres"]), names("ActiveFeatures"), names("Partitions"))


def _allowed(row: Row, cpus: int) -> list[int]:
    """Return the limits on a job's memory on one node of `cpus` cores, in MiB; empty if there are none."""
    limits = (("MaxMemPerNode", 1), ("MaxMemPerCPU", cpus))
    return [int(row[key]) * factor for key, factor in limits if row.get(key, "").isdigit()]


def _size(mib: int) -> str:
    """Return a size as SLURM writes it."""
    return f"{mib // 1024}G" if mib >= 16 * 1024 else f"{mib}M"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")


def _line(line: Line) -> str:
    """Return a line of the cluster file."""
    key, value, comment = line
    text = f"{key}: {yaml12.inline(value)}" if key else ""
    return f"{text:<31} # {comment}" if text and comment else text or f"# {comment}."
