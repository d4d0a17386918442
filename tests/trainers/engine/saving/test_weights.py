"""Initial weights by name, from checkpoints and safetensors files, under every strategy.

This file is also the program of two real ranks: see "on the ranks".
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from trainers.config import schema
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths
from trainers.engine.parallel.fragments import Fragment, buffers
from trainers.engine.saving.checkpoint import Checkpoints
from trainers.engine.saving.weights import Files, layout, load_weights, open_source
from trainers.engine.world import World

SENTENCES = Path(__file__).parents[3] / "sentences"
ONE = World(0, 1, 0, 1, torch.device("cpu"))
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")


class Tied(nn.Module):
    """A model with an embedding that is also the output's weight, a frozen layer, and buffers."""

    def __init__(self, classes: int = 3, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(7, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4).requires_grad_(False))
        self.head = nn.Linear(4, classes)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.words.weight
        self.register_buffer("places", torch.arange(5) + seed)


def whole(models: dict[str, nn.Module]) -> dict[str, Fragment]:
    return {f"models/{name}/{key}": Fragment.whole(tensor) for name, model in models.items()
            for key, tensor in {**dict(model.named_parameters()), **buffers(model)}.items()}


def save(root: Path, models: dict[str, nn.Module], step: int = 3) -> Path:
    """Write a checkpoint of these models and of a state of an optimizer."""
    checkpoints = Checkpoints(RunPaths(root), ONE, schema.Checkpoint(keep_last=9), strategy="ddp", attempt=None,
                              emit=lambda event: None, on_commit=lambda step: None)
    more = {"optim/model/head.weight/exp_avg": Fragment.whole(torch.ones(3, 4))}
    checkpoints.save(step, {**whole(models), **more}, {"step": step})
    assert checkpoints.wait() is None
    checkpoints.close()
    return RunPaths(root).checkpoint(step)


def load(path: Path, models: dict[str, nn.Module], *skip: str) -> str:
    return load_weights(open_source(path, ONE), layout(models), whole(models), skip, "it")


def refused(path: Path, models: dict[str, nn.Module], *skip: str) -> str:
    before = {name: [value.clone() for value in model.state_dict().values()] for name, model in models.items()}
    with pytest.raises(UserError) as caught:
        load(path, models, *skip)
    for name, model in models.items():  # no tensor has changed
        assert all(map(torch.equal, before[name], model.state_dict().values()))
    assert len(str(caught.value).splitlines()) == 2
    return str(caught.value)


def same(one: nn.Module, other: nn.Module, *without: str) -> bool:
    """Return whether two models have the same tensors, except those whose names start with one of `without`."""
    values = other.state_dict()
    return all(torch.equal(value, values[name]) for name, value in one.state_dict().items()
               if not name.startswith(without or ("-",)))


