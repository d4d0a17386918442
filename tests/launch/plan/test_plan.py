"""Plans, the dry run, and the resources of this machine."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from conftest import BLOBS

from launch.cluster.config import load_cluster
from launch.cluster.resources import Resources, Wanted, local_resources, visible_gpus
from launch.plan.plan import make_plan
from launch.plan.show import CHOSEN_LATER, show
from launch.plan.spec import load_spec
from launch.supervise.port import reserved_port
from trainers.contract.errors import UserError


def plan(resources: Resources, *overrides: str, attempt: int = 1):
    cluster = load_cluster("local")
    spec = load_spec(str(BLOBS), overrides, cluster=cluster, environment={})
    return make_plan("the-run", spec, cluster, resources, runs=Path("/some/runs"), python="/py thon", cwd=Path("/cwd"),
                     attempt=attempt)


def test_the_same_inputs_give_the_same_plan():
    assert plan(Resources("cpu", 2)) == plan(Resources("cpu", 2))
    assert plan(Resources("cpu", 2), attempt=2) != plan(Resources("cpu", 2))


def test_the_dry_run_shows_every_command_variable_and_file():
    made = plan(Resources("cuda", 4, threads=3), "train.micro_batch_size=2")
    text = show(made)
    assert "'/py thon' -P -m trainers.run /some/runs/the-run" in text
    for key, value in made.env.items():
        assert f"\n{key}={value}\n" in text
    for rank in range(4):
        assert f"\nRANK={rank}\nLOCAL_RANK={rank}\nWORLD_SIZE=4\n" in text
    assert text.count(CHOSEN_LATER) == 4
    for content in made.files.values():
        assert content.rstrip() in text
    assert "32 = 4 rank(s) x 2 micro-batch x 4 accumulation" in text
    assert "accelerate launch --config_file /some/runs/the-run/attempts/1/plan/accelerate.yaml -m trainers.run" in text
    assert "num_processes: 4" in text and 'distributed_type: "MULTI_GPU"' in text
    assert made.env["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and made.env["ACCELERATE_USE_CPU"] == "false"
    assert "CUDA_VISIBLE_DEVICES" not in text


@pytest.mark.parametrize("ranks, overrides, message, hint", [
    (3, [], "`train.batch_size` is 32, not a multiple of 3 ranks", "use train.batch_size=30 or 33, or 1, 2, 4 or 8 ranks"),
    (64, [], "`train.batch_size` is 32, not a multiple of 64 ranks", "use train.batch_size=64, or 1, 2, 4, 8, 16 or 32 ranks"),
])
def test_a_batch_that_does_not_divide_is_refused_with_sizes_that_do(ranks, overrides, message, hint):
    with pytest.raises(UserError) as error:
        plan(Resources("cpu", ranks), *overrides)
    assert (error.value.message, error.value.hint) == (message, hint)


def test_a_batch_of_tokens_is_shown_in_words():
    made = plan(Resources("cpu", 3), "train.batch_tokens=4000", "train.micro_batch_size=700")
    assert made.batch == "up to 4000 tokens = 3 rank(s) x about 700 micro-batch x 2 accumulation"
    assert "up to 4000 tokens" in show(made)


def gpus(root: Path, uuids: list[str]) -> Path:
    """Make the device nodes of one GPU for each UUID, and what NVIDIA's driver says about the GPUs, below a root folder."""
    (root / "dev").mkdir()
    for name in [*(f"nvidia{i}" for i in range(len(uuids))), "nvidiactl", "nvidia-uvm"]:
        (root / "dev" / name).touch()
    for number, uuid in enumerate(uuids):
        about = root / "proc" / "driver" / "nvidia" / "gpus" / f"0000:0{number}:00.0" / "information"
        about.parent.mkdir(parents=True)
        about.write_text(f"Model: \t\t NVIDIA H100\nIRQ:   \t\t 42\nGPU UUID: \t {uuid}\nVideo BIOS: \t ??\n")
    return root


