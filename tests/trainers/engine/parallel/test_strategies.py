"""Every strategy trains the same run: it has the same losses, and continues from the checkpoints of every other strategy, on
any number of ranks. This file is also the program of its ranks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from ranks import serve

SENTENCES = Path(__file__).parents[3] / "sentences"
SHARDED = ("zero1", "zero2", "zero3", "fsdp")
# Five parameter groups, some smaller than a rank's share, and averaged weights.
GROUPS = {"train.ema": 0.9, "optim.decay_norms_and_biases": False,
          "optim.groups": [{"match": "out", "lr_scale": 0.5, "weight_decay": 0.1}, {"match": "norm.bias", "betas": [0.8, 0.99]},
                           {"match": "*.inner", "lr_scale": 2.0}]}
STRATEGIES = ("ddp", *SHARDED)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def furthest(one: list[dict], other: list[dict], *keys: str) -> float:
    """Return the largest difference between two runs' values of `keys`; by default of the losses in training and evaluation."""
    assert [row["step"] for row in one] == [row["step"] for row in other] and one
    return max(abs(a[key] - b[key]) for a, b in zip(one, other) for key in keys or ("loss", "eval loss") if key in a)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("size", [2, 4])
def test_all_strategies_have_the_same_losses(ranks, tmp_path, size, accumulation):
    keys = {"train.micro_batch_size": 48 // size // accumulation}
    rows = {name: ranks(size)("trained", root=tmp_path / name, keys={"train.strategy": name, **keys})[0] for name in STRATEGIES}
    assert rows["ddp"][-1]["loss"] < 0.85 * rows["ddp"][0]["loss"]  # the run learns; otherwise equal losses would prove little
    for name in SHARDED:
        difference, norms = furthest(rows["ddp"], rows[name]), furthest(rows["ddp"], rows[name], "grad_norm")
        print(f"{size} ranks, accumulation {accumulation}, fp32: {name} against ddp: losses within {difference:.1e}, "
              f"gradient norms within {norms:.1e}")
        assert difference < 1e-5 and norms < 1e-4


@pytest.mark.parametrize("precision, bound", [("bf16", 2e-2), ("fp16", 0.1)])
def test_half_precision_stays_near_fp32(ranks, tmp_path, precision, bound):
    whole = ranks(2)("trained", root=tmp_path / "fp32", keys={})[0]
    for name in STRATEGIES:
        keys = {"train.strategy": name, "train.precision": precision, "train.micro_batch_size": 6}
        rows = ranks(2)("trained", root=tmp_path / name, keys=keys)[0]
        difference = furthest(whole, rows)
        print(f"2 ranks, {precision}: {name} against fp32 ddp: losses within {difference:.1e}")
        assert 0 < difference < bound  # (fp16 skipped two steps)


def test_any_strategy_continues_from_the_checkpoint_of_any_other(ranks, tmp_path):
    """Every strategy continues the checkpoint of every strategy, on another number of ranks."""
    sizes = {"ddp": (4, 2), "zero1": (2, 3), "zero2": (1, 4), "zero3": (4, 2), "fsdp": (3, 1)}
    averaged = {"train.steps": 40, **GROUPS}
    whole = ranks(4)("trained", root=tmp_path / "whole", keys=averaged)[0]
    raw = ranks(4)("trained", root=tmp_path / "raw", keys={**averaged, "train.ema": None})[0]
    assert furthest(whole, raw, "loss") == 0 and furthest(whole, raw, "eval loss") > 1e-3  # evaluations use the average
    table = {}
    for first in STRATEGIES:
        root = tmp_path / first
        size = sizes[first][0]
        ranks(size)("trained", root=root, keys={"train.strategy": first, **averaged}, until=10)
        for second in STRATEGIES:
            onward = root.with_name(f"{first}-{second}")
            copy(root, onward)
            size_then = sizes[second][1]
            keys = {"train.strategy": second, **averaged}
            rows = ranks(size_then)("trained", root=onward, keys=keys)[0]
            table[first, second] = furthest(whole, rows)
            print(f"{first} on {size} rank(s) -> {second} on {size_then}: 30 steps within {table[first, second]:.1e}")
    assert max(table.values()) < 1e-5


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("change", [(4, 2), (2, 3), (1, 4)])
def test_a_run_continues_on_another_number_of_ranks(ranks, tmp_path, name, change):
    keys = {"train.strategy": name, "train.steps": 40}
    ranks(change[0])("trained", root=tmp_path / "run", keys=keys, until=10)
    rows = ranks(change[1])("trained", root=tmp_path / "run", keys=keys)[0]
    whole = ranks(change[1])("trained", root=tmp_path / "whole", keys={"train.steps": 40})[0]
    difference = furthest(whole, rows)
    print(f"{name}, {change[0]} rank(s) -> {change[1]}: 30 steps within {difference:.1e}")
    assert difference < 1e-5


@pytest.mark.parametrize("name", SHARDED)
def test_four_ranks_resume_to_the_bit(ranks, tmp_path, name):
    for precision in ("fp32", "fp16"):
        keys = {"train.strategy": name, "train.micro_batch_size": 3, "model": {"dropout": 0.1}, "train.precision": precision,
                **GROUPS}
        whole = ranks(4)("trained", root=tmp_path / f"{precision} whole", keys=keys)[0]
        ranks(4)("trained", root=tmp_path / precision, keys=keys, until=13)
        assert ranks(4)("trained", root=tmp_path / precision, keys=keys)[0] == whole


@pytest.mark.parametrize("name", STRATEGIES)
def test_more_settings_change_no_loss(ranks, tmp_path, name):
    """Recomputed activations, states in host memory, DeepSpeed's own keys, compilation; each with parameter groups and averaged
    weights."""
    more = [{"train.checkpoint_activations": True}]
    more += {"zero1": [{"train.offload": "optimizer"}], "zero2": [{"train.offload": "optimizer"}],
             "zero3": [{"train.offload": "parameters"}], "fsdp": [{"train.offload": "parameters"}, {"train.compile": True}],
             "ddp": [{"train.compile": True}]}[name]
    if name.startswith("zero"):
        more += [{"train.deepspeed": {"zero_optimization": {"reduce_bucket_size": 5000, "overlap_comm": True}}}]
    plain = ranks(2)("trained", root=tmp_path / "plain", keys={"train.strategy": name, **GROUPS})[0]
    for number, keys in enumerate(more):
        rows = ranks(2)("trained", root=tmp_path / str(number), keys={"train.strategy": name, **GROUPS, **keys})[0]
        assert furthest(plain, rows) < 1e-5, keys


def test_parameter_groups_are_the_same_under_every_strategy(ranks, tmp_path):
    """Strategies change the classes of modules and flatten parameters."""
    keys = {"optim.layer_decay": 0.5, "optim.decay_norms_and_biases": False}
    found = [ranks(2)("groups", root=tmp_path / name, keys={"train.strategy": name, **keys})[0] for name in STRATEGIES]
    print(found[0])
    assert found[0] == (
        "928 in 2 tensors (lr x0.125, weight_decay 0.01), 416 in 8 tensors (lr x0.25, weight_decay 0.0), "
        "12,288 in 4 tensors (lr x0.25, weight_decay 0.01), 416 in 8 tensors (lr x0.5, weight_decay 0.0), "
        "12,288 in 4 tensors (lr x0.5, weight_decay 0.01), 64 in 2 tensors (lr x1, weight_decay 0.0), "
        "544 in 1 tensors (lr x1, weight_decay 0.01)")
    assert found == [found[0]] * 5


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_gradient_that_is_not_finite_is_named_with_its_step(ranks, tmp_path, name):
    from trainers.engine.batches.sampling import Shuffled

    order = Shuffled(500, 48, 0, "model")
    row = int(order.shares(7, 0, 1)[0].indices[-1])  # it is in the batch of step 8, and in no other of these ten steps
    keys = {"train.strategy": name, "model": {"bad_row": row}, "log.every": 100, "eval.every": 9, "checkpoint.every": 5}
    messages = ranks(2)("error_of", root=tmp_path / "run", keys=keys)
    print(f"{name}: {messages[0]}")
    assert messages[0] == messages[1]
    assert "update `model`, step 8: the gradient of `words.weight` is not finite" in messages[0]
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["step_5"]
    assert '"eval"' not in (tmp_path / "run/metrics.jsonl").read_text()  # and nothing is evaluated afterwards


def test_steps_that_fp16_skips_do_not_advance_the_schedule(ranks, tmp_path):
    for name in STRATEGIES:
        keys = {"train.strategy": name, "train.precision": "fp16", "model": {"big_steps": [4, 5]}, "train.steps": 12}
        rows = ranks(2)("trained", root=tmp_path / name, keys=keys)[0]
        rates = [row["lr"] for row in rows]
        assert rates[3] == rates[4] == rates[5] and rates[2] != rates[3] and rates[5] != rates[6], name
        assert [row.get("skipped", 0) for row in rows] == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 2, 2], name


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_state_of_a_tasks_own_resumes_to_the_bit(ranks, tmp_path, name):
    """With three ranks, backwards that are discarded run before the first step. They must not change the queue."""
    keys = {"train.strategy": name, "train.micro_batch_size": 8, "train.steps": 12, "task": "sentences:Queued"}
    whole = ranks(3)("trained", root=tmp_path / "whole", keys=keys)[0]
    plain = ranks(3)("trained", root=tmp_path / "plain", keys={**keys, "task": "sentences:Counting"})[0]
    assert furthest(whole, plain, "loss") > 1e-3  # the queue has an effect
    ranks(3)("trained", root=tmp_path / "run", keys=keys, until=5)
    assert ranks(3)("trained", root=tmp_path / "run", keys=keys)[0] == whole