@pytest.mark.parametrize("kind", ["checkpoint", "file", "folder", "sharded folder"])
def test_all_tensors_of_a_model_are_loaded_from_every_kind_of_source(tmp_path, kind):
    source, model = Tied(seed=1), Tied(seed=2)
    state = {name: value.contiguous() for name, value in source.state_dict().items() if name != "out.weight"}
    path = tmp_path / "weights"
    if kind == "checkpoint":
        path = save(tmp_path, {"other name": source})
    elif kind == "file":
        save_file(state, path)
    else:
        path.mkdir()
        first = {name: value for name, value in state.items() if name.startswith("inner")}
        save_file(first, path / "model-1-of-2.safetensors")
        save_file({name: value for name, value in state.items() if name not in first}, path / "model-2-of-2.safetensors")
        if kind == "sharded folder":
            save_file(state, path / "consolidated.safetensors")  # the index does not name this file
            weight_map = {name: f"model-{1 if name in first else 2}-of-2.safetensors" for name in state}
            (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert not same(model, source)
    message = load(path, {"model": model})
    assert same(model, source) and model.out.weight is model.words.weight
    assert message == f"weights of it: {len(state)} tensors loaded"


def test_a_tied_tensor_may_have_either_name_and_both_must_be_equal(tmp_path):
    source, model = Tied(seed=1), Tied(seed=2)
    state = {name: value.clone() for name, value in source.state_dict().items()}
    save_file({name: value for name, value in state.items() if name != "words.weight"}, tmp_path / "out.safetensors")
    load(tmp_path / "out.safetensors", {"model": model})
    assert same(model, source)
    save_file(state, tmp_path / "both.safetensors")
    load(tmp_path / "both.safetensors", {"model": Tied(seed=3)})
    save_file({**state, "out.weight": state["out.weight"] + 1}, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match="`words.weight` and `out.weight` are tied in the model, but differ in the weights"):
        load(tmp_path / "two.safetensors", {"model": model})
    load(tmp_path / "two.safetensors", {"model": model}, "out")
    assert same(model, source)


def test_weights_that_do_not_fit_are_refused_and_may_be_skipped(tmp_path):
    path = save(tmp_path, {"model": Tied(seed=1)})
    model = Tied(classes=5, seed=2)
    assert refused(path, {"model": model}) == (
        "error: the weights of it do not fit the model: `head.weight` is [3, 4], not [5, 4], `head.bias` is [3], not [5]\n"
        "hint: use init.skip=[head] to leave these out: the model keeps its initial values there")
    message = load(path, {"model": model}, "head")
    assert "not loaded because of init.skip: `head.weight`, `head.bias`" in message
    assert "ignored because of init.skip: `head.bias`, `head.weight`" in message
    assert same(model, Tied(seed=1), "head") and same(model, Tied(classes=5, seed=2), "words", "inner", "out", "places")

    model.more = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    error = refused(path, {"model": model}, "head")
    assert "`more.0.weight` is missing" in error and "init.skip=[head,more]" in error
    del model.more, model.head
    assert "`head.bias` is not in the model" in refused(path, {"model": model})
    assert "did you mean `head`?" in refused(path, {"model": model}, "haed")
    assert "check that these weights belong to this model" in refused(path, {"model": nn.Linear(2, 2)})


def test_tensors_of_several_models_have_the_names_of_the_models_in_front(tmp_path):
    models = {"critic": nn.Linear(3, 2), "generator": nn.Linear(2, 3)}
    path = save(tmp_path, models)
    others = {"critic": nn.Linear(3, 2), "generator": nn.Linear(2, 3)}
    load(path, others)
    assert all(same(others[name], models[name]) for name in models)
    save_file({f"critic.{name}": value for name, value in models["critic"].state_dict().items()}, tmp_path / "one.safetensors")
    others = {"critic": nn.Linear(3, 2), "generator": nn.Linear(2, 3)}
    assert "init.skip=[generator]" in refused(tmp_path / "one.safetensors", others)
    load(tmp_path / "one.safetensors", others, "generator")
    assert same(others["critic"], models["critic"])


def test_other_precisions_are_converted_and_quantized_ones_refused(tmp_path):
    model = nn.Linear(3, 2)
    save_file({"weight": torch.ones(2, 3).half(), "bias": torch.ones(2).bfloat16()}, tmp_path / "half.safetensors")
    load(tmp_path / "half.safetensors", {"model": model})
    assert model.weight.dtype == torch.float32 and model.weight.sum() == 6
    save_file({"weight": torch.ones(2, 3).char(), "bias": torch.ones(2)}, tmp_path / "int8.safetensors")
    assert "`weight` is quantized (I8)" in refused(tmp_path / "int8.safetensors", {"model": model})


def test_any_range_of_a_tensor_can_be_read(tmp_path):
    tensors = {"a": torch.randn(5, 3, 2), "b": torch.randn(7), "c": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "x.safetensors")
    source = Files(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        for start in range(len(flat)):
            for count in range(1, len(flat) - start + 1):
                assert torch.equal(source.read(name, start, count), flat[start:start + count])


def test_a_broken_or_missing_source_is_an_error(tmp_path):
    path = save(tmp_path, {"model": Tied()})
    victim = path / "0.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(UserError, match="is broken: 0.safetensors has changed since it was written"):
        open_source(path, ONE)
    with pytest.raises(UserError, match="does not exist any more"):
        open_source(tmp_path / "gone", ONE)
    (tmp_path / "text.safetensors").write_text("weights")
    with pytest.raises(UserError, match="cannot be read"):
        open_source(tmp_path / "text.safetensors", ONE)
    (tmp_path / "twice").mkdir()
    for name in "ab":
        save_file({"weight": torch.ones(2)}, tmp_path / f"twice/{name}.safetensors")
    with pytest.raises(UserError, match="`weight` is in several files"):
        open_source(tmp_path / "twice", ONE)


def test_weights_kept_in_the_run_directory_come_first(tmp_path):
    paths = RunPaths(tmp_path / "run")
    assert paths.first_weights("/elsewhere/step_3") == Path("/elsewhere/step_3")
    (paths.init / "step_3").mkdir(parents=True)
    assert paths.first_weights("/elsewhere/step_3") == paths.init / "step_3"


# ---- on the ranks


@pytest.mark.slow
def test_two_ranks_of_every_strategy_load_the_same_weights_and_evaluate_to_the_same_loss(tmp_path):
    """Each strategy evaluates the weights twice: loaded as for training, and loaded as for an evaluation without training."""
    sys.path.append(str(SENTENCES))
    try:
        from sentences import Model
    finally:
        sys.path.remove(str(SENTENCES))
    torch.manual_seed(5)
    path = save(tmp_path, {"model": Model()})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(SENTENCES)]), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
              "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [subprocess.Popen([sys.executable, __file__, str(path)], env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                              stdout=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        outputs = [rank.communicate(timeout=500)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    first, second = (json.loads(text.splitlines()[-1]) for text in outputs)
    assert first == second
    for precision in ("fp32", "bf16"):
        for strategy in STRATEGIES:
            in_training, without_training = first[f"{strategy} {precision}"]
            assert in_training == without_training, (strategy, precision)
            assert in_training == pytest.approx(first[f"ddp {precision}"][0], rel=1e-5 if precision == "fp32" else 1e-2)


