"""The DeepSpeed configuration of a run, as its spec says. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainers.errors import UserError

if TYPE_CHECKING:
    from trainers.config import RunConfig

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
# What would change numbers or states in ways that checkpoints, or the promise that a resumed run is the same, do not follow.
REFUSED = ("amp", "compression_training", "sparse_gradients", "communication_data_type", "data_types",
           "gradient_predivide_factor", "prescale_gradients", "managed_gradient_accumulation", "elasticity", "autotuning",
           "data_efficiency", "curriculum_learning", "aio", "tensor_parallel", "pipeline", "zenflow")
REFUSED_OF_ZERO = ("zenflow", "zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights",
                   "zero_hpz_partition_size", "cpu_offload", "cpu_offload_param", "compute_grad_norm", "mics_shard_size")
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
    """Whether a user's own JSON leaves alone what the spec says.

    Raises:
        UserError: it does not; the hint names the spec's key.
    """
    for place, key in SPEC_KEYS.items():
        value: Any = theirs
        for word in place:
            value = value.get(word) if isinstance(value, Mapping) else None
        if value is not None:
            raise UserError(f"`train.deepspeed` sets `{'.'.join(place)}`, which is the spec's to say",
                            f"leave it out there, and set {key}")
    zero = theirs.get("zero_optimization") or {}
    if not isinstance(zero, Mapping):
        raise UserError("`train.deepspeed` has a `zero_optimization` that is no object")
    for word, value in zero.items():
        if value == "auto":
            raise UserError(f"`train.deepspeed` has `zero_optimization.{word}` as `auto`, which transformers fills in",
                            "give a number, or leave it out")
    for word in [*(w for w in REFUSED if w in theirs), *(f"zero_optimization.{w}" for w in REFUSED_OF_ZERO if w in zero)]:
        raise UserError(f"`train.deepspeed` sets `{word}`, which launch does not support: resuming a run would not be exact",
                        "leave it out")


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