def test_a_state_that_differs_between_ranks_is_an_error(ranks, tmp_path):
    keys = {"task": "sentences:Queued", "model": {"apart": True}, "train.steps": 2}
    messages = ranks(2)("error_of", root=tmp_path / "run", keys=keys)
    assert messages[0] == messages[1] and "the task's `state` gives another `queue` on rank 1 than on rank 0" in messages[0]


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_best_checkpoint_is_scored_at_the_end(ranks, tmp_path, name):
    """The test set is the evaluation set again. The best checkpoint is the first one, so another one's weights are loaded."""
    for keys in ({}, GROUPS):
        keys = {"train.strategy": name, "checkpoint.metric": "loss", "checkpoint.mode": "max", **keys}
        evaluations, test = ranks(2)("scored", root=tmp_path / f"{len(keys)}", keys=keys)[0]
        assert list(evaluations) == ["15", "30"] and evaluations["15"] != evaluations["30"]
        assert (test["step"], test["checkpoint"], test["loss"]) == (30, 15, evaluations["15"])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cifar10_trains_under_every_strategy(ranks, tmp_path, precision):
    """The model has convolutions and BatchNorm, and no repeated blocks."""
    losses = {name: ranks(2)("cifar10", root=tmp_path / name, strategy=name, precision=precision)[0] for name in STRATEGIES}
    for name in SHARDED:
        differences = [abs(a - b) for a, b in zip(losses["ddp"], losses[name], strict=True)]
        assert len(differences) == 4 and max(differences) < (1e-5 if precision == "fp32" else 0.1), (name, differences)


