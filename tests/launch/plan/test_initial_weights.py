"""Which weights a run starts from, and which checkpoint an evaluation uses. No rank is started here."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import BLOBS
from made import flip

from launch.cli.main import main
from launch.cluster.config import load_cluster
from launch.cluster.resources import Resources
from launch.execute.evaluate import evaluation_spec
from launch.execute.record import create_run
from launch.plan import initial_weights
from launch.plan.initial_weights import find_weights, with_weights
from launch.plan.plan import make_plan
from launch.plan.show import show
from launch.plan.spec import Weights, load_spec, spec_of
from launch.records.read import status
from launch.records.run import read_run
from launch.report.tables import details
from trainers.checkpoints import averaging, manifest
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths

LOCAL = load_cluster("local")


def a_plan(root: Path, run_id: str = "new", *overrides: str):
    spec = with_weights(load_spec(str(BLOBS), overrides, cluster=LOCAL, environment={}), root)
    return make_plan(run_id, spec, LOCAL, Resources("cpu", 1), runs=root, python="python", cwd=Path("/"))


def save(paths: RunPaths, step: int, **metrics: float | None) -> Path:
    folder = paths.checkpoint(step)
    folder.mkdir(parents=True)
    texts = {"0.safetensors": f"weights of step {step}", "index.json": "{}", "state.json": "{}"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    manifest.write(folder, step=step, entries={name: manifest.entry(folder / name) for name in texts}, metrics=metrics)
    return folder


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """A run with four checkpoints; the newest one is broken."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LAUNCH_RUNS", raising=False)
    paths = create_run(a_plan(tmp_path / "runs", "blobs-1"))
    for step, top1 in ((10, 0.5), (20, 0.9), (30, None), (40, 1.0)):
        save(paths, step, top1=top1)
    (paths.checkpoint(40) / "0.safetensors").write_text("weights")
    return paths


@pytest.fixture
def root(paths: RunPaths) -> Path:
    return paths.root.parent


def refused(root: Path, word: str) -> str:
    """Return the error for an `init.source` that cannot be used."""
    with pytest.raises(UserError) as caught:
        find_weights(word, root)
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


@pytest.mark.parametrize("word, step", [
    ("blobs-1", 30), ("blobs", 30), ("blobs-1@newest", 30), ("blobs@best", 20), ("blobs-1@10", 10), ("runs/blobs-1@10", 10),
    ("./runs/blobs-1", 30), ("runs/blobs-1/checkpoints/step_20", 20),
])
def test_a_run_or_its_checkpoint(paths, root, word, step):
    found = find_weights(word, root)
    assert (found.path, found.run, found.step) == (str(paths.checkpoint(step)), "blobs-1", step)
    warnings = ["the checkpoint of step 40 is broken (0.safetensors has 7 bytes, not 18): passed over"]
    assert list(found.warnings) == (warnings if "10" not in word and "step_20" not in word else [])


@pytest.mark.parametrize("word, broken, step", [("blobs", 30, 20), ("blobs@best", 20, 10)])
def test_a_checkpoint_with_a_flipped_byte_is_passed_over(paths, root, capsys, word, broken, step):
    """The sizes of its files are right."""
    flip(paths.checkpoint(broken) / "0.safetensors")
    found = find_weights(word, root)
    assert found.step == step and "0.safetensors has changed since it was written (sha256)): passed over" in found.warnings[-1]
    spec = evaluation_spec(read_run(paths.root), word.partition("@")[2] or None, [])
    assert spec.weights.step == step and spec.weights.warnings == found.warnings
    assert f"checkpoint of step {broken} of `blobs-1` is broken: 0.safetensors has changed" in refused(root, f"blobs@{broken}")
    assert "is broken: 0.safetensors has changed" in refused(root, str(paths.checkpoint(broken)))
    capsys.readouterr()
    assert main(["sweep", str(BLOBS), "--from", word, "train.seed=1,2", "--procs", "1", "--dry-run", "--json"]) == 0
    printed = capsys.readouterr()
    assert [plan["weights"]["step"] for plan in json.loads(printed.out)["plans"]] == [step, step]
    assert printed.err.count(f"step {broken} is broken") == 1


def test_the_checkpoints_of_a_mean_are_all_kept(paths, root):
    plan = a_plan(root, "mean", "init.source=blobs@30", "init.average=2")
    assert plan.weights == Weights(str(paths.checkpoint(30)), "blobs-1", 30, (), (20,))
    assert str(plan.weights) == "run blobs-1, the mean of steps 20, 30"
    run = create_run(plan)
    assert details(status(read_run(run.root))).count("from run blobs-1, the mean of steps 20, 30") == 1
    assert sorted(path.name for path in run.init.iterdir()) == ["step_20", "step_30"]
    assert averaging.older(run.first_weights(plan.weights.path), 1) == [run.init / "step_20"]
    assert find_weights(str(paths.checkpoint(30)), root, 2).older == (20,)
    assert evaluation_spec(read_run(paths.root), "30", [], {"average": 3}).weights.older == (20, 10)
    for word, count, message in (("blobs-1@20", 3, "`blobs-1` has 2 whole checkpoints up to step 20, but the weights of 3 are"),
                                 ("blobs-1@10", 2, "up to step 10, .*\n.*leave out --average"),
                                 (str(run.init / "step_30"), 2, "is one checkpoint, and not in the folder of its run")):
        with pytest.raises(UserError, match=message):
            find_weights(word, root, count)
    file = root.parent / "x.safetensors"
    file.write_bytes(b"")
    with pytest.raises(UserError, match="`.*x.safetensors` is no run's checkpoint, so there are no older ones to"):
        find_weights(str(file), root, 2)


