"""`launch export`."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys

import pytest
import torch
from made import flip, make_checkpoint, make_run
from safetensors import safe_open
from safetensors.torch import load_file

from launch.cli.main import main
from trainers.checkpoints import export as engine
from trainers.contract.files import replace_json

SPEC = "checkpoint: {metric: loss, mode: min}\n"


def model(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"norm.running_mean": torch.randn(7, generator=generator), "count": torch.tensor(seed),
            "empty": torch.empty(0, 4), "half": torch.randn(3, 5, generator=generator).bfloat16(),
            "words.weight": torch.randn(400, 30, generator=generator), "ü/x": torch.rand(5, generator=generator) > 0.5}


def command_name(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"models/{name}/{key}": value for key, value in tensors.items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """A run with checkpoints of steps 10, 20 and 30; step 20 is the best."""
    monkeypatch.chdir(tmp_path)
    paths = make_run(tmp_path / "runs/r-1", SPEC)
    for step, loss in [(10, 3.0), (20, 1.0), (30, 2.0)]:
        optim = {f"optim/model/{key}/exp_avg": value for key, value in model(99).items()}
        make_checkpoint(paths, step, command_name("model", model(step)) | optim, ranks=4, metrics={"loss": loss},
                        tied={"models/model/out.weight": "models/model/words.weight"})
    return paths


def expected(step: int) -> dict[str, torch.Tensor]:
    return {**model(step), "out.weight": model(step)["words.weight"]}


@pytest.mark.parametrize("words, step", [([], 30), (["--step", "10"], 10), (["--step", "best"], 20)])
def test_a_model_becomes_one_file(paths, capsys, words, step):
    assert main(["export", "r-1", *words]) == 0
    printed = capsys.readouterr()
    file = paths.root / f"export/step_{step}/model.safetensors"
    assert printed.out == f"{file}\n" and printed.err.startswith(f"step {step}, ")
    assert equal(load_file(file), expected(step))
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "run": "r-1", "step": str(step)}
    assert main(["export", "r-1", *words]) == 0  # again
    assert os.listdir(file.parent) == ["model.safetensors"]


@pytest.mark.parametrize("words, steps", [(["--average", "3"], [10, 20, 30]), (["--average", "2", "--step", "20"], [10, 20])])
def test_the_mean_of_several_checkpoints(paths, capsys, monkeypatch, words, steps):
    monkeypatch.setattr("trainers.checkpoints.tensor_files.CHUNK_BYTES", 1000)
    assert main(["export", "r-1", *words, "-o", "mean.safetensors"]) == 0
    assert capsys.readouterr().err.startswith(f"step {steps[-1]}, the mean of steps {', '.join(map(str, steps))}, ")
    found, newest = load_file("mean.safetensors"), expected(steps[-1])
    mean = {name: torch.stack([expected(step)[name].double() for step in steps]).mean(0).to(value.dtype)
            if value.is_floating_point() else value for name, value in newest.items()}
    assert equal(found, mean) and not equal(found, newest)


def test_broken_checkpoints_are_left_out_of_a_mean(paths, capsys):
    flip(paths.checkpoint(20) / "2.safetensors")
    assert main(["export", "r-1", "--average", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines()[0].startswith("warning: the checkpoint of step 20 is broken (2.safetensors has changed")
    assert "step 30, the mean of steps 10, 30, " in printed.err and "/step_30-average-2/model.safetensors" in printed.out
    assert main(["export", "r-1", "--average", "3"]) == 2
    assert "`r-1` has 2 whole checkpoints up to step 30, but the weights of 3 are to be averaged\nhint: use --average 2" in \
        capsys.readouterr().err
    make_checkpoint(paths, 40, command_name("model", {**model(40), "half": torch.zeros(3, 5)}))
    assert main(["export", "r-1", "--average", "2"]) == 2
    assert "`models/model/half` of " in (error := capsys.readouterr().err) and "has another shape or type than in" in error


def test_averaged_weights_are_exported_unless_raw(paths, capsys):
    averages = {f"ema/model/{key}": value for key, value in model(7).items() if key in ("words.weight", "half")}
    make_checkpoint(paths, 40, command_name("model", model(40)) | averages, ranks=3,
                    tied={"models/model/out.weight": "models/model/words.weight"})
    for words, about, expectation in (
            ([], "averaged weights (train.ema)", {**expected(40), "half": model(7)["half"],
                                                  **dict.fromkeys(("words.weight", "out.weight"), model(7)["words.weight"])}),
            (["--raw"], "trained weights", expected(40))):
        assert main(["export", "r-1", *words]) == 0
        printed = capsys.readouterr()
        assert printed.err.startswith(f"step 40, {about}, ") and equal(load_file(printed.out.strip()), expectation)


def test_output_paths(paths, capsys):
    for output, file in [("a.safetensors", "a.safetensors"), ("b/c", "b/c/model.safetensors")]:
        assert main(["export", "r-1", "-o", output, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["files"] == {"model": str(paths.root.parents[1] / file)} and found["bytes"] == os.path.getsize(file)
        assert equal(load_file(file), expected(30))


def test_several_models_become_several_files(paths, capsys):
    make_checkpoint(paths, 40, command_name("critic", model(1)) | command_name("generator", model(2)), ranks=2)
    assert main(["export", "r-1", "-o", "out"]) == 0
    assert equal(load_file("out/critic.safetensors"), model(1)) and equal(load_file("out/generator.safetensors"), model(2))
    assert main(["export", "r-1", "-o", "out.safetensors"]) == 2
    assert "has 2 models (critic, generator), but `out.safetensors` is one file" in capsys.readouterr().err


def test_a_broken_checkpoint_is_passed_over_with_a_warning(paths, capsys):
    flip(paths.checkpoint(30) / "2.safetensors")
    assert main(["export", "r-1"]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("warning: the checkpoint of step 30 is broken (2.safetensors has changed")
    assert equal(load_file(printed.out.strip()), expected(20))
    assert main(["export", "r-1", "--json"]) == 0
    assert [line[:35] for line in json.loads(capsys.readouterr().out)["warnings"]] == ["the checkpoint of step 30 is broken"]


def test_best_warns_of_checkpoints_with_an_unreadable_manifest(paths, capsys):
    flip(paths.checkpoint(20) / "manifest.json", 3)
    assert main(["export", "r-1", "--step", "best"]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("warning: the checkpoint of step 20 is broken (manifest.json is not a manifest)")
    assert equal(load_file(printed.out.strip()), expected(30))


def test_a_broken_checkpoint_that_was_asked_for_is_refused(paths, capsys):
    flip(paths.checkpoint(20) / "2.safetensors")
    assert main(["export", "r-1", "--step", "20"]) == 2
    assert "the checkpoint of step 20 of `r-1` is broken: 2.safetensors has changed" in capsys.readouterr().err
    assert not (paths.root / "export").exists()


def test_if_the_best_is_broken_the_next_best_is_taken_with_a_warning(paths, capsys):
    flip(paths.checkpoint(20) / "2.safetensors")
    assert main(["export", "r-1", "--step", "best"]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("warning: the checkpoint of step 20 is broken (2.safetensors has changed")
    assert equal(load_file(printed.out.strip()), expected(30))


def test_errors(paths, capsys):
    for words, problem in [
        (["--step", "11"], "error: `r-1` has no checkpoint of step 11\nhint: the run has step 10, step 20, step 30\n"),
        (["--step", "worst"], "error: `worst` is not a checkpoint of a run\nhint: give `newest`, `best` or a step: step 10, "),
        (["--to", "onnx"], "error: `--to`: 'onnx' is not one of"),
        (["-o", "runs/r-1/run.json/x"], r"error: cannot write `.*/run.json/x/model.safetensors`: Not a directory\nhint: use -o"),
        (["--to", "huggingface"], r"error: model `model` of `r-1` has no Hugging Face layout: it is not a model of transformers"),
    ]:
        assert main(["export", "r-1", *words]) == 2
        assert re.match(problem, capsys.readouterr().err)
    for step in (10, 20, 30):
        flip(paths.checkpoint(step) / "manifest.json")
    assert main(["export", "r-1"]) == 2 and "(step 30: manifest.json is not a manifest)" in capsys.readouterr().err
    assert main(["export", "r-1", "--step", "best"]) == 2
    assert "no checkpoint of `r-1` that was evaluated is whole (step 30: manifest.json" in capsys.readouterr().err
    paths.spec.write_text("task: nowhere:Task\n")
    assert main(["export", "r-1", "--step", "best"]) == 2 and "it sets no `checkpoint.metric`" in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_file(paths, capsys):
    assert main(["export", "r-1", "-o", "out.safetensors", "--step", "10"]) == 0
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        assert main(["export", "r-1", "-o", "out.safetensors"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "cannot write" in capsys.readouterr().err and sorted(os.listdir()) == ["out.safetensors", "runs"]
    assert equal(load_file("out.safetensors"), expected(10))


def describe(paths, name="model") -> None:
    paths.huggingface(name).mkdir(parents=True)
    replace_json(paths.huggingface(name) / "config.json", {"model_type": "bert"})
    (paths.huggingface(name) / "vocab.txt").write_text("a\n")


def test_hugging_faces_layout(paths, capsys, monkeypatch):
    describe(paths)
    assert main(["export", "r-1", "--to", "huggingface"]) == 0
    folder = paths.root / "export/step_30/huggingface"
    assert capsys.readouterr().out == f"{folder}\n"
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "vocab.txt"]
    assert equal(load_file(folder / "model.safetensors"), model(30))  # tied weights are stored once: transformers ties them again
    monkeypatch.setattr(engine, "SHARD_BYTES", 1000)
    assert main(["export", "r-1", "--to", "huggingface", "-o", "out"]) == 0
    shards = sorted(name for name in os.listdir("out") if name.endswith(".safetensors"))
    assert shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.load(open("out/model.safetensors.index.json"))
    found = {name: load_file(f"out/{file}")[name] for name, file in index["weight_map"].items()}
    assert equal(found, model(30)) and set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert main(["export", "r-1", "--to", "huggingface", "-o", "out"]) == 0  # again
    monkeypatch.chdir("out")
    assert main(["export", str(paths.root), "--to", "huggingface", "-o", "..", "--step", "10"]) == 2
    assert "holds other files: out" in capsys.readouterr().err and paths.record.exists()


@pytest.mark.parametrize("failing", [1, 2, None])
def test_an_older_export_stays_until_the_new_one_is_in_its_place(paths, monkeypatch, failing):
    """`failing`: which rename fails: of the older folder, or of the new one."""
    describe(paths)
    assert main(["export", "r-1", "--to", "huggingface", "-o", "out", "--step", "10"]) == 0
    renames, rename = [], os.rename

    def fail(source, target):
        renames.append(target)
        if len(renames) == failing:
            raise OSError(13, "Permission denied")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        assert main(["export", "r-1", "--to", "huggingface", "-o", "out"]) == (2 if failing else 0)
    assert equal(load_file("out/model.safetensors"), model(10 if failing else 30))
    assert sorted(os.listdir()) == ["out", "runs"]


def test_all_models_need_the_layout(paths, capsys):
    make_checkpoint(paths, 40, command_name("critic", model(1)) | command_name("generator", model(2)))
    describe(paths, "critic")
    assert main(["export", "r-1", "--to", "huggingface", "-o", "out"]) == 2
    assert "model `generator` of `r-1` has no Hugging Face layout" in capsys.readouterr().err and not os.path.exists("out")
    describe(paths, "generator")
    assert main(["export", "r-1", "--to", "huggingface", "-o", "out"]) == 0
    assert equal(load_file("out/generator/model.safetensors"), model(2))


def test_a_large_model_is_exported_with_little_memory_and_without_torch(tmp_path):
    paths = make_run(tmp_path / "r-1")
    large = torch.arange(2**26, dtype=torch.float32)  # 256 MiB
    make_checkpoint(paths, 10, {"models/model/w": large, "optim/model/w/exp_avg": large[:2**24]}, ranks=3)
    code = """
import re, sys
from launch.cli.main import main
assert main(["export", sys.argv[1], "-o", sys.argv[2]]) == 0
assert not {"torch", "numpy"} & set(sys.modules)
peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
assert peak < 150 * 1024, peak
"""
    subprocess.run([sys.executable, "-c", code, str(paths.root), str(tmp_path / "x.safetensors")], check=True)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["w"], large)


def test_an_export_says_what_the_model_was_trained_with(paths, capsys):
    facts = {"classes": ["1", "10", "2"], "mean": [0.5, 0.25], "files": "abc", "format": "not Hugging Face's"}
    make_checkpoint(paths, 40, command_name("model", model(40)), facts=facts)
    assert main(["export", "r-1", "-o", "x.safetensors"]) == 0
    assert "classes, in order: 1, 10, 2\n" in capsys.readouterr().err
    with safe_open("x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "run": "r-1", "step": "40", "classes": '["1", "10", "2"]',
                                   "mean": "[0.5, 0.25]", "files": '"abc"'}
    assert main(["export", "r-1", "-o", "x.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"] == facts