def test_synchronized_batchnorm_computes_the_same_on_any_number_of_ranks(ranks, tmp_path):
    """One rank sees the whole batch, and half of a batch has other statistics. Only the first steps are compared: this deep
    network makes rounding a thousand times larger in each step."""
    whole = ranks(1)("cifar10", root=tmp_path / "whole", strategy="ddp", precision="fp32")[0]
    apart = ranks(2)("cifar10", root=tmp_path / "apart", strategy="ddp", precision="fp32")[0]
    assert min(abs(a - b) for a, b in zip(whole[:2], apart)) > 1e-4
    for name in STRATEGIES:
        losses = ranks(2)("cifar10", root=tmp_path / name, strategy=name, precision="fp32", synchronized=True)[0]
        differences = [abs(a - b) for a, b in zip(whole, losses, strict=True)]
        print(f"{name}: {differences}")
        assert max(differences[:2]) < 1e-5, name


def test_weights_in_another_memory_order_train_resume_and_are_saved_as_usual(ranks, tmp_path):
    """GPUs get the weights of convolutions in the order `channels_last`. Here CPU ranks get them too."""
    plain = ranks(2)("cifar10", root=tmp_path / "plain", strategy="ddp", precision="fp32")[0]
    other = {"strategy": "ddp", "precision": "fp32", "channels_last": True}
    whole = ranks(2)("cifar10", root=tmp_path / "whole", **other)[0]
    assert max(abs(a - b) for a, b in zip(plain, whole, strict=True)) < 1e-5
    ranks(2)("cifar10", root=tmp_path / "apart", until=2, **other)
    copy(tmp_path / "apart", tmp_path / "onward")
    assert ranks(2)("cifar10", root=tmp_path / "apart", **other)[0] == whole
    usual = ranks(2)("cifar10", root=tmp_path / "onward", strategy="fsdp", precision="fp32")[0]
    assert max(abs(a - b) for a, b in zip(plain, usual, strict=True)) < 1e-5


def copy(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target)


# ---- on the ranks