def measure(path: Path) -> dict[str, list[float]]:
    """Return {"STRATEGY PRECISION": [loss as loaded for training, loss as loaded without training]}."""
    from sentences import Counting

    from trainers.engine.evaluate_only import placed
    from trainers.engine.evaluation import evaluate
    from trainers.engine.groups import grouped
    from trainers.engine.setup import set_up

    world, losses = World.from_env(), {}
    for precision in ("fp32", "bf16"):
        for strategy in STRATEGIES:
            config = schema.RunConfig(name="x", task="sentences:Counting", init=schema.Init(source=str(path)),
                                      train=schema.Train(steps=5, batch_size=8, strategy=strategy, precision=precision))
            task, optim, pair = Counting(config), config.optim, []
            for training in (True, False):
                setup = set_up(task, config, world, config if training else placed(config))
                model = setup.models["model"]
                sharded = setup.strategy.shard(model, optim, grouped(model, optim, ())) if training else None
                load_weights(open_source(path, world), setup.layout, setup.strategy.fragments(setup.models), (), "it")
                if sharded:
                    sharded.after_fill()
                pair.append(evaluate(task, setup.models, setup.eval_set, config, world, setup.stopping)["loss"].item())
                setup.stopping.close()
            losses[f"{strategy} {precision}"] = pair
    return losses


if __name__ == "__main__":
    results = measure(Path(sys.argv[1]))
    print(json.dumps(results), flush=True)
    os._exit(0)
