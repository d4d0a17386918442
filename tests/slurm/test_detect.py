"""The draft of a cluster file, and the files of cluster_configs/, against real clusters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm.cluster import Cluster, cluster, free_ports

from launch.cluster.config import BUILT_IN, ClusterConfig, read_cluster
from launch.cluster.detect import draft
from launch.cluster.resources import Wanted, slurm_resources
from launch.plan.job_script import Request, make_job

# What the files of cluster_configs/ describe: nodes <letter>1 and <letter>2, and a partition of each letter's.
NODES = {
    "d": "CPUs=112 RealMemory=2000000 Gres=gpu:8 Feature=h100",
    "a": 'CPUs=96 RealMemory=1000000 MemSpecLimit=4000 Gres=gpu:a100:8 Feature=a100-80g,nvlink Reason="once CPUTot=3"',
    "v": "CPUs=40 RealMemory=200000 Gres=gpu:v100:4",
    "c": "CPUs=64 RealMemory=256000",
}
PARTITIONS = {"dgx": "d[1-2] MaxTime=2-00:00:00", "gpu": "a[1-2],v[1-2] MaxTime=12:00:00", "cpu": "c[1-2] MaxTime=UNLIMITED"}


@pytest.fixture(scope="module")
def shapes(needs_slurm: None) -> Iterator[Cluster]:
    """Nodes of many kinds; main, the default, holds all."""
    names = [f"{kind}{number}" for kind in NODES for number in (1, 2)]
    lines = [f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} {NODES[name[0]]}"
             for name, port in zip(names, free_ports(len(names)))]
    lines += [f"PartitionName={name} Nodes={nodes}" for name, nodes in PARTITIONS.items()]
    with cluster(nodes=1, gpus=8, extra="\n".join(lines)) as slurm:
        gpus = f"{slurm.folder}/gpus/gpu"
        (slurm.folder / "gres.conf").write_text(
            f"NodeName=n1,d[1-2] Name=gpu File={gpus}[0-7]\nNodeName=a[1-2] Name=gpu Type=a100 File={gpus}[0-7]\n"
            f"NodeName=v[1-2] Name=gpu Type=v100 File={gpus}[0-3]\n")
        for name in names:
            (slurm.folder / name).mkdir()
            slurm.start_slurmd(name, wait=False)
        slurm.wait_up(names)
        yield slurm


@pytest.fixture
def drafted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Cluster], tuple[ClusterConfig, str]]:
    """What is drafted on a cluster: as it is read back, and the text."""
    def make(slurm: Cluster) -> tuple[ClusterConfig, str]:
        monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
        text = draft("here")
        (tmp_path / "here.yaml").write_text(text)
        return read_cluster(tmp_path / "here.yaml"), text
    return make


def accepted(slurm: Cluster, config: ClusterConfig, nodes: int = 2) -> str:
    """What `sbatch --test-only` says of a job of whole nodes."""
    gpus = None if config.device == "cpu" else nodes * (config.gpus_per_node or 4)
    resources = slurm_resources(config, Wanted(gpus=gpus, procs=nodes if gpus is None else None, nodes=nodes))
    job = make_job(Request(config), resources, name="job", folder="/tmp/none", python="python3", grace_s=60)
    (slurm.folder / "job.sh").write_text(job.script)
    return slurm.ask("sbatch", "--test-only", "job.sh").stderr


@pytest.mark.parametrize("name", [path.stem for path in BUILT_IN.glob("*.yaml") if path.stem != "local"])
def test_slurm_takes_the_examples(shapes, name):
    assert "to start at" in accepted(shapes, read_cluster(BUILT_IN / f"{name}.yaml"))


def test_a_draft_of_the_shared_cluster(slurm, drafted):
    config, text = drafted(slurm)
    assert config == ClusterConfig(
        name="here", description="private, partition main", kind="slurm", partition="main", time="1-00:00:00",
        gpu_request="gpus-per-node", gpus_per_node=8, cpus_per_gpu=2, mem_per_gpu="8000M", cpus_per_node=16,
        mem_per_cpu="4000M", max_nodes=3, requeue=True)
    assert "the default; others: short (up to 00:03:00), urgent (up to 1-00:00:00)" in text
    assert "KillWait, 20 sec (PreemptMode=REQUEUE)" in text
    assert "on nodes n[1-3]" in accepted(slurm, config, nodes=3)


@pytest.fixture
def only(shapes: Cluster) -> Iterator[Callable[..., None]]:
    """Gives a function that leaves these partitions of `shapes` up, the first as the default, with settings of its own."""
    every = ["main", "short", "urgent", *PARTITIONS]

    def choose(*names: str, **own: str) -> None:
        for name in every:
            more = own if name == names[0] else {}
            values = {"State": "UP" if name in names else "DOWN", "Default": "YES" if more is own else "NO", **more}
            shapes.run("scontrol", "update", f"PartitionName={name}", *(f"{key}={value}" for key, value in values.items()))

    yield choose
    shapes.run("scontrol", "reconfigure")


def test_the_most_common_gpu_is_chosen(shapes, only, drafted):
    only("gpu", GraceTime="120", AllowAccounts="ml,vision", MaxNodes="1", OverSubscribe="EXCLUSIVE")
    config, text = drafted(shapes)
    assert (config.partition, config.gpu_type, config.gpus_per_node, config.max_nodes) == ("gpu", "a100", 8, 1)
    assert (config.cpus_per_gpu, config.mem_per_gpu, config.time) == (12, "121G", "0-12:00:00")
    assert "GPUs here: 16 a100, 8 v100\n" in text and "nodes have a100-80g, nvlink\n" in text
    assert "# account: NAME                 # AllowAccounts=ml,vision\n" in text and "given out whole" in text
    assert "KillWait, 20 sec, after GraceTime, 120 sec" in text and "of 2, MaxNodes=1" in text


def test_all_that_is_drafted_may_be_had(shapes, only, drafted):
    only("gpu", MaxMemPerNode="800000")
    config, _ = drafted(shapes)
    assert config.mem_per_gpu == "97G"
    assert "on nodes a[1-2]" in accepted(shapes, config)


def test_a_default_partition_without_gpus(shapes, only, drafted):
    only("cpu", "gpu", "dgx")
    config, text = drafted(shapes)
    assert config.partition == "gpu" and "the default has no GPUs; others: dgx (up to 2-00:00:00), cpu (up to UNLIMITED)" in text
    only("cpu")
    config, text = drafted(shapes)
    assert (config.partition, config.device, config.gpu_request, config.gpus_per_node) == ("cpu", "cpu", "none", None)
    assert (config.cpus_per_node, config.mem_per_cpu, config.time) == (64, "4000M", "1-00:00:00")
    assert "on nodes c[1-2]" in accepted(shapes, config)


def test_a_site_of_other_habits(needs_slurm, drafted):
    """Another selection of nodes, memory that is not given out, no requeueing unless asked for."""
    with cluster(nodes=1, gpus=8, extra="SelectType=select/cons_res\nSelectTypeParameters=CR_CPU\nJobRequeue=0") as slurm:
        config, text = drafted(slurm)
        assert config.gpu_request == "gres" and config.gpus_per_node == 8 and config.mem_per_gpu is None
        assert "to start at" in accepted(slurm, config, nodes=1)
        assert config.requeue and "JobRequeue=0: jobs that ask for it" in text
        job = slurm.run("sbatch", "--parsable", "--requeue", "--wrap", "sleep 60").strip()
        slurm.wait(job, "RUNNING")
        slurm.run("scontrol", "requeue", job)  # refused of a job that did not ask
