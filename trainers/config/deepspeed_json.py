"""The DeepSpeed configuration of a run, made from its spec. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainers.config.nearest import nearest_keys
from trainers.contract.errors import UserError

if TYPE_CHECKING:
    from trainers.config.schema import RunConfig

# Settings that the user's JSON may not have, because the spec has its own keys for them: place in the JSON -> key of the spec.
SPEC_KEYS = {
    ("train_batch_size",): "train.batch_size", ("train_micro_batch_size_per_gpu",): "train.micro_batch_size",
    ("gradient_accumulation_steps",): "train.micro_batch_size", ("gradient_clipping",): "optim.clip_norm",
    ("zero_optimization", "stage"): "train.strategy", ("zero_optimization", "offload_optimizer"): "train.offload",
    ("zero_optimization", "offload_param"): "train.offload", ("optimizer",): "optim", ("scheduler",): "optim.schedule",
    ("fp16",): "train.precision", ("bf16",): "train.precision", ("bfloat16",): "train.precision",
    ("torch_autocast",): "train.precision", ("activation_checkpointing",): "train.checkpoint_activations",
    ("wandb",): "wandb.mode", ("tensorboard",): "wandb.mode", ("checkpoint",): "checkpoint",
}
# Settings that the user's JSON may have, and their kinds: bool, dict (an object), or the smallest allowed whole number.
# DeepSpeed has more settings. They are refused, because they would change numbers or states: checkpoints would no longer
# match, or a resumed run would no longer be the same run. DeepSpeed itself ignores unknown keys.
Kind = int | type
ALLOWED: dict[str, Kind] = {"zero_optimization": dict, "wall_clock_breakdown": bool, "memory_breakdown": bool,
                            "dump_state": bool, "steps_per_print": 1}
ALLOWED_IN_ZERO: dict[str, Kind] = {
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
    """Return the configuration for DeepSpeed, with the user's own keys (`train.deepspeed`) merged over it.

    States and sums are fp32: precision and loss scaling belong to the training loop, not to DeepSpeed.
    """
    train = config.train
    split = config.batching(ranks)
    # Buckets of 80 MB: enough to keep a network busy, and little next to a model's states.
    # overlap_comm reduces gradients on a second CUDA stream. In stage 1 it also reduces them in another order. It is off
    # because equal results from run to run are not proven for it on GPUs.
    zero: dict[str, Any] = {"stage": STAGES[train.strategy], "reduce_bucket_size": 20_000_000,
                            "allgather_bucket_size": 20_000_000, "overlap_comm": False}
    if train.strategy == "zero3":
        # DeepSpeed's defaults for the last two settings are 10^9. With these defaults, each rank would hold a model of fewer
        # than 5 x 10^8 parameters whole from forward to backward: DeepSpeed would keep used parameters for reuse, and gather
        # further ones ahead at each module. Avoiding this is the purpose of zero3.
        zero |= {"stage3_prefetch_bucket_size": 20_000_000, "stage3_param_persistence_threshold": 10_000,
                 "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 50_000_000}
    if train.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if train.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    ours = {
        # Under `train.batch_tokens` these are tokens, which DeepSpeed only compares with each other.
        "train_batch_size": ranks * split.micro * split.accumulation, "train_micro_batch_size_per_gpu": split.micro,
        "gradient_accumulation_steps": split.accumulation, "gradient_clipping": clip_norm or 0.0,
        "zero_optimization": zero, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        "timers": {"throughput": {"enabled": False}},  # this timer waits for the GPU twice a micro-batch
    }
    return _merged(ours, train.deepspeed)


def check(theirs: Mapping[str, Any]) -> None:
    """Check the user's own JSON: it may have only settings that belong to no key of the spec and keep runs exact.

    Raises:
        UserError: the JSON has another setting, or a setting has a value of the wrong kind.
    """
    zero = theirs.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise UserError("`zero_optimization` in `train.deepspeed` is not an object")
    for place, key in SPEC_KEYS.items():
        if place[-1] in (zero if len(place) == 2 else theirs):
            raise UserError(f"`train.deepspeed` sets `{'.'.join(place)}`, which only the spec may set",
                            f"leave it out there, and set {key}")
    _check_keys(theirs, ALLOWED, "")
    _check_keys(zero, ALLOWED_IN_ZERO, "zero_optimization.")


def _check_keys(theirs: Mapping[str, Any], allowed: Mapping[str, Kind], prefix: str) -> None:
    for name, value in theirs.items():
        if name not in allowed:
            near = nearest_keys(name, list(allowed))
            raise UserError(f"`train.deepspeed` sets `{prefix}{name}`, which launch does not pass on to DeepSpeed",
                            f"did you mean `{prefix}{near[0]}`?" if near else
                            f"leave it out; {prefix[:-1] or 'train.deepspeed'} may have {', '.join(allowed)}")
        kind, number = allowed[name], isinstance(value, (int, float)) and not isinstance(value, bool)
        if isinstance(kind, int):
            right, wanted = number and value >= kind and float(value).is_integer(), f"a whole number of at least {kind}"
        else:
            right, wanted = isinstance(value, kind), "true or false"
        if not right:
            raise UserError(f"`train.deepspeed`: `{prefix}{name}` is {value!r}, not {wanted}",
                            "leave it out, or give a value: only transformers fills in `auto`" if value == "auto" else None)


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
