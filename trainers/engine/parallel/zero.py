"""ZeRO stages 1 to 3 (Rajbhandari et al. 2020, arXiv:1910.02054), run by DeepSpeed.

Each rank holds a part of the optimizer's states (stage 1), also of the gradients (stage 2), also of the parameters (stage 3).

DeepSpeed shards, reduces and steps. The loop handles precision, loss scaling, accumulation and checkpoints. DeepSpeed's own
checkpoint formats are not used: a checkpoint holds the same tensors as under every other strategy.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from trainers.checkpoints.names import MODELS, OPTIMIZERS
from trainers.config.deepspeed_json import STAGES, deepspeed_config
from trainers.config.schema import Optim, RunConfig
from trainers.contract.errors import UserError
from trainers.engine.groups import ParameterGroup
from trainers.engine.optimizer import make_optimizer
from trainers.engine.parallel.blocks import checkpoint_activations
from trainers.engine.parallel.fragments import Fragment, buffers, optimizer_slots
from trainers.engine.parallel.sharded_model import Shapes, ShardedModel
from trainers.engine.precision import autocast
from trainers.engine.world import World

# An nn.Parameter with the attributes that DeepSpeed adds and no library declares: `_hp_mapping`, `ds_numel`, `ds_tensor`.
DeepSpeedParameter = Any


class Zero:
    """The strategies `zero1`, `zero2` and `zero3`."""

    needs_settling = False

    def __init__(self, world: World, config: RunConfig):
        self.world, self.config = world, config
        self.stage = STAGES[config.train.strategy]
        world.start_process_group()
        self.deepspeed = _import_deepspeed(world.device)
        self._placed: list[nn.Module] = []
        self._sharded: dict[nn.Module, ZeroModel] = {}

    def place(self, model: nn.Module) -> nn.Module:
        """Leave the model whole. `shard` takes it apart, because DeepSpeed needs the optimizer for this."""
        if self.config.train.checkpoint_activations:
            checkpoint_activations(model)
        self._placed.append(model)
        # Under stage 3 the trained model may be too large for one device. Until `shard` says which model is trained, all
        # models stay in host memory.
        return model if self.stage == 3 else model.to(self.world.device)

    def shard(self, model: nn.Module, optim: Optim, groups: Sequence[ParameterGroup]) -> ShardedModel:
        if self._sharded:
            raise UserError(f"`train.strategy` is `{self.config.train.strategy}`, which supports only one update; this task "
                            "has several", "use train.strategy=ddp or fsdp")
        self._sharded[model] = ZeroModel(self._engine(model, optim, groups), model, self.stage, self.world)
        for other in self._placed:
            if other is not model:
                other.to(self.world.device)
        return self._sharded[model]

    def _engine(self, model: nn.Module, optim: Optim, groups: Sequence[ParameterGroup]) -> Any:
        forward = model.forward

        def in_precision(*args: Any, **kwargs: Any) -> Any:
            # DeepSpeed's engine switches off the autocast around it, so autocast starts inside the engine.
            with autocast(self.config.train.precision, self.world.device):
                return forward(*args, **kwargs)

        model.forward = in_precision
        settings = deepspeed_config(self.config, self.world.size, optim.clip_norm)
        self._check(settings)
        if self.stage == 3:
            # Parameters are moved to the device and sharded one by one, so the whole model need not fit there.
            self.deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=torch.float32)
            for buffer in model.buffers():
                buffer.data = buffer.data.to(self.world.device)
        engine, *_ = self.deepspeed.initialize(model=model, optimizer=make_optimizer(optim, model, groups),
                                               config=settings, dist_init_required=False)
        return engine

    def _check(self, settings: Mapping[str, Any]) -> None:
        """Check the user's keys with DeepSpeed's own schema. Raises: UserError: DeepSpeed rejects a key."""
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from pydantic import ValidationError

        try:
            DeepSpeedZeroConfig(**settings["zero_optimization"])
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, ("zero_optimization", *first["loc"])))
            raise UserError(f"`train.deepspeed`: `{place}`: {first['msg']}",
                            "DeepSpeed's documentation lists the keys and their values") from None

    def clear_gradients(self, models: Iterable[nn.Module]) -> None:
        for model in models:
            model.zero_grad(set_to_none=True)

    def fragments(self, models: Mapping[str, nn.Module]) -> dict[str, Fragment]:
        result: dict[str, Fragment] = {}
        for name, model in models.items():
            held = self._sharded[model].parameters() if model in self._sharded else {
                key: Fragment.whole(parameter) for key, parameter in model.named_parameters()}
            held |= {key: Fragment.whole(buffer) for key, buffer in buffers(model).items()}
            result |= {f"{MODELS}{name}/{key}": fragment for key, fragment in held.items()}
        return result


@dataclass(frozen=True)
class Slice:
    """The part of one trained parameter that is in this rank's partitions."""

    name: str
    parameter: DeepSpeedParameter
    partition: int | None  # its number in the list of partitions; None: this rank holds no part of the parameter
    start: int             # the part's first element in the flattened parameter
    count: int             # the part's number of elements
    offset: int            # the part's first element in the partition

    def fragment(self, partition: Tensor) -> Fragment:
        """Return the part, read from a partition of the same layout (parameters, or a state of the optimizer)."""
        return Fragment(partition.narrow(0, self.offset, self.count), self.start, _shape(self.parameter))


