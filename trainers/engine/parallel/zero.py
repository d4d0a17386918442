"""ZeRO 1 to 3 (Rajbhandari et al. 2020, arXiv:1910.02054), by DeepSpeed: each rank holds a stretch of the optimizer's
states (1), of the gradients too (2), of the parameters too (3).

DeepSpeed shards, reduces and steps; precision, loss scaling, accumulation and checkpoints are the loop's. Its own formats
are not used: a checkpoint holds the same tensors as under any other strategy.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from trainers.config.deepspeed_json import STAGES, deepspeed_config
from trainers.config.schema import Optim, RunConfig
from trainers.contract.errors import UserError
from trainers.engine.optimizer import make_optimizer
from trainers.engine.parallel.blocks import checkpoint_activations
from trainers.engine.parallel.fragments import Fragment, buffers, slots
from trainers.engine.parallel.sharded_model import Shapes, ShardedModel
from trainers.engine.precision import autocast
from trainers.engine.world import World


class Zero:
    settles = False

    def __init__(self, world: World, config: RunConfig):
        self.world, self.config = world, config
        self.stage = STAGES[config.train.strategy]
        world.start_process_group()
        self.deepspeed = _import_deepspeed(world.device)
        self._placed: list[nn.Module] = []
        self._sharded: dict[nn.Module, ZeroModel] = {}

    def place(self, model: nn.Module) -> nn.Module:
        """Whole; the engine takes it apart, once there is an optimizer."""
        if self.config.train.checkpoint_activations:
            checkpoint_activations(model)
        self._placed.append(model)
        # Stage 3's trained model need not fit on the device whole: it waits for its engine, and the others for that.
        return model if self.stage == 3 else model.to(self.world.device)

    def shard(self, model: nn.Module, optim: Optim) -> ShardedModel:
        if self._sharded:
            raise UserError(f"`train.strategy` is `{self.config.train.strategy}`, which trains one model by one update; this "
                            "task has several", "use train.strategy=ddp or fsdp")
        self._sharded[model] = ZeroModel(self._engine(model, optim), model, self.stage, self.world)
        for other in self._placed:
            if other is not model:
                other.to(self.world.device)
        return self._sharded[model]

    def _engine(self, model: nn.Module, optim: Optim) -> Any:
        forward = model.forward

        def in_precision(*args: Any, **kwargs: Any) -> Any:
            # Here, within the engine, which switches off an autocast from outside.
            with autocast(self.config.train.precision, self.world.device):
                return forward(*args, **kwargs)

        model.forward = in_precision
        settings = deepspeed_config(self.config, self.world.size, optim.clip_norm)
        self._check(settings)
        if self.stage == 3:
            # One parameter after another goes to the device and into parts: the whole model need not fit there.
            self.deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=torch.float32)
            for buffer in model.buffers():
                buffer.data = buffer.data.to(self.world.device)
        engine, *_ = self.deepspeed.initialize(model=model, optimizer=make_optimizer(optim, model.parameters()),
                                               config=settings, dist_init_required=False)
        return engine

    def _check(self, settings: Mapping[str, Any]) -> None:
        """Raises: UserError: DeepSpeed does not take the user's own keys."""
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from pydantic import ValidationError

        try:
            DeepSpeedZeroConfig(**settings["zero_optimization"])
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, ("zero_optimization", *first["loc"])))
            raise UserError(f"`train.deepspeed`: `{place}`: {first['msg']}", "DeepSpeed's documentation lists its keys") from None

    def clear(self, models: Iterable[nn.Module]) -> None:
        for model in models:
            model.zero_grad(set_to_none=True)

    def fragments(self, models: Mapping[str, nn.Module]) -> dict[str, Fragment]:
        found = {}
        for name, model in models.items():
            held = self._sharded[model].parameters() if model in self._sharded else {
                key: Fragment.whole(parameter) for key, parameter in model.named_parameters()}
            held |= {key: Fragment.whole(buffer) for key, buffer in buffers(model).items()}
            found |= {f"models/{name}/{key}": fragment for key, fragment in held.items()}
        return found


