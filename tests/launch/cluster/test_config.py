"""Cluster files: the built-in examples, and the list of clusters."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from launch.cluster.config import BUILT_IN, load_cluster, read_cluster
from launch.cluster.detect import draft, listing
from launch.cluster.resources import Wanted, slurm_resources
from launch.plan.job_script import Request, make_job
from launch.plan.plan import make_plan
from launch.plan.spec import load_spec
from trainers.contract.errors import UserError

EXAMPLES = sorted(path.stem for path in BUILT_IN.glob("*.yaml") if path.stem != "local")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of cluster files."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "launch" / "clusters"
    folder.mkdir(parents=True)
    return folder


# --- cluster_configs/


def script(name: str, **wanted: int | None) -> tuple[set[str], str, str]:
    """Return (options of sbatch, setup lines, the srun command) of a job on a built-in cluster."""
    cluster = read_cluster(BUILT_IN / f"{name}.yaml")
    resources = slurm_resources(cluster, Wanted(wanted.get("gpus"), wanted.get("procs"), wanted.get("nodes")))
    text = make_job(Request(cluster), resources, name="job", folder="/runs/r", python=cluster.python or "/venv/python",
                    grace_s=60).script
    flags = {shlex.split(line)[1] for line in text.splitlines() if line.startswith("#SBATCH ")}
    setup, _, rest = text.partition("# setup\n")[2].partition("\n# command\n")
    return flags, setup, next(line for line in rest.splitlines() if line.startswith("srun "))


def test_the_generic_cluster_asks_only_for_what_a_job_needs():
    flags, _, command = script("slurm", gpus=4)
    always = {"--job-name=job", "--nodes=1", "--ntasks-per-node=1", "--open-mode=append", "--requeue", "--signal=USR2@105",
               "--output=/runs/r/%j_0_log.out"}
    assert flags - always == {"--gpus-per-node=4", "--time=1-00:00:00"}
    assert " /venv/python -P " in command


# GPUs or CPU ranks; some of the options of sbatch; some words of the srun line
@pytest.mark.parametrize("name, wanted, flags, words", [
    ("dgx-infiniband", {"gpus": 16},
     {"--nodes=2", "--gpus-per-node=8", "--cpus-per-task=112", "--mem=1920G", "--exclusive", "--switches=1@1:00:00",
      "--propagate=NONE", "--partition=dgx", "--account=my_group"}, []),
    ("gpu-types-gres", {"gpus": 8}, {"--nodes=2", "--gres=gpu:a100:4", "--cpus-per-task=64", "--mem=480G"}, []),
    ("gpu-types-constraint", {"gpus": 4}, {"--nodes=1", "--gpus-per-node=4", "--constraint=[a100-80g|h100]"}, []),
    ("cpu-partition", {"procs": 3}, {"--nodes=3", "--cpus-per-task=64", "--mem-per-cpu=3G", "--partition=cpu"}, []),
    ("container-pyxis", {"gpus": 8}, {"--nodes=1", "--gpus-per-node=8"},
     ["--container-image=/shared/images/train.sqsh", "--container-mounts=/scratch:/scratch,/home:/home",
      "--container-env=PYTHONPATH,LAUNCH_CODE,LAUNCH_DATA", "python3", "-P"]),
    ("container-apptainer", {"gpus": 4}, {"--nodes=1", "--gpus-per-node=4"},
     ["apptainer", "exec", "--nv", "--bind", "/scratch", "/shared/images/train.sif", "python3", "-P"]),
])
def test_what_the_examples_ask_for(name, wanted, flags, words):
    options, setup, command = script(name, **wanted)
    assert flags <= options
    assert [word for word in shlex.split(command) if word in words] == words
    assert ("module load apptainer" in setup) == (name == "container-apptainer")
    assert ("LAUNCH_DATA=/scratch/shared/data" in setup) == name.startswith("container")


def test_the_list_of_examples_is_complete():
    assert set(EXAMPLES) == {"slurm", "dgx-infiniband", "gpu-types-gres", "gpu-types-constraint", "cpu-partition",
                             "container-pyxis", "container-apptainer"}
    for name in EXAMPLES:
        cluster = load_cluster(name)
        assert cluster.name == name and cluster.kind == "slurm" and cluster.description


def test_ranks_get_the_variables_for_the_network():
    cluster = load_cluster("dgx-infiniband")
    spec = load_spec("cifar10", ["data=sample"], cluster=cluster, environment={})
    env = make_plan("r-1", spec, cluster, slurm_resources(cluster, Wanted(gpus=16)), runs=Path("/runs"), python="python",
                    cwd=Path("/")).env
    assert env["NCCL_IB_HCA"].startswith("=mlx5_0,mlx5_3,") and env["NCCL_SOCKET_IFNAME"] == "=bond0"


# --- launch clusters


def test_the_list_of_clusters_holds_broken_files_too(home):
    (home / "local.yaml").write_text("description: mine\n")
    (home / "lab.yaml").write_text("description: 实验室\nkind: slurm\n")
    (home / "broken.yaml").write_text("kind: slurm\npartitoin: gpu\n")
    (home / "no yaml.yaml").write_text("a: [\n")
    rows = {row["name"]: row for row in listing()}
    assert list(rows) == sorted(["local", "lab", "broken", "no yaml", *EXAMPLES])
    assert rows["lab"] == {"name": "lab", "kind": "slurm", "description": "实验室", "file": str(home / "lab.yaml"), "own": True,
                           "problem": None}
    assert rows["local"]["own"] and rows["local"]["description"] == "mine"
    assert not rows["slurm"]["own"] and rows["slurm"]["file"] == str(BUILT_IN / "slurm.yaml")
    assert rows["broken"]["kind"] is None and "`partitoin` is not a key of this spec" in rows["broken"]["problem"]
    assert f"{home / 'broken.yaml'}:2" in rows["broken"]["problem"]
    assert "no yaml.yaml" in rows["no yaml"]["problem"]


@pytest.mark.parametrize("env, name", [('{"A=B": x}', "A=B"), ('{"": x}', ""), ('{A: "x\\0"}', "A"), ('{B: y, "1": x}', "1")])
def test_variables_that_cannot_exist_are_refused(home, env, name):
    (home / "lab.yaml").write_text(f"kind: slurm\nenv: {env}\n")
    with pytest.raises(UserError, match=f"`env` sets `{name}`, but the name of a variable has only letters, .*lab.yaml:2"):
        load_cluster("lab")


def test_a_draft_needs_slurm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no SLURM here: `scontrol` is not installed"):
        draft()
