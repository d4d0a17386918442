"""The DeepSpeed configuration of a run, as its spec says. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainers.config.nearest import nearest_keys
from trainers.contract.errors import UserError

if TYPE_CHECKING:
    from trainers.config.schema import RunConfig

# What a spec says by keys of its own, and so a user's own JSON may not: by its place in the JSON.
SPEC_KEYS = {
    ("train_batch_size",): "train.batch_size", ("train_micro_batch_size_per_gpu",): "train.micro_batch_size",
    ("gradient_accumulation_steps",): "train.micro_batch_size", ("gradient_clipping",): "optim.clip_norm",
    ("zero_optimization", "stage"): "train.strategy", ("zero_optimization", "offload_optimizer"): "train.offload",
    ("zero_optimization", "offload_param"): "train.offload", ("optimizer",): "optim", ("scheduler",): "optim.schedule",
    ("fp16",): "train.precision", ("bf16",): "train.precision", ("bfloat16",): "train.precision",
    ("torch_autocast",): "train.precision", ("activation_checkpointing",): "train.checkpoint_activations",
    ("wandb",): "wandb.mode", ("tensorboard",): "wandb.mode", ("checkpoint",): "checkpoint",
}
# What else a user's own JSON may hold: true or false, an object, or a whole number from this one on. DeepSpeed has more, which
# would change numbers or states in ways that checkpoints, or the promise that a resumed run is the same, do not follow; and
# it ignores what it does not know.
Kind = int | type
TAKEN: dict[str, Kind] = {"zero_optimization": dict, "wall_clock_breakdown": bool, "memory_breakdown": bool,
                          "dump_state": bool, "steps_per_print": 1}
TAKEN_OF_ZERO: dict[str, Kind] = {
    "contiguous_gradients": bool, "reduce_scatter": bool, "reduce_bucket_size": 1, "use_multi_rank_bucket_allreduce": bool,
    "allgather_partitions": bool, "allgather_bucket_size": 0, "overlap_comm": bool, "sub_group_size": 0,
    "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0,
    "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_module_granularity_threshold": 0,
    "stage3_use_all_reduce_for_fetch_params": bool, "stage3_allgather_sequential": bool,
    "stage3_gather_16bit_weights_on_model_save": bool, "ignore_unused_parameters": bool, "memory_efficient_linear": bool,
    "log_trace_cache_warnings": bool,
}
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


def deepspeed_config(config: RunConfig, ranks: int, clip_norm: float | None) -> dict[str, Any]:
    """What DeepSpeed is given: fp32 states and sums, since precision and loss scaling are the loop's own; the user's own
    keys (`train.deepspeed`) on top."""
    train = config.train
    micro, accumulation = train.split(ranks)
    # Of 80 MB each: enough to keep a network busy, and little beside a model's states.
    zero: dict[str, Any] = {"stage": STAGES[train.strategy], "reduce_bucket_size": 20_000_000,
                            "allgather_bucket_size": 20_000_000, "overlap_comm": False}
    if train.strategy == "zero3":
        # By DeepSpeed's own numbers, 10^9 both, a model of less than half as many parameters is whole on each rank from
        # forward to backward, which is what zero3 is to spare one: kept for reuse, and gathered ahead at each module.
        zero |= {"stage3_prefetch_bucket_size": 20_000_000, "stage3_param_persistence_threshold": 10_000,
                 "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 50_000_000}
    if train.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if train.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    ours = {
        "train_batch_size": train.batch_size, "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation, "gradient_clipping": clip_norm or 0.0,
        "zero_optimization": zero, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
    }
    return _merged(ours, train.deepspeed)


def check(theirs: Mapping[str, Any]) -> None:
    """Whether a user's own JSON leaves alone what the spec says, and holds what is known to keep runs exact.

    Raises:
        UserError: it does not.
    """
    zero = theirs.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise UserError("`train.deepspeed` has a `zero_optimization` that is no object")
    for place, key in SPEC_KEYS.items():
        if place[-1] in (zero if len(place) == 2 else theirs):
            raise UserError(f"`train.deepspeed` sets `{'.'.join(place)}`, which is the spec's to say",
                            f"leave it out there, and set {key}")
    _taken(theirs, TAKEN, "")
    _taken(zero, TAKEN_OF_ZERO, "zero_optimization.")


def _taken(theirs: Mapping[str, Any], known: Mapping[str, Kind], prefix: str) -> None:
    for name, value in theirs.items():
        if name not in known:
            near = nearest_keys(name, list(known))
            raise UserError(f"`train.deepspeed` sets `{prefix}{name}`, which launch does not pass on to DeepSpeed",
                            f"did you mean `{prefix}{near[0]}`?" if near else
                            f"leave it out: {f'of {prefix[:-1]} ' if prefix else ''}it takes {', '.join(known)}")
        kind, number = known[name], isinstance(value, (int, float)) and not isinstance(value, bool)
        if isinstance(kind, int):
            right, wanted = number and value >= kind and float(value).is_integer(), f"a whole number from {kind} on"
        else:
            right, wanted = isinstance(value, kind), "true or false"
        if not right:
            raise UserError(f"`train.deepspeed`: `{prefix}{name}` is {value!r}, not {wanted}",
                            "transformers fills in `auto`: leave it out, or say what it is to be" if value == "auto" else None)


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