class ZeroModel(ShardedModel):
    """Gradients, fp32 parameters and optimizer states lie in flat partitions of the engine's optimizer."""

    def __init__(self, engine: Any, model: nn.Module, stage: int, world: World):
        self.engine, self.module, self.evaluated, self.model = engine, engine, engine, model
        self.stage, self.world = stage, world
        self.optimizer = engine.optimizer  # its groups are those of torch's optimizer within
        self.norm = torch.zeros((), device=world.device)
        self.norms, self.named = self.norm.view(1), [None]  # of all gradients together

    def accumulating(self, last: bool) -> AbstractContextManager:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, factor: Tensor, clip_norm: float | None, finite_only: bool, again: Callable[[], object]) -> bool:
        """DeepSpeed waits for the device in each step, and takes none whose gradients are not finite."""
        scaler = self.optimizer.loss_scaler
        # It divides gradients and their norm by this, in the pass that clips.
        scaler.cur_scale = 1.0 / factor.item()
        try:
            self.engine.step()
        finally:
            scaler.cur_scale = 1.0
        if self.optimizer.overflow:
            self._gather_persistent()  # it let go of them, and gets them back only after a step that it takes
            if not finite_only:
                again()  # it has dropped the gradients
                self.norms, self.named = self.norm.new_full((1,), inf), [self._first_bad()]
            return False
        self.norm = torch.as_tensor(self.optimizer._global_grad_norm)
        self.norms = self.norm.view(1)
        return True

    def _first_bad(self) -> str | None:
        """The first parameter whose gradient is not finite."""
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self.model.named_parameters():
            gradient = safe_get_full_grad(parameter) if parameter.requires_grad else None
            if gradient is not None and not gradient.isfinite().all():
                return name
        return None

    def parameters(self) -> dict[str, Fragment]:
        """What this rank holds of the model's parameters, by name."""
        held = {}
        for name, parameter, (flat, start, count, at) in self._stretches():
            if flat is not None:
                held[name] = Fragment(flat.narrow(0, at, count), start, _shape(parameter))
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                held[name] = self._frozen(parameter)
        return held

    def fragments(self, update: str) -> dict[str, Fragment]:
        found = {}
        for name, parameter, (flat, start, count, at) in self._stretches():
            for slot, value in self._states(flat).items():
                key = f"optim/{update}/{name}/{slot}"
                if value.ndim == 0:
                    found[key] = Fragment.whole(value)
                elif flat is not None:
                    found[key] = Fragment(value.narrow(0, at, count), start, _shape(parameter))
        return found

    def allocate(self, update: str, shapes: Shapes) -> None:
        kinds = {slot: like for found in slots(update, self.model, shapes).values() for slot, like in found.items()}
        for flat in self._flats():
            for slot, like in kinds.items():
                self.optimizer.optimizer.state[flat][slot] = (
                    torch.zeros_like(flat, requires_grad=False) if like else torch.zeros((), device=flat.device))

    def filled(self) -> None:
        """Bring the parameters that compute up to the fp32 partitions that were filled."""
        if self.stage < 3:
            self.optimizer.update_lp_params()
            for group in range(len(self.optimizer.bit16_groups)):
                self.optimizer._update_model_bit16_weights(group)
            return
        for group in range(len(self._flats())):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self._gather_persistent()

    def _gather_persistent(self) -> None:
        """Small parameters, which ZeRO-3 leaves whole on all ranks between steps."""
        if self.stage == 3 and (persistent := self.optimizer.persistent_parameters):
            persistent[0].all_gather(persistent)

    def _flats(self) -> list[Tensor]:
        """The fp32 partitions of this rank."""
        return self.optimizer.single_partition_of_fp32_groups if self.stage < 3 else self.optimizer.fp32_partitioned_groups_flat

    def _states(self, flat: Tensor | None) -> dict[str, Tensor]:
        states = self.optimizer.optimizer.state[self._flats()[0] if flat is None else flat]
        return {slot: value for slot, value in states.items() if isinstance(value, Tensor)}

    def _stretches(self) -> Iterator[tuple[str, nn.Parameter, tuple[Tensor | None, int, int, int]]]:
        """Each trained parameter with (the partition that holds a part of it, or None; the part's start in the parameter,
        its elements, its place in the partition)."""
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.stage < 3:
                part = parameter._hp_mapping
                if part is None:
                    yield name, parameter, (None, 0, 0, 0)
                    continue
                flat = self._flats()[part.param_group_index]
                address = part.hp_fragment_address
                yield name, parameter, (flat, part.lp_fragment_address.start, address.numel, address.start)
            else:
                group, at, padded = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
                start = min(self.world.rank * padded, parameter.ds_numel)
                yield name, parameter, (self._flats()[group], start, min(padded, parameter.ds_numel - start), at)

    def _frozen(self, parameter: nn.Parameter) -> Fragment:
        if self.stage < 3:
            return Fragment.whole(parameter)
        padded = parameter.ds_tensor.numel()
        start = min(self.world.rank * padded, parameter.ds_numel)
        count = min(padded, parameter.ds_numel - start)
        return Fragment(parameter.ds_tensor.view(-1).narrow(0, 0, count), start, _shape(parameter))


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _import_deepspeed(device: torch.device) -> Any:
    """Quietly, for this device, and without compiling its collectives of inference."""
    os.environ["DS_ACCELERATOR"] = device.type
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)  # of its calls
    import deepspeed
    from deepspeed import ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", auto_mpi_discovery=False, verbose=False)
    return deepspeed
