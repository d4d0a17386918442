"""The nodes, ranks and cores that a run gets on a cluster."""

from __future__ import annotations

import pytest

from launch.cluster import slurm
from launch.cluster.config import ClusterConfig
from launch.cluster.resources import Resources, Wanted, resources_of, search_resources, slurm_resources
from trainers.config.schema import ScriptConfig
from trainers.contract.errors import UserError

EIGHT = {"gpus_per_node": 8, "cpus_per_gpu": 6}
CORES = {"cpus_per_node": 64, "cpus_per_rank": 16}
STAND_IN = {**EIGHT, "device": "cpu"}


def resources(cluster: dict, gpus: int | None = None, procs: int | None = None, nodes: int | None = None) -> Resources:
    return slurm_resources(ClusterConfig(name="lab", kind="slurm", **cluster), Wanted(gpus, procs, nodes))


@pytest.mark.parametrize("cluster, wanted, expected", [
    (EIGHT, {"gpus": 1}, Resources("cuda", 1, 1, 6, 1)),
    (EIGHT, {"gpus": 8}, Resources("cuda", 8, 1, 6, 8)),
    (EIGHT, {"gpus": 16}, Resources("cuda", 16, 2, 6, 16)),
    (EIGHT, {"gpus": 512}, Resources("cuda", 512, 64, 6, 512)),
    (EIGHT, {"gpus": 12}, Resources("cuda", 12, 2, 6, 12)),             # the fewest nodes that hold the ranks evenly
    (EIGHT, {"gpus": 9}, Resources("cuda", 9, 3, 6, 9)),
    (EIGHT, {"gpus": 8, "nodes": 4}, Resources("cuda", 8, 4, 6, 8)),
    (EIGHT, {"nodes": 2}, Resources("cuda", 16, 2, 6, 16)),             # whole nodes
    (EIGHT, {}, Resources("cuda", 1, 1, 6, 1)),
    (EIGHT, {"procs": 4}, Resources("cpu", 4, 1, 1)),                   # CPU ranks also on a cluster with GPUs
    ({**EIGHT, "cpus_per_node": 32, "cpus_per_rank": 2}, {"procs": 24}, Resources("cpu", 24, 2, 2)),
    ({}, {}, Resources("cuda", 1, 1, 1, 1)),                            # nothing is known about the cluster
    ({}, {"gpus": 8}, Resources("cuda", 8, 1, 1, 8)),             # SLURM decides
    ({}, {"gpus": 100, "nodes": 4}, Resources("cuda", 100, 4, 1, 100)),
    (STAND_IN, {"gpus": 16}, Resources("cpu", 16, 2, 6, 16)),
    (STAND_IN, {}, Resources("cpu", 1, 1, 6, 1)),
    ({**CORES, "device": "cpu"}, {}, Resources("cpu", 1, 1, 16)),
    ({**CORES, "device": "cpu"}, {"nodes": 3}, Resources("cpu", 12, 3, 16)),
    (CORES, {"procs": 4}, Resources("cpu", 4, 1, 16)),
    (CORES, {"procs": 6}, Resources("cpu", 6, 2, 16)),
    (CORES, {"procs": 2, "nodes": 2}, Resources("cpu", 2, 2, 16)),
    ({**EIGHT, "max_nodes": 2}, {"gpus": 16}, Resources("cuda", 16, 2, 6, 16)),
])
def test_what_a_run_gets(cluster, wanted, expected):
    result = resources(cluster, **wanted)
    assert result == expected and result.ranks_per_node * result.nodes == result.ranks


