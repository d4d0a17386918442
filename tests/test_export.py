"""Export models of real runs with several ranks, and load them as a user would."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import record
from safetensors.torch import load_file

from trainers.config.spec import read_spec
from trainers.engine.world import World

TINY = Path(__file__).parent / "tinybert"


@pytest.mark.slow
@pytest.mark.parametrize("spec, strategy, ranks, averaged", [
    ("classify", "zero3", 2, False), ("classify", "fsdp", 2, True), ("fill", "ddp", 1, True), ("fill", "zero3", 2, True),
    ("fill", "fsdp", 2, False)])
def test_an_exported_model_computes_the_same_as_the_evaluated_model(launch, monkeypatch, spec, strategy, ranks, averaged):
    done = launch(TINY / f"{spec}.yaml", "--procs", ranks, "--strategy", strategy, *(["train.ema=0.9"] if averaged else []))
    assert done.returncode == 0, done.stderr
    run = launch.run()
    plain = launch("export", run.name, "-o", "model.safetensors")
    folder = launch("export", run.name, "--to", "huggingface", "-o", "hf")
    assert plain.returncode == folder.returncode == 0, plain.stderr + folder.stderr

    monkeypatch.syspath_prepend(TINY)
    import tinybert
    from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

    task = {"classify": tinybert.Classify, "fill": tinybert.Fill}[spec](read_spec(run / "run.yaml"))
    model = task.model()
    model.load_state_dict(load_file(launch.folder / "model.safetensors"), strict=True)  # checks all names, tied weights too
    auto = AutoModelForSequenceClassification if spec == "classify" else AutoModelForMaskedLM
    loaded, report = auto.from_pretrained(launch.folder / "hf", output_loading_info=True)
    assert type(loaded) is type(model) and not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert spec == "fill" or loaded.config.id2label == {0: "few", 1: "many"}
    assert len((launch.folder / "hf/vocab.txt").read_text().split()) == 30
    assert json.loads((launch.folder / "hf/config.json").read_text())["architectures"] == [type(model).__name__]
    words = task.data(World(0, 1, 0, 1, torch.device("cpu")))[1].words
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=words).logits, model.eval()(input_ids=words).logits)
        total, count = task.loss(loaded, words)
    assert total.item() / count == pytest.approx(record(run)["metrics"]["loss"], rel=1e-5)
    sys.modules.pop("tinybert")