def test_files_and_folders(paths, root, tmp_path):
    assert find_weights(str(paths.checkpoint(20)), root) == Weights(str(paths.checkpoint(20)), "blobs-1", 20)
    assert find_weights(f"{paths.root}@best", root).step == 20
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").touch()
    assert find_weights("model", root) == Weights(str(tmp_path / "model"))
    assert find_weights("model/model.safetensors", root) == Weights(str(tmp_path / "model/model.safetensors"))
    shutil.copytree(paths.checkpoint(10), tmp_path / "kept@home")
    assert find_weights("kept@home", root) == Weights(str(tmp_path / "kept@home"), None, 10)


def test_a_source_that_cannot_be_used_is_refused_with_the_reason(paths, root, tmp_path):
    assert "there is no run `blops`" in refused(root, "blops") and "did you mean blobs-1?" in refused(root, "blops")
    assert "`some/where` does not exist" in refused(root, "some/where")
    assert "has no checkpoint of step 15\nhint: the run has step 10, step 20" in refused(root, "blobs-1@15")
    assert "`bets` is not a checkpoint of a run" in refused(root, "blobs-1@bets")
    assert "checkpoint of step 40 of `blobs-1` is broken: 0.safetensors has 7 bytes" in refused(root, "blobs-1@40")
    assert "is a part of a checkpoint" in refused(root, "runs/blobs-1/checkpoints/step_10/0.safetensors")
    (tmp_path / "model.bin").touch()
    assert "is not a safetensors file" in refused(root, "model.bin")
    (tmp_path / "empty").mkdir()
    assert "contains no checkpoint and no *.safetensors file" in refused(root, "empty")
    create_run(a_plan(root, "other-1"))
    assert "`other-1` has no checkpoint" in refused(root, "other")
    (paths.checkpoint(30) / manifest.NAME).unlink()
    assert find_weights("blobs-1", root).step == 20
    for step in (10, 20):
        (paths.checkpoint(step) / manifest.NAME).unlink()
    assert "no checkpoint of `blobs-1` is whole (step 40: 0.safetensors has 7 bytes" in refused(root, "blobs-1")
    assert "no checkpoint of `blobs-1` that was evaluated is whole" in refused(root, "blobs-1@best")


def test_the_best_needs_a_metric(paths, root):
    plain = create_run(a_plan(root, "plain", "checkpoint.metric=null"))
    save(plain, 5, top1=0.5)
    assert "it sets no `checkpoint.metric`" in refused(root, "plain@best")
    never = create_run(a_plan(root, "never"))
    save(never, 5)
    assert "has a value of `top1`" in refused(root, "never@best")


def test_the_spec_holds_the_path_and_the_record_names_the_run(paths, root, capsys):
    plan = a_plan(root, "new", "init.source=blobs@best")
    assert "weights    run blobs-1, step 20, kept in init/" in show(plan)
    new = create_run(plan)
    assert spec_of(new).config.init.source == str(paths.checkpoint(20))
    assert read_run(new.root).record["init"] == {"path": str(paths.checkpoint(20)), "run": "blobs-1", "step": 20}
    assert main(["status", "new"]) == 0
    assert "weights     from run blobs-1, step 20" in capsys.readouterr().out