@pytest.mark.parametrize("cluster, wanted, message", [
    (EIGHT, {"gpus": 3, "nodes": 2}, "--gpus 3 cannot be spread evenly over 2 nodes\nhint: use --gpus 2 or 4"),
    (EIGHT, {"gpus": 1, "nodes": 2}, "--gpus 1 cannot be spread evenly over 2 nodes\nhint: use --gpus 2"),
    (EIGHT, {"gpus": 17}, "--gpus 17 cannot be spread evenly over 3 nodes\nhint: use --gpus 15 or 18"),
    (CORES, {"procs": 5}, "--procs 5 cannot be spread evenly over 2 nodes\nhint: use --procs 4 or 6"),
    (EIGHT, {"gpus": 16, "nodes": 1},
     "--gpus 16 on --nodes 1 is 16 per node, but a node of cluster `lab` has 8\nhint: use --nodes 2 or more"),
    ({**EIGHT, "max_nodes": 2}, {"gpus": 24},
     "--gpus 24 needs 3 nodes, but cluster `lab` has 2, each with 8 GPUs\nhint: use --gpus 16 or fewer"),
    ({**CORES, "max_nodes": 2}, {"procs": 12},
     "--procs 12 needs 3 nodes, but cluster `lab` has 2, each with 4 ranks\nhint: use --procs 8 or fewer"),
    ({"max_nodes": 2}, {"gpus": 3, "nodes": 3}, "--gpus 3 needs 3 nodes, but cluster `lab` has 2"),
    ({}, {"gpus": 9}, "--gpus 9: the file of cluster `lab` does not say how many GPUs a node has\n"
                      "hint: set `gpus_per_node` in that file, or add --nodes N"),
    ({}, {"nodes": 2}, "--nodes 2 without --gpus asks for whole nodes, but the file of cluster `lab` does not say how "
                       "large a node is\nhint: add --gpus, or set `gpus_per_node` in that file"),
    ({"device": "cpu"}, {"nodes": 2}, "how large a node is\nhint: add --procs, or set `cpus_per_node` in that file"),
    ({"cpus_per_node": 8, "cpus_per_rank": 16}, {"procs": 2}, "gives a rank 16 cores (`cpus_per_rank`), but a node has 8"),
])
def test_a_run_that_does_not_fit_is_refused(cluster, wanted, message):
    with pytest.raises(UserError) as error:
        resources(cluster, **wanted)
    assert message in str(error.value)


def test_gpus_on_a_cluster_without_gpus_are_refused():
    with pytest.raises(UserError, match=r"--gpus 2: cluster `lab` has no GPUs \(its file says `device: cpu`\)") as error:
        resources({"device": "cpu"}, gpus=2)
    assert error.value.hint == "use --procs 2, or set `gpus_per_node` in the file"
    assert resources({"device": "cpu"}, procs=2).device == "cpu" and resources(STAND_IN, gpus=2).gpus == 2


SINFO = ("gpu*|up|1-00:00:00|3|16|64000|gpu:a100:4,gpu:v100:2\n" "big|up|1-00:00:00|3|16|64000|gpu:h100:16\n"
         "cpu|up|1-00:00:00|3|16|64000|(null)\n")


@pytest.mark.parametrize("cluster, partition, wanted, expected", [
    ({}, None, {"gpus": 8}, (8, 2)), ({}, None, {"gpus": 4}, (4, 1)), ({}, None, {"nodes": 2}, (8, 2)),
    ({"gpu_type": "v100"}, None, {"gpus": 8}, (8, 4)), ({"partition": "big"}, None, {"gpus": 16}, (16, 1)),
    ({}, "big", {"gpus": 32}, (32, 2)), ({"partition": "gpu,big"}, None, {"gpus": 16}, (16, 1)),
    ({}, None, {"gpus": 16, "nodes": 2}, (16, 2)),  # the command counts, and SLURM refuses what it cannot do
    ({"partition": "cpu"}, None, {"gpus": 8}, (8, 1)), ({"gpus_per_node": 2}, None, {"gpus": 8}, (8, 4)),
])
def test_sinfo_tells_how_many_gpus_a_node_has(monkeypatch, cluster, partition, wanted, expected):
    monkeypatch.setattr(slurm, "call", lambda *words, **_: SINFO)
    config = ClusterConfig(name="lab", kind="slurm", **cluster)
    result = resources_of(ScriptConfig(name="s", script="s.py"), config, Wanted(**wanted), partition=partition)
    assert (result.gpus, result.nodes) == expected


def test_sinfo_is_not_asked_for_nothing(monkeypatch):
    def call(*words, **_):
        raise AssertionError(words)

    monkeypatch.setattr(slurm, "call", call)
    for cluster, wanted in (({}, {}), ({}, {"gpus": 1}), ({}, {"procs": 8}), ({"gpus_per_node": 4}, {"gpus": 8})):
        resources_of(ScriptConfig(name="s", script="s.py"), ClusterConfig(name="lab", kind="slurm", **cluster), Wanted(**wanted))


def test_without_sinfo_up_to_eight_gpus_are_one_node(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    config, script = ClusterConfig(name="lab", kind="slurm"), ScriptConfig(name="s", script="s.py")
    assert resources_of(script, config, Wanted(gpus=8)).nodes == 1
    assert resources_of(script, config, Wanted(gpus=16, nodes=2)).nodes == 2
    with pytest.raises(UserError, match="gpus_per_node"):
        resources_of(script, config, Wanted(gpus=16))


def test_a_search_with_more_ranks_than_cores_is_refused():
    with pytest.raises(UserError, match="8 ranks on a node, but a node of cluster `lab` has 4 cores\nhint: use --procs 4 or"):
        search_resources(ClusterConfig(name="lab", kind="slurm", cpus_per_node=4), Wanted(procs=8, nodes=1))
