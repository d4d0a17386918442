"""A user's own DeepSpeed JSON: which settings are passed on, and which are refused before anything starts."""

from __future__ import annotations

from math import inf

import pytest

from trainers.config.deepspeed_json import check, deepspeed_config
from trainers.config.schema import RunConfig
from trainers.contract.errors import UserError


def config(strategy: str = "zero3", **train) -> RunConfig:
    return RunConfig.model_validate({"name": "x", "task": "a:B", "train": {
        "steps": 1, "batch_size": 8, "strategy": strategy, **train}})


def test_it_is_merged_over_the_settings_from_the_spec():
    theirs = {"zero_optimization": {"stage3_max_reuse_distance": 7, "overlap_comm": True, "reduce_bucket_size": 5e8},
              "wall_clock_breakdown": True}
    check(theirs)
    plain, merged = (deepspeed_config(config(deepspeed=keys), 2, 1.0) for keys in ({}, theirs))
    assert merged == {**plain, "wall_clock_breakdown": True,
                      "zero_optimization": {**plain["zero_optimization"], **theirs["zero_optimization"]}}
    assert merged["zero_optimization"]["stage"] == 3 and merged["train_micro_batch_size_per_gpu"] == 4


def test_sizes_in_tokens_are_consistent():
    made = deepspeed_config(config(batch_size=None, batch_tokens=1000, micro_batch_size=300), 3, None)
    assert made["train_batch_size"] == 3 * made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"] == 1800


@pytest.mark.parametrize("theirs, message, hint", [
    ({"fp16": {"enabled": True}}, "sets `fp16`, which only the spec may set", "set train.precision"),
    ({"train_batch_size": "auto"}, "sets `train_batch_size`, which only the spec", "set train.batch_size"),
    ({"zero_optimization": {"stage": 2}}, "sets `zero_optimization.stage`, which only the spec", "set train.strategy"),
    ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "sets `zero_optimization.offload_param`", "set train.offload"),
    ({"zero_optimisation": {}}, "sets `zero_optimisation`, which launch does not pass on", "did you mean `zero_optimization`?"),
    ({"zero_optimization": {"reduce_buckt_size": 1}}, "sets `zero_optimization.reduce_buckt_size`",
     "did you mean `zero_optimization.reduce_bucket_size`?"),
    ({"zero_optimization": {"zenflow": {}}}, "sets `zero_optimization.zenflow`, which launch does not pass on", "leave it out"),
    ({"prescale_gradients": True}, "sets `prescale_gradients`, which launch does not pass on", "leave it out"),
    ({"zero_optimization": {"nothing_like_it": 1}}, "which launch does not pass on", "zero_optimization may have contiguous_"),
    *[({"zero_optimization": value}, "`zero_optimization` in `train.deepspeed` is not an object", "")
      for value in (3, [], None, False, "")],
    ({"train_batch_size": None}, "sets `train_batch_size`, which only the spec", "set train.batch_size"),
    ({"zero_allow_untested_optimizer": False}, "which launch does not pass on", "leave it out"),
    ({"csv_monitor": {"enabled": True}}, "which launch does not pass on", "leave it out"),
    ({"steps_per_print": "auto"}, "`steps_per_print` is 'auto', not a whole number of at least 1", "leave it out"),
    ({"wall_clock_breakdown": "auto"}, "`wall_clock_breakdown` is 'auto', not true or false", "leave it out"),
    ({"zero_optimization": {"overlap_comm": "auto"}}, "is 'auto', not true or false", "leave it out"),
    ({"zero_optimization": {"sub_group_size": "auto"}}, "`zero_optimization.sub_group_size` is 'auto'", "leave it out"),
    ({"zero_optimization": {"reduce_bucket_size": 0}}, "is 0, not a whole number of at least 1", ""),
    ({"zero_optimization": {"sub_group_size": "1e9"}}, "`zero_optimization.sub_group_size` is '1e9', not a whole number", ""),
    ({"zero_optimization": {"sub_group_size": -1}}, "is -1, not a whole number of at least 0", ""),
    ({"zero_optimization": {"sub_group_size": inf}}, "is inf, not a whole number of at least 0", ""),
    ({"zero_optimization": {"sub_group_size": True}}, "is True, not a whole number of at least 0", ""),
    ({"zero_optimization": {"overlap_comm": 1}}, "`zero_optimization.overlap_comm` is 1, not true or false", ""),
])
def test_settings_that_are_refused(theirs, message, hint):
    with pytest.raises(UserError) as error:
        check(theirs)
    assert message in error.value.message and hint in (error.value.hint or "") and "\n" not in str(error.value.message)
