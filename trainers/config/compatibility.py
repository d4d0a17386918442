"""Which settings can be combined. Imports no torch: `launch` refuses impossible combinations when it plans a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from trainers.config import deepspeed_json
from trainers.contract.errors import UserError
from trainers.contract.text import either

if TYPE_CHECKING:
    from trainers.config.schema import RunConfig

ZERO = tuple(deepspeed_json.STAGES)
SHARDED = (*ZERO, "fsdp")
OFFLOADS = {"ddp": ("none",), "zero1": ("none", "optimizer"), "zero2": ("none", "optimizer"),
            "zero3": ("none", "optimizer", "parameters"), "fsdp": ("none", "parameters")}

# (function of a config and its ranks' device: whether to refuse the config, reason, hint)
Refusal = tuple[Callable[["RunConfig", str], bool], str, str]
REFUSALS: list[Refusal] = [
    (lambda c, device: c.train.precision == "tf32" and device == "cpu",
     "`train.precision` is `tf32`, which needs a GPU; these ranks run on CPU", "use train.precision=fp32 or bf16"),
    (lambda c, device: c.train.compile and c.train.strategy in ZERO,
     "`train.compile` cannot be used with `{strategy}`: DeepSpeed moves parameters in hooks that a compiled model does not run",
     "use train.strategy=fsdp or ddp, or train.compile=false"),
    (lambda c, device: c.train.offload not in OFFLOADS[c.train.strategy],
     "`train.offload` is `{offload}`, which `{strategy}` does not support", "use {offloads}"),
    (lambda c, device: c.checkpoint.layout == "full" and c.train.strategy in SHARDED,
     "`checkpoint.layout` is `full`, but with `{strategy}` no rank holds the whole model",
     "use checkpoint.layout=sharded; `launch export` writes a sharded checkpoint into one file"),
    (lambda c, device: bool(c.train.deepspeed) and c.train.strategy not in ZERO,
     "`train.deepspeed` is only for zero1, zero2 and zero3; `train.strategy` is `{strategy}`",
     "leave out train.deepspeed, or use train.strategy=zero2"),
]


def unsupported(config: RunConfig, device: str) -> Iterator[UserError]:
    """Yield an error for each setting that cannot be used with the others, on ranks of `device` (cpu or cuda)."""
    train = config.train
    values = {"strategy": train.strategy, "offload": train.offload,
              "offloads": either(f"train.offload={word}" for word in OFFLOADS[train.strategy])}
    for refuse, reason, hint in REFUSALS:
        if refuse(config, device):
            yield UserError(reason.format(**values), hint.format(**values))
    try:
        deepspeed_json.check(train.deepspeed)
    except UserError as error:
        yield error


def check(config: RunConfig, device: str) -> None:
    """Refuse settings that cannot be used together.

    Raises:
        UserError: two settings cannot be combined; this is the first such error.
    """
    for error in unsupported(config, device):
        raise error
