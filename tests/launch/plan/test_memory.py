"""`launch plan`: the memory under each strategy, and which micro-batch fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli.main import main
from launch.cluster.config import ClusterConfig, load_cluster
from launch.cluster.resources import Resources
from launch.plan.memory import Room, _activations, memory_table, row
from launch.plan.spec import load_spec
from trainers.config.counts import Counts
from trainers.contract.errors import UserError
from trainers.contract.text import size

GIB = 2**30
VGG = Counts(parameters=5_819_466, tensor=2_359_296, buffers=3_462)
BIG = Counts(parameters=10**9, tensor=4 * 10**6, block=10**7, blocks=10**9)


def spec(*words: str, cluster: ClusterConfig | None = None):
    return load_spec("cifar10", ["data=sample", *words], cluster=cluster or load_cluster("local"), environment={})


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the process that imports torch by the numbers that it finds for cifar10."""
    monkeypatch.setattr("launch.plan.memory.probe", lambda *args: (VGG, None))


def test_a_dry_run_shows_the_automatic_micro_batch(capsys):
    assert main(["cifar10", "data=sample", "--procs", "2", "--dry-run", "train.micro_batch_size=auto"]) == 0
    assert ("batch      64 = 2 rank(s) x auto micro-batch x accumulation (32 micro-batch x 1 accumulation, or smaller "
            "micro-batches if these do not fit)") in capsys.readouterr().out


def test_plan_compares_the_strategies(counted, capsys):
    assert main(["plan", "cifar10", "data=sample", "--gpus", "16", "--cluster", "dgx-infiniband", "--strategy", "zero2"]) == 0
    out = capsys.readouterr().out
    assert "GPU        80 GiB, from `gpu_memory` of cluster `dgx-infiniband`" in out and "16 on cuda, 2 node(s)" in out
    assert [line.split()[0] for line in out.splitlines() if " fits" in line] == ["ddp", "zero1", "zero2", "fsdp", "zero3"]
    assert "zero2 *" in out and "--strategy ddp train.micro_batch_size=4 would fit, not counting activations and data" in out


def test_memory_that_no_file_gives_is_unknown(counted, capsys):
    assert main(["plan", "cifar10", "data=sample", "--gpus", "2", "--slurm", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["room"] is None and "set `gpu_memory` in the file of cluster `slurm`" in found["room_said"]
    assert found["best"] is None and {row["fits"] for row in found["rows"]} == {None}


def test_the_largest_micro_batch_that_fits():
    room, resources = Room(20 * GIB, "a test"), Resources("cuda", 8)
    # 64 samples, so 8 per rank. Each needs 3 GB, and ddp's states need 16 GB of the usable 19.3 GB.
    activations = {2: 6 * 10**9, 4: 12 * 10**9}
    found = {name: row(spec("optim.name=adamw").config, name, BIG, activations, resources, room)
             for name in ("ddp", "zero2", "fsdp")}
    assert (found["ddp"].fits, found["fsdp"].fits) == (False, True)
    assert found["ddp"].micro == 1 and found["fsdp"].micro == 4 and found["fsdp"].activations == 12 * 10**9
    # A micro-batch size that the spec sets is not changed.
    given = spec("optim.name=adamw", "train.micro_batch_size=8").config
    assert row(given, "fsdp", BIG, activations, resources, room).fits is False


def test_the_largest_budget_of_tokens_that_fits():
    """512 tokens on 8 ranks are tried as 64, 32, 16, 8 and 4 tokens a micro-batch."""
    config = spec("optim.name=adamw", "train.batch_tokens=512").config
    found = row(config, "fsdp", BIG, {2: 6 * 10**9, 4: 12 * 10**9}, Resources("cuda", 8), Room(20 * GIB, "a test"))
    assert (found.micro, found.fits) == (4, True)


def test_activations_lie_on_a_line():
    config = spec().config
    assert _activations(config, BIG, {2: 300, 4: 500}, 16) == 100 + 16 * 100
    assert _activations(config, BIG, {1: 70}, 3) == 210
    assert _activations(config, BIG, None, 3) is None


def test_offload_is_kept_for_the_strategies_that_support_it(counted, capsys):
    words = ["train.offload=parameters", "--strategy", "fsdp", "--json"]
    assert main(["plan", "cifar10", "data=sample", "--gpus", "8", *words]) == 0
    host = {row["strategy"]: row["memory"]["host"] > 0 for row in json.loads(capsys.readouterr().out)["rows"]}
    assert host == {"ddp": False, "zero1": False, "zero2": False, "zero3": True, "fsdp": True}


def test_a_strategy_that_cannot_be_used_is_refused_with_the_reason(counted, capsys):
    assert main(["plan", "cifar10", "data=sample", "--gpus", "8", "train.compile=true"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "refused: `train.compile` cannot be used with `zero2`" in lines["zero2"] and "refused" not in lines["fsdp"]


def test_a_batch_that_does_not_divide_and_a_script_are_refused(tmp_path: Path, capsys):
    with pytest.raises(UserError, match="not a multiple of 3 ranks"):
        memory_table(spec(), load_cluster("local"), Resources("cpu", 3), activations=False)
    script = tmp_path / "train.py"
    script.touch()
    assert main(["plan", str(script)]) == 2
    assert "is a script: its model is unknown until it runs" in capsys.readouterr().err


@pytest.mark.slow
def test_the_probe_counts_and_measures_in_a_separate_process(capfd):
    assert main(["plan", "cifar10", "data=sample", "model.width=0.25", "--procs", "2", "--probe", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    small = found["counts"]
    assert 0 <= small["data"] - 1500 * (3 * 32 * 32 + 8) < 100  # 1,000 and 500 images, as bytes, and their labels
    assert all(row["memory"]["data"] == small["data"] for row in found["rows"])
    low, high = found["activations"]["2"], found["activations"]["4"]
    # For each image at least the inputs of the six convolutions are kept.
    assert 1.9 < high / low < 2.1 and low / 2 > 4 * (3 * 32**2 + 16 * 16**2 + 32 * 8**2)
    assert found["best"] == {"strategy": "ddp", "micro_batch_size": 32}
    assert main(["plan", "cifar10", "data=sample", "--procs", "2", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["counts"] == vars(VGG) and found["activations"] is None
    assert 15 < VGG.parameters / small["parameters"] < 17  # each layer has a quarter of the width
    assert main(["plan", "cifar10", "data=sample", "model.arch=alexnet", "--procs", "1", "--probe"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: `model.arch` alexnet cannot take images of 32x32") and len(err.splitlines()) == 2


@pytest.mark.parametrize("count, text", [(0, "0 B"), (1024, "1 KiB"), (3 * 2**20 // 2, "1.5 MiB"), (1020 * GIB, "1020 GiB")])
def test_sizes_have_three_digits(count: int, text: str):
    assert size(count) == text