@pytest.mark.parametrize("mask, count", [
    (None, 4), ("", 0), ("-1", 0), ("0,1", 2), ("3", 1), ("0,-1,2", 1), ("0,1,2,3,4,5", 4), (" 0, 1", 2),
    ("NoDevFiles", 0), ("none", 0), ("7", 0), ("0,7,1", 1), ("0,0", 0), ("1,2,1", 0), ("0,x,0", 1),
    ("GPU-a0,GPU-b1", 2), ("GPU-a0-00", 1), ("GPU-ff", 0), ("GPU-b1,GPU-ff,GPU-a0", 1), ("GPU-a0,GPU-a0", 0), ("GPU-a0,1", 1),
    ("MIG-aa,MIG-bb", 2), ("MIG-aa,MIG-aa", 0), ("MIG-GPU-a0/1/0,MIG-GPU-a0/2/0,MIG-GPU-a0/3/0", 3),
])
def test_cuda_visible_devices_is_respected(tmp_path, mask, count):
    env = {} if mask is None else {"CUDA_VISIBLE_DEVICES": mask}
    assert visible_gpus(env, gpus(tmp_path, ["GPU-a0-00", "GPU-b1-00", "GPU-c2-00", "GPU-d3-00"])) == count


def test_ranks_inherit_no_variables_of_an_enclosing_run():
    left = {"LAUNCH_DEBUG": "1", "LAUNCH_HEARTBEAT": "5", "TORCHELASTIC_RUN_ID": "x", "SLURM_PROCID": "3"}
    assert plan(Resources("cpu", 1)).inherited({"HOME": "/x", **left}) == {"HOME": "/x"}


def test_a_uuid_counts_if_the_driver_does_not_tell_the_uuids(tmp_path):
    root = gpus(tmp_path, ["GPU-????????-????-????-????-????????????"])
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-a0"}, root) == 1
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "MIG-a0"}, tmp_path / "without") == 0


NVIDIA_SMI = """#!/bin/sh
[ "$1" = -L ] || exit 1
echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-a0-00)"
echo "  MIG 1g.10gb     Device  0: (UUID: MIG-d4)"
echo "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-b1-00)"
"""


def test_gpus_are_found_before_their_device_files_exist(tmp_path):
    root = gpus(tmp_path, ["GPU-a0-00", "GPU-b1-00", "GPU-c2-00"])
    shutil.rmtree(root / "dev")
    assert visible_gpus({}, root) == 3 and visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-b1"}, root) == 1
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(NVIDIA_SMI)
    smi.chmod(0o755)
    env = {"PATH": str(smi.parent)}
    assert visible_gpus(env, root) == 3
    shutil.rmtree(root / "proc")
    assert visible_gpus({}, root) == 0
    assert visible_gpus(env, root) == 2
    assert visible_gpus({**env, "CUDA_VISIBLE_DEVICES": "GPU-b1,GPU-c2"}, root) == 1
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'\nexit 9\n")
    assert visible_gpus(env, root) == 0


def test_too_few_gpus_is_an_error_and_never_falls_back_to_the_cpu(monkeypatch):
    monkeypatch.setattr("launch.cluster.resources.visible_gpus", lambda env: 1)
    assert local_resources(Wanted(), {}).device == "cuda"
    assert local_resources(Wanted(procs=2), {"OMP_NUM_THREADS": "5"}) == Resources("cpu", 2, threads=5)
    with pytest.raises(UserError, match="this machine has 1 NVIDIA GPU"):
        local_resources(Wanted(gpus=2), {"CUDA_VISIBLE_DEVICES": "3"})


def test_a_reserved_port_cannot_be_taken_by_others():
    with reserved_port() as first, reserved_port() as second:
        assert first != second
        for port in (first, second):
            with socket.socket() as other, pytest.raises(OSError):
                other.bind(("", port))
        with socket.socket() as store:  # as torch's store does
            store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            store.bind(("", first))
            store.listen()
