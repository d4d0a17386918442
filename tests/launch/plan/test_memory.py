from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli.main import main
from launch.cluster.config import ClusterConfig, load_cluster
from launch.cluster.resources import Resources
from launch.plan.memory import Room as Has
from launch.plan.memory import _activations, memory_table, row
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
    """Instead of a process that imports torch: what it finds for cifar10."""
    monkeypatch.setattr("launch.plan.memory.probe", lambda *words: (VGG, None))


def test_a_dry_run_says_auto(capsys):
    assert main(["cifar10", "data=sample", "--procs", "2", "--dry-run", "train.micro_batch_size=auto"]) == 0
    assert ("batch      64 = 2 rank(s) x auto micro-batch x accumulation (32 micro-batch x 1 accumulation, or less at a time "
            "if that is what fits)") in capsys.readouterr().out


def test_plan_lays_the_strategies_side_by_side(counted, capsys):
    assert main(["plan", "cifar10", "data=sample", "--gpus", "16", "--cluster", "dgx-infiniband", "--strategy", "zero2"]) == 0
    out = capsys.readouterr().out
    assert "GPU        80 GiB, as cluster `dgx-infiniband` says (`gpu_memory`)" in out and "16 on cuda, 2 node(s)" in out
    assert [line.split()[0] for line in out.splitlines() if " fits" in line] == ["ddp", "zero1", "zero2", "fsdp", "zero3"]
    assert "zero2 *" in out and "--strategy ddp train.micro_batch_size=4 would fit, activations apart" in out


def test_what_no_file_says_is_not_known(counted, capsys):
    assert main(["plan", "cifar10", "data=sample", "--gpus", "2", "--slurm", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["room"] is None and "`gpu_memory` in the file of cluster `slurm` would say it" in found["room_said"]
    assert found["best"] is None and {each["fits"] for each in found["rows"]} == {None}


def test_the_largest_micro_batch_that_fits():
    has, on = Has(20 * GIB, "said"), Resources("cuda", 8)
    # 64 samples: 8 a rank. Each takes 3 GB, and ddp's states 16 GB of 19.3.
    activations = {2: 6 * 10**9, 4: 12 * 10**9}
    found = {name: row(spec("optim.name=adamw").config, name, BIG, activations, on, has) for name in ("ddp", "zero2", "fsdp")}
    assert (found["ddp"].fits, found["fsdp"].fits) == (False, True)
    assert found["ddp"].micro == 1 and found["fsdp"].micro == 4 and found["fsdp"].activations == 12 * 10**9
    # A size that the spec gives is not changed.
    assert row(spec("optim.name=adamw", "train.micro_batch_size=8").config, "fsdp", BIG, activations, on, has).fits is False


def test_activations_lie_on_a_line():
    config = spec().config
    assert _activations(config, BIG, {2: 300, 4: 500}, 16) == 100 + 16 * 100
    assert _activations(config, BIG, {1: 70}, 3) == 210
    assert _activations(config, BIG, None, 3) is None


def test_offload_stays_where_there_is_such(counted, capsys):
    words = ["train.offload=parameters", "--strategy", "fsdp", "--json"]
    assert main(["plan", "cifar10", "data=sample", "--gpus", "8", *words]) == 0
    host = {each["strategy"]: each["memory"]["host"] > 0 for each in json.loads(capsys.readouterr().out)["rows"]}
    assert host == {"ddp": False, "zero1": False, "zero2": False, "zero3": True, "fsdp": True}


def test_a_strategy_that_cannot_be_is_refused_with_the_reason(counted, capsys):
    assert main(["plan", "cifar10", "data=sample", "--gpus", "8", "train.compile=true"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "refused: `train.compile` does not go with `zero2`" in lines["zero2"] and "refused" not in lines["fsdp"]


def test_a_batch_that_does_not_divide_and_a_script_are_refused(tmp_path: Path, capsys):
    with pytest.raises(UserError, match="not a multiple of 3 ranks"):
        memory_table(spec(), load_cluster("local"), Resources("cpu", 3), activations=False)
    script = tmp_path / "train.py"
    script.touch()
    assert main(["plan", str(script)]) == 2
    assert "is a script, whose model nobody knows before it runs" in capsys.readouterr().err


@pytest.mark.slow
def test_the_probe_counts_and_measures_in_a_process_of_its_own(capfd):
    assert main(["plan", "cifar10", "data=sample", "model.width=0.25", "--procs", "2", "--probe", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    small = found["counts"]
    low, high = found["activations"]["2"], found["activations"]["4"]
    # Each image keeps at the least the inputs of its six convolutions.
    assert 1.9 < high / low < 2.1 and low / 2 > 4 * (3 * 32**2 + 16 * 16**2 + 32 * 8**2)
    assert found["best"] == {"strategy": "ddp", "micro_batch_size": 32}
    assert main(["plan", "cifar10", "data=sample", "--procs", "2", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["counts"] == vars(VGG) and found["activations"] is None
    assert 15 < VGG.parameters / small["parameters"] < 17  # of a width of a quarter, each layer
    assert main(["plan", "cifar10", "data=sample", "model.arch=alexnet", "--procs", "1", "--probe"]) == 2
    err = capfd.readouterr().err
    assert "alexnet cannot take images of 32x32" in err and "error: the probe failed" in err and "Traceback" not in err


@pytest.mark.parametrize("count, said", [(0, "0 B"), (1024, "1 KiB"), (3 * 2**20 // 2, "1.5 MiB"), (1020 * GIB, "1020 GiB")])
def test_sizes_are_said_in_three_digits(count: int, said: str):
    assert size(count) == said
