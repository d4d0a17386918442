"""Which settings can be combined: each strategy with each precision, offload and layout is allowed, or refused with a reason."""

from __future__ import annotations

import itertools

import pytest

from trainers.config.compatibility import OFFLOADS, check, unsupported
from trainers.config.schema import RunConfig
from trainers.contract.errors import UserError

STRATEGIES, PRECISIONS = ("ddp", "zero1", "zero2", "zero3", "fsdp"), ("fp32", "tf32", "bf16", "fp16")


def config(strategy: str, precision: str = "fp32", **train) -> RunConfig:
    return RunConfig.model_validate({
        "name": "x", "task": "a:B", "checkpoint": {"layout": train.pop("layout", "sharded")},
        "train": {"steps": 1, "batch_size": 8, "strategy": strategy, "precision": precision, **train}})


@pytest.mark.parametrize("strategy, precision, device", [*itertools.product(STRATEGIES, PRECISIONS, ("cpu", "cuda"))])
def test_each_strategy_with_each_precision(strategy, precision, device):
    """tests/trainers/engine/parallel/test_strategies.py trains with the combinations that are allowed on CPU ranks."""
    messages = [error.message for error in unsupported(config(strategy, precision), device)]
    assert messages == (["`train.precision` is `tf32`, which needs a GPU; these ranks run on CPU"]
                        if (precision, device) == ("tf32", "cpu") else [])


@pytest.mark.parametrize("strategy, offload", [*itertools.product(STRATEGIES, ("none", "optimizer", "parameters"))])
def test_each_strategy_with_each_offload(strategy, offload):
    errors = [str(error) for error in unsupported(config(strategy, offload=offload), "cpu")]
    possible = {"ddp": 1, "zero1": 2, "zero2": 2, "zero3": 3, "fsdp": 2}[strategy]
    assert len(OFFLOADS[strategy]) == possible and bool(errors) == (offload not in OFFLOADS[strategy])
    message = f"`train.offload` is `{offload}`, which `{strategy}` does not support\nhint: use train.offload=none"
    assert all(message in error for error in errors)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compilation_the_full_layout_and_deepspeeds_keys(strategy):
    zero = strategy.startswith("zero")
    for allowed, given, message in (
        (not zero, {"compile": True}, f"`train.compile` cannot be used with `{strategy}`: DeepSpeed"),
        (strategy == "ddp", {"layout": "full"}, f"`checkpoint.layout` is `full`, but with `{strategy}` no rank holds"),
        (zero, {"deepspeed": {"wall_clock_breakdown": True}}, f"`train.strategy` is `{strategy}`"),
    ):
        if allowed:
            check(config(strategy, **given), "cpu")
        else:
            with pytest.raises(UserError) as error:
                check(config(strategy, **given), "cpu")
            assert message in error.value.message and error.value.hint
