"""How models are spread over ranks: the one place where the loop's models, gradients and states meet
torch's parallelism. `strategy` is chosen by `train.strategy`; what a strategy must do is what Ddp does."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Iterable, Mapping

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from trainers.engine.world import World


class Ddp:
    """Every rank holds everything; gradients are averaged over ranks (Li et al. 2020, arXiv:2006.15704)."""

    name = "ddp"

    def __init__(self, world: World):
        self.world = world
        # Accelerate starts the process group (nccl or gloo) and places models; all else is ours.
        self.accelerator = Accelerator(
            cpu=world.device.type == "cpu",
            mixed_precision="no",  # ours, and not what ACCELERATE_MIXED_PRECISION may say
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )

    @property
    def settles(self) -> bool:
        """Whether discarded backwards must come before the first step: DDP orders its buckets anew after
        its first one, which with three or more ranks changes the order of sums, so that the first step
        after a resumption would differ from the same step of an uninterrupted run in the last bits."""
        return self.world.size > 2

    def place(self, model: nn.Module) -> nn.Module:
        return model.to(self.world.device)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to run forward in training."""
        return model if self.world.size == 1 else self.accelerator.prepare_model(model)

    def accumulating(self, wrapped: nn.Module, last: bool) -> AbstractContextManager:
        """Gradients cross ranks only in the `last` micro-batch of a step."""
        return nullcontext() if last or self.world.size == 1 else wrapped.no_sync()

    def clip(self, parameters: Iterable[Tensor], norm: float) -> Tensor:
        """Scale gradients to at most this norm. Returns the norm before, on the device."""
        return nn.utils.clip_grad_norm_(parameters, norm)

    def share_buffers(self, models: Mapping[str, nn.Module]) -> None:
        """Give every rank rank 0's buffers (BatchNorm statistics): the ones that a checkpoint holds."""
        if self.world.size > 1:
            for model in models.values():
                for buffer in model.buffers():
                    dist.broadcast(buffer, src=0)

    def tensors(self, models: Mapping[str, nn.Module], optimizers: Mapping[str, tuple[str, torch.optim.Optimizer]]
                ) -> dict[str, Tensor]:
        """Everything a checkpoint holds, by name, the same on every rank. `optimizers`: by update, with the model
        that each one trains."""
        self.share_buffers(models)
        flat = {f"models/{name}/{key}": tensor for name, model in models.items()
                for key, tensor in model.state_dict().items()}
        for update, (model, optimizer) in optimizers.items():
            for key, parameter in models[model].named_parameters():
                for slot, value in optimizer.state.get(parameter, {}).items():
                    if value is not None:
                        flat[f"optim/{update}/{key}/{slot}"] = value
        return flat

    def restore(self, models: Mapping[str, nn.Module], optimizers: Mapping[str, tuple[str, torch.optim.Optimizer]],
                tensors: Mapping[str, Tensor]) -> None:
        """Put what `tensors` gave back in place.

        Raises:
            RuntimeError: names or shapes do not fit the models.
        """
        for name, model in models.items():
            prefix = f"models/{name}/"
            model.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
        for update, (model, optimizer) in optimizers.items():
            slots: dict[str, dict[str, Tensor]] = {}
            prefix = f"optim/{update}/"
            for key in (k for k in tensors if k.startswith(prefix)):
                parameter, slot = key.removeprefix(prefix).rsplit("/", 1)
                slots.setdefault(parameter, {})[slot] = tensors[key]
            names = {parameter: key for key, parameter in models[model].named_parameters()}
            order = [names[p] for group in optimizer.param_groups for p in group["params"]]
            optimizer.load_state_dict({
                "state": {i: slots[key] for i, key in enumerate(order) if key in slots},
                "param_groups": optimizer.state_dict()["param_groups"],
            })

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


STRATEGIES = {"ddp": Ddp}
