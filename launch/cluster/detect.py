"""The clusters that have a file, and a draft of such a file for the cluster one stands on."""

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
MOST = 12  # names that a comment lists

Row = defaultdict[str, str]  # what one release of SLURM says, another may not
Line = tuple[str, Any, str]  # key ("# ..." if it is for the user to fill in, "" if none), value, what to know of it


@dataclass(frozen=True)
class Node:
    cpus: int
    memory_mib: int
    gpus: Mapping[str, int]  # by type
    features: list[str]
    partitions: list[str]


def listing() -> list[dict[str, Any]]:
    """Of each cluster: name, kind, description, file, own (or built in), problem (what is wrong with its file, or None)."""
    rows = []
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
    """A cluster file for the cluster one stands on, as scontrol describes it, with what was read beside each value.

    Raises:
        UserError: there is no SLURM here, it does not answer, or it has no partition for users.
    """
    config = Row(str, re.findall(r"^(\S+)\s+= (.*?)\s*$", slurm.call("scontrol", "show", "config"), re.MULTILINE))
    partitions = [row for row in _rows("partition") if row["RootOnly"] != "YES"]
    partitions = [row for row in partitions if row["State"] == "UP"] or partitions
    if not partitions:
        raise UserError("SLURM shows no partition here", "`scontrol show partition --all` shows hidden ones: ask your site")
    nodes = [_node(row) for row in _rows("node")]
    partition = max(partitions, key=lambda row: _rank(row, nodes))
    here = [node for node in nodes if partition["PartitionName"] in node.partitions]
    lines = [
        ("description", f"{config['ClusterName']}, partition {partition['PartitionName']}", ""),
        ("kind", "slurm", ""),
        *_place(partition, partitions, config), *_nodes(partition, here, config), *_end(partition, config),
        ("# internet", False, "if nodes cannot download"),
        ("# runs", "/scratch/$USER/runs", "a folder that all nodes and this host share and you can write"),
        ("# data", "/scratch/data", "such a folder for downloaded data"),
        ("", None, "NCCL's variables, for several nodes: see dgx-infiniband.yaml"),
    ]
    return "\n".join([f"# Drafted from what scontrol says of cluster {config['ClusterName']} (SLURM {config['SLURM_VERSION']}).",
                      f"# Check it, keep it as {folders()[0]}/{name}.yaml, and try it: `--slurm --cluster {name} --dry-run`.",
                      *map(_line, lines)]) + "\n"


def _place(partition: Row, partitions: Sequence[Row], config: Row) -> list[Line]:
    """Where jobs go, on whose account, and for how long."""
    why = ("the default" if partition["Default"] == "YES" else
           "the default has no GPUs" if any(row["Default"] == "YES" for row in partitions) else "no default is up")
    others = [f"{row['PartitionName']} (up to {row['MaxTime']})" for row in partitions if row is not partition]
    lines: list[Line] = [("partition", partition["PartitionName"], why + (f"; others: {_listed(others)}" if others else ""))]
    for key, rules in (("account", ("AllowAccounts", "DenyAccounts")), ("qos", ("AllowQos", "DenyQos"))):
        told = [f"{rule}={partition[rule]}" for rule in rules if partition.get(rule, "ALL") != "ALL"]
        if key == "account" and "associations" in config["AccountingStorageEnforce"]:
            told.append("`sacctmgr show associations user=$USER` lists yours")
        if told:
            lines.append((f"# {key}", "NAME", "; ".join(told)))
    try:
        limit_s = seconds(partition["MaxTime"])
    except ValueError:  # UNLIMITED
        limit_s = None
    lines.append(("time", slurm_time(min(limit_s or DAY_S, DAY_S)),
                  f"at most {partition['MaxTime']} here; a run goes on in its next job"))
    return lines