def test_the_weights_stay_when_the_other_run_deletes_them(paths, root, monkeypatch):
    new = create_run(a_plan(root, "new", "init.source=blobs@best"))
    kept = new.first_weights(spec_of(new).config.init.source)
    assert os.path.samefile(kept / "0.safetensors", paths.checkpoint(20) / "0.safetensors")
    shutil.rmtree(paths.checkpoint(20))
    assert kept.is_relative_to(new.root) and (kept / "0.safetensors").read_text() == "weights of step 20"

    def no_links(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(initial_weights.os, "link", no_links)
    other = create_run(a_plan(root, "other", "init.source=blobs@10"))
    assert (other.init / "step_10/0.safetensors").read_text() == "weights of step 10"
    assert (other.init / "step_10/0.safetensors").stat().st_nlink == 1


def test_a_checkpoint_that_is_deleted_before_it_is_kept_leaves_no_run(paths, root):
    plan = a_plan(root, "new", "init.source=blobs@best")
    shutil.rmtree(paths.checkpoint(20))
    with pytest.raises(UserError, match="step_20 has just been deleted"):
        create_run(plan)
    assert not (root / "new").exists()


def test_from_is_an_alias_of_init_source(paths, capsys):
    assert main(["show", str(BLOBS), "--from", "blobs@best"]) == 0
    assert "source: blobs@best" in capsys.readouterr().out
    assert main([str(BLOBS), "--from", "blobs@best", "--procs", "1", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["weights"] | {"warnings": []} == {"path": str(paths.checkpoint(20)), "run": "blobs-1", "step": 20, "warnings": [],
                                              "older": []}
    assert main([str(BLOBS), "--from", "blobs@best", "--procs", "1", "--dry-run"]) == 0
    assert "warning: the checkpoint of step 40 is broken" in capsys.readouterr().err
    assert main(["sweep", str(BLOBS), "--from", "blobs@10", "train.seed=1,2", "--procs", "1", "--dry-run", "--json"]) == 0
    assert [plan["weights"]["step"] for plan in json.loads(capsys.readouterr().out)["plans"]] == [10, 10]
    assert main([str(BLOBS), "init.skip=[head]"]) == 2
    assert "init.skip is given without init.source" in capsys.readouterr().err


# Evaluations


def test_an_evaluation_is_a_separate_run(paths):
    spec = evaluation_spec(read_run(paths.root), "best", ["data.source=x", "eval.batch_size=7", "train.precision=bf16"])
    config = spec.config
    assert (config.eval.only, config.eval.batch_size, config.train.precision) == (True, 7, "bf16")
    assert (config.init.source, config.data) == (str(paths.checkpoint(20)), {"source": "x"})
    with pytest.raises(UserError, match="`data.sorce` is not a key of this task .*\n.*did you mean `data.source`"):
        evaluation_spec(read_run(paths.root), None, ["data.sorce=x"])
    with pytest.raises(UserError, match="`data.folder` is not a key of this task .*\n.*keys that the run has under `data`"):
        evaluation_spec(read_run(paths.root), None, ["data.folder=x"])
    before = spec_of(paths).values
    assert {key for key in before if before[key] != spec.values[key]} == {"init", "eval", "train", "data"}
    plan = make_plan("evaluation", spec, LOCAL, Resources("cpu", 3), runs=paths.evaluations, python="python", cwd=Path("/"))
    assert plan.batch == "evaluation of 7 samples per rank at a time"  # 32 need not divide by 3


def test_settings_for_training_do_not_stop_an_evaluation(paths, root):
    run = create_run(a_plan(root, "zero", "train.strategy=zero3", "train.offload=optimizer", "train.batch_size=10",
                            "train.deepspeed={zero_optimization: {}}", "train.micro_batch_size=5"))
    save(run, 5)
    for more, offload in (([], "none"), (["train.strategy=ddp"], "none"), (["train.offload=parameters"], "parameters")):
        spec = evaluation_spec(read_run(run.root), None, more)
        plan = make_plan("x", spec, LOCAL, Resources("cpu", 3), runs=run.evaluations, python="python", cwd=Path("/"))
        assert spec.config.train.offload == offload and plan.batch == "evaluation of 20 samples per rank at a time"
        assert not any("deepspeed" in name for name in plan.files)


@pytest.mark.parametrize("words, error, hint", [
    (["nope"], "there is no run `nope`", "see `launch runs`"),
    (["blobs-1", "--step", "15"], "`blobs-1` has no checkpoint of step 15", "the run has step 10"),
    (["blobs-1", "--step", "last"], "`last` is not a checkpoint of a run", "give `newest`, `best` or a step"),
    (["blobs-1", "model.width=3"], "`model.width` cannot be overridden in an evaluation: the weights belong to the model",
     "override data.*, eval.*, run.*, train.precision, train.strategy, train.offload or train.deterministic"),
    (["blobs-1", "train.steps=3"], "`train.steps` cannot be overridden in an evaluation: nothing is trained", "override data"),
    (["blobs-1", "init.source=x"], "`init.source` cannot be overridden in an evaluation: the weights are the run's own",
     "override data"),
    (["blobs-1", "name=x"], "`name` cannot be overridden in an evaluation", "override data"),
    (["blobs-1", "eval.bach_size=3"], "`eval.bach_size` is not a key of this spec", "did you mean `eval.batch_size`?"),
    (["script-1"], "run script-1 has no checkpoints: scripts and searches save", "give the path of a safetensors file"),
    (["blobs-1", "--time", "4h"], "`--time` is for SLURM", "add --slurm"),
])
def test_a_wrong_evaluation_is_refused_and_nothing_is_written(paths, root, capsys, words, error, hint):
    script = RunPaths(root / "script-1")
    shutil.copytree(paths.root, script.root)
    script.spec.write_text("name: x\nscript: /x.py\n")
    assert main(["eval", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {error}") and f"hint: {hint}" in err and len(err.splitlines()) == 2
    assert not paths.evaluations.exists()