def settings(keys):
    from trainers.config.schema import RunConfig

    values = {
        "name": "sentences", "task": "sentences:Counting", "model": {},
        "train": {"steps": 30, "batch_size": 48}, "log": {"every": 1}, "eval": {"every": 15}, "checkpoint": {"every": "never"},
        "optim": {"name": "adamw", "lr": 1e-2, "schedule": "cosine", "warmup": 3, "clip_norm": 1.0, "weight_decay": 0.01},
    }
    for key, value in keys.items():
        place = values
        *path, last = key.split(".")
        for word in path:
            place = place.setdefault(word, {})
        place[last] = value
    return RunConfig.model_validate(values)


def loop_of(world, root, keys):
    import sentences

    from trainers.contract.paths import RunPaths
    from trainers.engine import loop

    loop.close_process_group = lambda: None  # the process group serves the next call too
    config = settings(keys)
    Path(root).mkdir(parents=True, exist_ok=True)
    task = getattr(sentences, config.task.partition(":")[2])(config)
    return loop.Loop(task, config, world, RunPaths(Path(root)), None)


def trained(world, root, keys, until=None):
    """Return the training rows of a run that continues to its end, or is asked to stop at step `until`. A row has the loss of
    the evaluation of its step too."""
    loop = loop_of(world, root, keys)
    if until is not None:
        loop.stopping.at_boundary = lambda: loop.step >= until
    code = loop.run()
    assert code == (0 if until is None else 75)
    rows = [json.loads(line) for line in (Path(root) / "metrics.jsonl").read_text().splitlines()]
    evaluated = {row["step"]: {"eval loss": row["loss"]} for row in rows if row["split"] == "eval"}
    names = ("step", "loss", "grad_norm", "lr", "skipped")
    return [{name: row[name] for name in names if name in row} | evaluated.get(row["step"], {})
            for row in rows if row["split"] == "train"]


def scored(world, root, keys):
    """Return the losses of the evaluations of a run by step, and the row of its test."""
    sys.path.append(str(SENTENCES))
    from sentences import Counting, Sentences

    Counting.test_set = lambda self, world: Sentences(67, 2, world.device)
    try:
        assert loop_of(world, root, keys).run() == 0
    finally:
        del Counting.test_set
    rows = [json.loads(line) for line in (Path(root) / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["split"] == "eval"}, rows[-1]


def groups(world, root, keys):
    """Return the parameter groups of a model that names its blocks by their class, as transformers' models do."""
    from sentences import Model

    from trainers.engine.groups import described

    Model._no_split_modules = ["Block"]
    try:
        loop = loop_of(world, root, keys)
    finally:
        del Model._no_split_modules
    loop.stopping.close()
    loop.checkpoints.close()
    return described(loop.runners[0].groups)


def cifar10(world, root, strategy, precision, synchronized=False, channels_last=False, until=None):
    from launch.cluster.config import load_cluster
    from launch.plan.spec import load_spec
    from trainers.cifar10.task import Cifar10
    from trainers.contract.paths import RunPaths
    from trainers.engine import loop
    from trainers.engine.parallel import ddp

    keys = ["data=sample", "model.width=0.1", "train.steps=4", "train.batch_size=16", "log.every=1", "eval.every=never",
            f"train.strategy={strategy}", f"train.precision={precision}", f"train.sync_batchnorm={str(synchronized).lower()}"]
    loop.close_process_group = lambda: None
    config = load_spec("cifar10", keys, cluster=load_cluster("local"), environment={}).config
    Path(root).mkdir(parents=True, exist_ok=True)
    place = ddp.Ddp.place
    if channels_last:
        ddp.Ddp.place = lambda self, model: ddp.channels_last(place(self, model))
    try:
        run = loop.Loop(Cifar10(config), config, world, RunPaths(Path(root)), None)
    finally:
        ddp.Ddp.place = place
    orders = {p.is_contiguous() for model in run.models.values() for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1}
    assert orders == {not channels_last} or strategy == "zero3" and not orders  # parameters of zero3 are flat
    if until is not None:
        run.stopping.at_boundary = lambda: run.step >= until
    assert run.run() == (0 if until is None else 75)
    return [json.loads(line)["loss"] for line in (Path(root) / "metrics.jsonl").read_text().splitlines() if "train" in line]


def error_of(world, root, keys):
    from trainers.contract.errors import UserError

    loop = loop_of(world, root, keys)
    with pytest.raises(UserError) as error:
        loop.run()
    loop.checkpoints.close()
    return str(error.value)


if __name__ == "__main__":
    sys.path.append(str(SENTENCES))
    serve(globals())