def _nodes(partition: Row, here: Sequence[Node], config: Row) -> list[Line]:
    """What a node has, and the share of it that goes with a GPU."""
    lines: list[Line] = []
    kinds: Counter[str] = Counter()
    for node in here:
        kinds.update(node.gpus)
    gpus = 0
    if kinds:
        (kind, count), *others = kinds.most_common()
        a_node = Counter(node.gpus[kind] for node in here if kind in node.gpus).most_common()
        gpus = a_node[0][0]
        here = [node for node in here if node.gpus.get(kind) == gpus]
        if kind:
            rest = "".join(f", {other_count} {other or 'without a type'}" for other, other_count in others)
            lines.append(("gpu_type", kind, f"GPUs here: {count} {kind}{rest}"))
        lines += [("gpu_request", "gpus-per-node" if "cons_tres" in config["SelectType"] else "gres", config["SelectType"]),
                  ("gpus_per_node", gpus, ", ".join(f"{nodes} nodes have {number}" for number, nodes in a_node))]
    else:
        lines += [("device", "cpu", "no node has GPUs"), ("gpu_request", "none", "")]
    features = Counter(feature for node in here for feature in node.features)
    if features:
        lines.append(("# constraint", "FEATURE", f"nodes have {_listed([name for name, _ in features.most_common()])}"))
    if partition["OverSubscribe"] == "EXCLUSIVE" or "linear" in config["SelectType"]:
        lines.append(("", None, "Nodes are given out whole here: ask for all GPUs of each"))
    if not here:
        return lines
    cpus, most = min(node.cpus for node in here), max(node.cpus for node in here)
    memory = min([*(node.memory_mib for node in here), *_allowed(partition, cpus), *_allowed(config, cpus)])
    shared = "MEMORY" in config["SelectTypeParameters"].upper()  # else memory is not given out at all
    if gpus and cpus >= gpus:
        lines.append(("cpus_per_gpu", cpus // gpus, f"{cpus} cores / {gpus}"))
    if gpus and shared and memory >= gpus:
        lines.append(("mem_per_gpu", _size(memory // gpus), f"{memory} MiB / {gpus}"))
    lines.append(("cpus_per_node", cpus, f"the smallest node's; others have up to {most}" if most > cpus else ""))
    if shared and memory >= cpus:
        lines.append(("mem_per_cpu", _size(memory // cpus), f"{memory} MiB / {cpus}; for ranks without GPUs"))
    limit = partition["MaxNodes"]
    lines.append(("max_nodes", min(len(here), int(limit)) if limit.isdigit() else len(here),
                  f"of {len(here)}, MaxNodes={limit}" if limit.isdigit() else ""))
    return lines


def _end(partition: Row, config: Row) -> list[Line]:
    """How jobs end, and whether they come back."""
    again, wait, grace = config["JobRequeue"], config["KillWait"], partition["GraceTime"]
    preempted = "OFF" not in (config["PreemptMode"], partition["PreemptMode"])
    return [
        ("requeue", True, f"JobRequeue={again}" + (": jobs that ask for it, as these do" if again == "0" else "")),
        ("", None, f"Time for a checkpoint when a job is preempted or requeued: KillWait, {wait}" + (
            f", after GraceTime, {grace} sec" if grace.strip("0") else "") + (
            f" (PreemptMode={partition['PreemptMode']})" if preempted else " (no job here preempts another)")),
    ]


def _rank(row: Row, nodes: Sequence[Node]) -> tuple[bool, bool, int]:
    """The default partition, unless it has no GPUs and another has; then that with the most."""
    gpus = sum(sum(node.gpus.values()) for node in nodes if row["PartitionName"] in node.partitions)
    return gpus > 0, row["Default"] == "YES", gpus


def _rows(what: str) -> list[Row]:
    """`scontrol show WHAT -o`: a line each of KEY=VALUE. Of a key that comes twice the first holds: what people have
    written, in which anything may stand, comes last."""
    lines = slurm.call("scontrol", "show", what, "-o").splitlines()
    return [Row(str, reversed(re.findall(r"(\w+)=(\S*)", line))) for line in lines if line.startswith(f"{what.title()}Name=")]


def _node(row: Row) -> Node:
    def names(key: str) -> list[str]:
        return [name for name in row[key].split(",") if name not in ("", "(null)")]

    # CPUEfctv, MemSpecLimit: without what the system keeps for itself.
    return Node(int(row.get("CPUEfctv", row["CPUTot"])), int(row["RealMemory"]) - int(row.get("MemSpecLimit", 0)),
                slurm.gpus(row["Gres"]), names("ActiveFeatures"), names("Partitions"))


def _allowed(row: Row, cpus: int) -> list[int]:
    """MiB that a job may have of a node, where that is limited."""
    limits = (("MaxMemPerNode", 1), ("MaxMemPerCPU", cpus))
    return [int(row[key]) * factor for key, factor in limits if row.get(key, "").isdigit()]


def _size(mib: int) -> str:
    return f"{mib // 1024}G" if mib >= 16 * 1024 else f"{mib}M"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST]) + (f" and {len(names) - MOST} more" if len(names) > MOST else "")


def _line(line: Line) -> str:
    key, value, comment = line
    text = f"{key}: {yaml12.inline(value)}" if key else ""
    return f"{text:<31} # {comment}" if text and comment else text or f"# {comment}."