class ZeroModel(ShardedModel):
    """A model trained by DeepSpeed's ZeRO.

    The gradients, fp32 parameters and optimizer states are in flat partitions, which the engine's optimizer owns.
    """

    optimizer: Any  # DeepSpeed's optimizer, which has no types; its groups are those of the torch optimizer inside

    def __init__(self, engine: Any, model: nn.Module, stage: int, world: World):
        self.engine, self.module, self.eval_module, self.model = engine, engine, engine, model
        self.stage, self.world = stage, world
        self.optimizer = engine.optimizer
        self.norm = torch.zeros((), device=world.device)
        self.norms, self.norm_names = self.norm.view(1), [None]  # one norm, over all gradients

    def accumulating(self, last: bool) -> AbstractContextManager:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, factor: Tensor, clip_norm: float | None, finite_only: bool, repeat_backward: Callable[[], object]) -> bool:
        """Take a step as ShardedModel.step does. DeepSpeed always waits for the device, and skips every step whose gradients
        are not finite."""
        scaler = self.optimizer.loss_scaler
        # DeepSpeed divides the gradients and their norm by this number, in the same pass that clips them.
        scaler.cur_scale = 1.0 / factor.item()
        try:
            self.engine.step()
        finally:
            scaler.cur_scale = 1.0
        if self.optimizer.overflow:
            # DeepSpeed has freed these parameters. It gathers them again only after a step that it takes.
            self._gather_persistent()
            if not finite_only:
                repeat_backward()  # DeepSpeed has freed the gradients
                self.norms, self.norm_names = self.norm.new_full((1,), inf), [self._first_bad()]
            return False
        self.norm = torch.as_tensor(self.optimizer._global_grad_norm)
        self.norms = self.norm.view(1)
        return True

    def _first_bad(self) -> str | None:
        """Return the name of the first parameter whose gradient is not finite."""
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self.model.named_parameters():
            gradient = safe_get_full_grad(parameter) if parameter.requires_grad else None
            if gradient is not None and not gradient.isfinite().all():
                return name
        return None

    def parameters(self) -> dict[str, Fragment]:
        """Return this rank's part of the model's parameters, by name."""
        held = self.parts(self.masters())
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                held[name] = self._frozen(parameter)
        return held

    def fragments(self, update: str) -> dict[str, Fragment]:
        result = {}
        for part in self._slices():
            for slot, value in self._states(part.partition).items():
                key = f"{OPTIMIZERS}{update}/{part.name}/{slot}"
                if value.ndim == 0:
                    result[key] = Fragment.whole(value)
                elif part.partition is not None:
                    result[key] = part.fragment(value)
        return result

    def parts(self, values: Sequence[Tensor]) -> dict[str, Fragment]:
        return {part.name: part.fragment(values[part.partition]) for part in self._slices() if part.partition is not None}

    def allocate(self, update: str, shapes: Shapes) -> None:
        kinds = {slot: has_parameter_shape for slots in optimizer_slots(update, self.model, shapes).values()
                 for slot, has_parameter_shape in slots.items()}
        for partition in self.masters():
            for slot, has_parameter_shape in kinds.items():
                self.optimizer.optimizer.state[partition][slot] = (
                    torch.zeros_like(partition, requires_grad=False) if has_parameter_shape
                    else torch.zeros((), device=partition.device))

    def after_fill(self) -> None:
        """Copy the fp32 partitions, which have new values, into the parameters that compute."""
        if self.stage < 3:
            self.optimizer.update_lp_params()
            for group in range(len(self.optimizer.bit16_groups)):
                self.optimizer._update_model_bit16_weights(group)
            return
        self.optimizer.checkpoint_event_prologue()  # frees gathered parameters, which hold the old values
        for group in range(len(self.masters())):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self._gather_persistent()

    def _gather_persistent(self) -> None:
        """Gather the small parameters, which ZeRO-3 keeps whole on every rank between steps."""
        if self.stage == 3 and (persistent := self.optimizer.persistent_parameters):
            persistent[0].all_gather(persistent)

    def masters(self) -> list[Tensor]:
        """Return the fp32 partitions of this rank."""
        return self.optimizer.single_partition_of_fp32_groups if self.stage < 3 else self.optimizer.fp32_partitioned_groups_flat

    def _states(self, partition: int | None) -> dict[str, Tensor]:
        """Return the optimizer's states for a partition. For None, return those of the first partition: states that are single
        numbers are the same for all partitions."""
        states = self.optimizer.optimizer.state[self.masters()[partition or 0]]
        return {slot: value for slot, value in states.items() if isinstance(value, Tensor)}

    def _slices(self) -> Iterator[Slice]:
        """Yield the slice of every trained parameter."""
        name: str
        parameter: DeepSpeedParameter
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.stage < 3:
                part = parameter._hp_mapping
                if part is None:
                    yield Slice(name, parameter, None, 0, 0, 0)
                    continue
                address = part.hp_fragment_address
                yield Slice(name, parameter, part.param_group_index, part.lp_fragment_address.start,
                            address.numel, address.start)
            else:
                group, offset, padded = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
                start = min(self.world.rank * padded, parameter.ds_numel)
                yield Slice(name, parameter, group, start, min(padded, parameter.ds_numel - start), offset)

    def _frozen(self, parameter: DeepSpeedParameter) -> Fragment:
        """Return this rank's part of a parameter that is not trained."""
        if self.stage < 3:
            return Fragment.whole(parameter)
        padded = parameter.ds_tensor.numel()
        start = min(self.world.rank * padded, parameter.ds_numel)
        count = min(padded, parameter.ds_numel - start)
        return Fragment(parameter.ds_tensor.view(-1).narrow(0, 0, count), start, _shape(parameter))


def _shape(parameter: DeepSpeedParameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for this device, without its log output and without compiling its collectives for inference."""
    os.environ["DS_ACCELERATOR"] = device.type
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed itself makes the deprecated calls.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    import deepspeed
    from deepspeed import ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed would fill this table by probing all its operations, which starts nvcc. Its only reader looks for a collective
    # for inference, which is not wanted.
    ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", auto_mpi_discovery=False, verbose=False)
    return deepspeed
