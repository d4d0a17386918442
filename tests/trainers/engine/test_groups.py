"""Which parameters share settings of the optimizer, on one rank."""

from __future__ import annotations

import pytest
import torch
from saving import ONE
from torch import nn

from trainers.config.schema import Group, Optim, RunConfig
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths
from trainers.engine.groups import described, grouped, groups_of, layer_scales, norms_and_biases
from trainers.engine.loop import Loop
from trainers.engine.task import Loss, Task, Update


class RMSNorm(nn.Module):  # as in transformers: of no class of torch's
    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.scale


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList(nn.Sequential(RMSNorm(4), nn.Linear(4, 4)) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 8, bias=False)
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, rows):
        x = self.words(rows)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


class Words:
    def __len__(self):
        return 32

    def batch(self, share):
        return torch.from_numpy(share.indices % 8)


class Next(Task):
    own = ()

    def data(self, world):
        return Words(), None

    def model(self):
        return Model()

    def loss(self, model, batch):
        return Loss(nn.functional.cross_entropy(model(batch), (batch + 1) % 8, reduction="sum"), len(batch))

    def groups(self, update, model):
        assert isinstance(update, Update) and isinstance(model, nn.Module)
        return self.own


def loop_of(root, task=Next, **optim) -> Loop:
    config = RunConfig.model_validate({"name": "x", "task": "x:X", "train": {"steps": 4, "batch_size": 8}, "log": {"every": 1},
                                       "optim": optim})
    root.mkdir(exist_ok=True)
    return Loop(task(config), config, ONE, RunPaths(root), None)


def sizes(optim: Optim) -> list[tuple]:
    return [(group.size, len(group.names), group.lr_scale, group.options["weight_decay"])
            for group in grouped(Model(), optim, optim.groups)]


def test_norms_and_biases_are_told_by_type_and_name():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)
            self.recurrent = nn.LSTM(4, 4)
            self.convolution, self.batch = nn.Conv2d(1, 4, 1, bias=False), nn.BatchNorm2d(4)
            self.position_bias = nn.Embedding(3, 1)
            self.gain = nn.Parameter(torch.ones(4))  # one dimension, but neither a norm's nor a bias

    assert norms_and_biases(Odd()) == {
        "attention.in_proj_bias", "attention.out_proj.bias", "recurrent.bias_ih_l0", "recurrent.bias_hh_l0", "batch.weight",
        "batch.bias"}
    assert norms_and_biases(Model()) == {"norm.weight", "norm.bias", *(f"blocks.{n}.0.scale" for n in range(3)),
                                         *(f"blocks.{n}.1.bias" for n in range(3))}


def test_equal_settings_are_one_group_and_the_first_match_counts():
    assert sizes(Optim(weight_decay=0.1)) == [(144, 13, 1.0, 0.1)]  # without the frozen parameter
    assert sizes(Optim(weight_decay=0.1, decay_norms_and_biases=False)) == [(112, 5, 1.0, 0.1), (32, 8, 1.0, 0.0)]
    groups = [Group(match=["head", "words"], lr_scale=0.5), Group(match="blocks.*.weight", weight_decay=0.0),
              Group(match="*", lr_scale=2.0)]
    assert sizes(Optim(weight_decay=0.1, groups=groups)) == [(64, 2, 0.5, 0.1), (32, 8, 2.0, 0.1), (48, 3, 1.0, 0.0)]
    # A group's own weight decay counts also for norms and biases.
    optim = Optim(weight_decay=0.1, decay_norms_and_biases=False, groups=[Group(match="norm", weight_decay=0.3)])
    assert sizes(optim) == [(112, 5, 1.0, 0.1), (24, 6, 1.0, 0.0), (8, 2, 1.0, 0.3)]
    assert described(grouped(Model(), optim, optim.groups)) == (
        "112 in 5 tensors (weight_decay 0.1), 24 in 6 tensors (weight_decay 0.0), 8 in 2 tensors (weight_decay 0.3)")


def test_layer_decay_is_that_of_electra_and_beit():
    scales = layer_scales(Model(), 0.5)
    expected = {"words.weight": 0.5**4, "blocks.0.1.weight": 0.5**3, "blocks.2.0.scale": 0.5, "norm.bias": 1, "head.weight": 1}
    assert {name: scales[name] for name in expected} == expected
    optim = Optim(layer_decay=0.5, groups=[Group(match="head", lr_scale=3.0)])
    assert [group.lr_scale for group in grouped(Model(), optim, optim.groups)] == [0.0625, 0.125, 0.25, 0.5, 1.0, 3.0]
    with pytest.raises(UserError, match="`optim.layer_decay` is set, but the model has no blocks"):
        grouped(nn.Linear(2, 2), optim, ())


