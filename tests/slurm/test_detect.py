"""Drafts of cluster files, and the example files of cluster_configs/, checked on real clusters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm.cluster import Cluster, cluster, free_ports

from launch.cluster.config import BUILT_IN, ClusterConfig, read_cluster
from launch.cluster.detect import draft
from launch.cluster.resources import Wanted, slurm_resources
from launch.plan.job_script import Request, make_job

# Nodes as in the files of cluster_configs/: <letter>1 and <letter>2 for each letter.
NODES = {
    "d": "CPUs=112 RealMemory=2000000 Gres=gpu:8 Feature=h100",
    "a": 'CPUs=96 RealMemory=1000000 MemSpecLimit=4000 Gres=gpu:a100:8 Feature=a100-80g,nvlink Reason="once CPUTot=3"',
    "v": "CPUs=40 RealMemory=200000 Gres=gpu:v100:4",
    "c": "CPUs=64 RealMemory=256000",
}
PARTITIONS = {"dgx": "d[1-2] MaxTime=2-00:00:00", "gpu": "a[1-2],v[1-2] MaxTime=12:00:00", "cpu": "c[1-2] MaxTime=UNLIMITED"}


@pytest.fixture(scope="module")
def mixed_cluster(needs_slurm: None) -> Iterator[Cluster]:
    """A cluster with nodes of several kinds. The default partition, main, contains all nodes."""
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
        slurm.wait_until_up(names)
        yield slurm


@pytest.fixture
def draft_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Cluster], tuple[ClusterConfig, str]]:
    """A function that drafts a cluster file and returns (the parsed file, its text)."""
    def make(slurm: Cluster) -> tuple[ClusterConfig, str]:
        monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
        text = draft("here")
        (tmp_path / "here.yaml").write_text(text)
        return read_cluster(tmp_path / "here.yaml"), text
    return make


def sbatch_test(slurm: Cluster, config: ClusterConfig, nodes: int = 2) -> str:
    """Return what `sbatch --test-only` prints for a job of whole nodes."""
    gpus = None if config.device == "cpu" else nodes * (config.gpus_per_node or 4)
    resources = slurm_resources(config, Wanted(gpus=gpus, procs=nodes if gpus is None else None, nodes=nodes))
    job = make_job(Request(config), resources, name="job", folder="/tmp/none", python="python3", grace_s=60)
    (slurm.folder / "job.sh").write_text(job.script)
    return slurm.try_run("sbatch", "--test-only", "job.sh").stderr


@pytest.mark.parametrize("name", [path.stem for path in BUILT_IN.glob("*.yaml") if path.stem != "local"])
def test_slurm_accepts_the_example_files(mixed_cluster, name):
    assert "to start at" in sbatch_test(mixed_cluster, read_cluster(BUILT_IN / f"{name}.yaml"))


def test_a_draft_of_the_shared_cluster(slurm, draft_of):
    config, text = draft_of(slurm)
    assert config == ClusterConfig(
        name="here", description="private, partition main", kind="slurm", partition="main", time="1-00:00:00",
        gpu_request="gpus-per-node", gpus_per_node=8, cpus_per_gpu=2, mem_per_gpu="8000M", cpus_per_node=16,
        mem_per_cpu="4000M", max_nodes=3, requeue=True)
    assert "the default; others: short (up to 00:03:00), urgent (up to 1-00:00:00)" in text
    assert "KillWait, 20 sec (PreemptMode=REQUEUE)" in text
    assert "on nodes n[1-3]" in sbatch_test(slurm, config, nodes=3)


@pytest.fixture
def use_partitions(mixed_cluster: Cluster) -> Iterator[Callable[..., None]]:
    """A function that sets all partitions of `mixed_cluster` down except the named ones.

    The first named partition becomes the default and gets the settings that are passed by keyword.
    """
    partitions = ["main", "short", "urgent", *PARTITIONS]

    def choose(*names: str, **settings: str) -> None:
        for name in partitions:
            default = name == names[0]
            values = {"State": "UP" if name in names else "DOWN", "Default": "YES" if default else "NO"}
            values |= settings if default else {}
            mixed_cluster.run("scontrol", "update", f"PartitionName={name}", *(f"{key}={value}" for key, value in values.items()))

    yield choose
    mixed_cluster.run("scontrol", "reconfigure")


def test_the_most_common_gpu_is_chosen(mixed_cluster, use_partitions, draft_of):
    use_partitions("gpu", GraceTime="120", AllowAccounts="ml,vision", MaxNodes="1", OverSubscribe="EXCLUSIVE")
    config, text = draft_of(mixed_cluster)
    assert (config.partition, config.gpu_type, config.gpus_per_node, config.max_nodes) == ("gpu", "a100", 8, 1)
    assert (config.cpus_per_gpu, config.mem_per_gpu, config.time) == (12, "121G", "0-12:00:00")
    assert "GPUs here: 16 a100, 8 v100\n" in text and "nodes have a100-80g, nvlink\n" in text
    assert "# account: NAME                 # AllowAccounts=ml,vision\n" in text and "Jobs get whole nodes" in text
    assert "KillWait, 20 sec, after GraceTime, 120 sec" in text and "of 2, MaxNodes=1" in text


def test_a_draft_stays_below_maxmempernode(mixed_cluster, use_partitions, draft_of):
    use_partitions("gpu", MaxMemPerNode="800000")
    config, _ = draft_of(mixed_cluster)
    assert config.mem_per_gpu == "97G"
    assert "on nodes a[1-2]" in sbatch_test(mixed_cluster, config)


def test_a_default_partition_without_gpus_is_replaced_or_drafted_for_cpus(mixed_cluster, use_partitions, draft_of):
    use_partitions("cpu", "gpu", "dgx")
    config, text = draft_of(mixed_cluster)
    assert config.partition == "gpu" and "the default has no GPUs; others: dgx (up to 2-00:00:00), cpu (up to UNLIMITED)" in text
    use_partitions("cpu")
    config, text = draft_of(mixed_cluster)
    assert (config.partition, config.device, config.gpu_request, config.gpus_per_node) == ("cpu", "cpu", "none", None)
    assert (config.cpus_per_node, config.mem_per_cpu, config.time) == (64, "4000M", "1-00:00:00")
    assert "on nodes c[1-2]" in sbatch_test(mixed_cluster, config)


def test_a_draft_for_a_site_with_other_slurm_settings(needs_slurm, draft_of):
    """The site uses select/cons_res, does not allocate memory, and requeues only jobs that ask for it."""
    with cluster(nodes=1, gpus=8, extra="SelectType=select/cons_res\nSelectTypeParameters=CR_CPU\nJobRequeue=0") as slurm:
        config, text = draft_of(slurm)
        assert config.gpu_request == "gres" and config.gpus_per_node == 8 and config.mem_per_gpu is None
        assert "to start at" in sbatch_test(slurm, config, nodes=1)
        assert config.requeue and "JobRequeue=0: SLURM requeues only jobs that ask for it" in text
        job = slurm.run("sbatch", "--parsable", "--requeue", "--wrap", "sleep 60").strip()
        slurm.wait(job, "RUNNING")
        slurm.run("scontrol", "requeue", job)  # SLURM refuses this for a job that did not ask for requeueing