def test_steps_are_those_of_torchs_optimizer_with_the_same_groups(tmp_path, capsys):
    loop = loop_of(tmp_path / "run", name="adamw", lr=0.1, weight_decay=0.2, decay_norms_and_biases=False, layer_decay=0.9,
                   schedule="linear", clip_norm=0.5,
                   groups=[{"match": "head", "lr_scale": 2.0, "betas": [0.5, 0.9], "eps": 1e-3}])
    torch.manual_seed(0)
    plain = Model()
    plain.load_state_dict(loop.models["model"].state_dict())
    level = {"words": 4, "blocks.0": 3, "blocks.1": 2, "blocks.2": 1, "norm": 0, "head": 0}
    groups = []
    for name, parameter in plain.named_parameters():
        if name != "frozen":
            own = next(key for key in level if name.startswith(key))
            still = "norm" in name or "scale" in name or "bias" in name
            groups.append({"params": [parameter], "weight_decay": 0.0 if still else 0.2, "scale": 0.9 ** level[own],
                           **({"scale": 2.0, "betas": (0.5, 0.9), "eps": 1e-3} if own == "head" else {})})
    adamw = torch.optim.AdamW(groups, lr=0.1)
    assert loop.run() == 0
    for draw in range(4):
        for group in adamw.param_groups:
            group["lr"] = group["scale"] * 0.1 * (1 - draw / 4)
        adamw.zero_grad()
        (share,) = loop.runners[0].samples.shares(draw, 0, 1)
        loss = Next.loss(None, plain, Words().batch(share))
        (loss.sum / loss.count).backward()
        torch.nn.utils.clip_grad_norm_([p for p in plain.parameters() if p.grad is not None], 0.5)
        adamw.step()
    for (name, ours), theirs in zip(loop.models["model"].named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text: f"{name}: {text}")
    assert loop.runners[0].lr == pytest.approx(0.025)  # the log shows the rate before the factors of groups
    assert "parameter groups of update `model`: 32 in 1 tensors (lr x0.6561, weight_decay 0.2, betas [0.9, 0.999]" in \
        capsys.readouterr().out


def test_sgd_has_momentum_by_group(tmp_path):
    loop = loop_of(tmp_path, name="sgd", lr=0.1, momentum=0.9, groups=[{"match": "head", "momentum": 0.0}])
    found = {len(group["params"]): group["momentum"] for group in loop.runners[0].sharded.optimizer.param_groups}
    assert found == {12: 0.9, 1: 0.0} and loop.run() == 0


def test_the_users_groups_come_before_the_tasks(tmp_path):
    class Own(Next):
        own = (Group(match="blocks", lr_scale=0.1), Group(match="head", lr_scale=5.0))

    loop = loop_of(tmp_path, Own, groups=[{"match": "head", "lr_scale": 3.0}])
    assert [(group.lr_scale, len(group.names)) for group in loop.runners[0].groups] == [(1.0, 3), (0.1, 9), (3.0, 1)]
    Own.own = (Group(match="encoder", lr_scale=0.1),)
    with pytest.raises(UserError, match="`groups` of the task, for update `model`, has the pattern `encoder`, which matches no"):
        loop_of(tmp_path, Own)
    Own.own = (Group(match="head", momentum=0.5),)
    with pytest.raises(UserError, match="for update `model`, sets `momentum`, which optim.name=adamw does not have"):
        loop_of(tmp_path, Own)


@pytest.mark.parametrize("groups, message", [
    ([{"match": "hed"}], "`optim.groups` has the pattern `hed`, which matches no trained parameter\n.*near names are `head`"),
    ([{"match": ["head", "q.*"]}], "the pattern `q.\\*`, which .*\n.*the parameters are `words.weight`, `blocks.0.0.scale`, "),
    ([{"match": "frozen"}], "the pattern `frozen`, which matches no trained parameter"),
    ([{"match": "h*"}, {"match": "head"}], "has the group `head`, but earlier groups match all of its parameters"),
])
def test_a_group_that_would_change_nothing_is_refused(tmp_path, groups, message):
    with pytest.raises(UserError, match=message):
        loop_of(tmp_path, groups=groups)


def test_with_several_models_names_begin_with_the_model():
    updates = [Update(name, trains=name, loss=lambda models, batch: None) for name in ("one", "two")]
    updates.append(Update("own", trains="two", loss=lambda models, batch: None, optim=Optim(groups=[Group(match="two.head")])))
    config = RunConfig.model_validate({"name": "x", "task": "x:X", "train": {"steps": 4}})
    models = {"one": Model(), "two": nn.ModuleDict({"head": nn.Linear(2, 2)})}
    optim = Optim(groups=[Group(match="one.head", lr_scale=2.0), Group(match="two.*.bias", weight_decay=0.5)])
    found = groups_of(Next(config), updates, models, optim)
    assert [[(len(group.names), group.lr_scale) for group in groups] for groups in found] == [
        [(12, 1.0), (1, 2.0)], [(1, 1.0), (1, 1.0)], [(2, 1.0)]]
    with pytest.raises(UserError, match="the pattern `head`, which matches no"):
        groups_of(Next(config), updates, models, Optim(groups=[Group(match="head")]))


@pytest.mark.parametrize("name, group, message", [
    ("sgd", {"match": "*", "betas": [0.5, 0.9]}, "optim.groups sets `betas`, which optim.name=sgd does not have"),
    ("adamw", {"match": "*", "momentum": 0.5}, "optim.groups sets `momentum`, which optim.name=adamw does not have"),
    ("adamw", {"match": []}, "at least 1 item"),
    ("adamw", {"lr_scale": 2.0}, "Field required"),
])
def test_settings_that_make_no_sense_are_refused(name, group, message):
    with pytest.raises(ValueError, match=message):
        Optim.model_validate({"name": name, "groups": [group]})
