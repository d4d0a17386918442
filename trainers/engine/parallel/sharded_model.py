"""A model and its optimizer, as a strategy spreads them over ranks for one update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from trainers.checkpoints.names import OPTIMIZERS
from trainers.contract.errors import UserError
from trainers.engine.parallel.fragments import Fragment, optimizer_slots

Shapes = Mapping[str, tuple[int, ...]]  # the shapes of a checkpoint's tensors, by name


class ShardedModel:
    """The trained model of one update, as a strategy spreads it over ranks, together with its optimizer.

    This base class expects the gradients in the parameters' `grad`, as under DDP and `fully_shard`. ZeRO keeps them elsewhere.

    Attributes:
        module: the module to call in training.
        eval_module: the module to call in evaluation.
        model: the module that has the trained parameters.
        optimizer: the optimizer of these parameters. The caller sets the learning rates of its groups.
        norm: the norm of the last step's gradients before clipping; a scalar on the device.
        norms: the norms of the single gradients of the last step, [gradients], on the device. Every step makes a new tensor.
        norm_names: for each of `norms` the name of the parameter; None for a norm over several parameters.
    """

    def __init__(self, module: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.module, self.eval_module, self.model, self.optimizer = module, model, model, optimizer
        self._names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        device = self._parameters[0].device
        self.norm = torch.zeros((), dtype=torch.float64, device=device)
        self.norms = self.norm.view(1)
        self.norm_names: Sequence[str | None] = [None]

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Return the context for the forward and backward of a micro-batch; `last`: it is the last one of the step."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, factor: Tensor, clip_norm: float | None, finite_only: bool,
             repeat_backward: Callable[[], object]) -> bool:
        """Multiply the gradients by `factor`, clip their norm to `clip_norm`, and take an optimizer step.

        Does not wait for the device, except with `finite_only`.

        Args:
            finite_only: change nothing if a gradient is not finite.
            repeat_backward: clears the gradients and repeats the backward passes of this step. It is for strategies that
                free the gradients before they can name the gradient that is not finite.

        Returns:
            Whether the optimizer took the step.

        Raises:
            UserError: the loss does not depend on the trained model.
        """
        gradients = [self._local(p.grad) for p in self._parameters if p.grad is not None]
        if not gradients:
            raise UserError("no parameter that is trained has got a gradient", "compute the loss from the model that the update "
                            "trains, without torch.no_grad and without detached values")
        self.norm_names = self._names if len(gradients) == len(self._names) else [
            name for name, p in zip(self._names, self._parameters) if p.grad is not None]
        self.norms = self._norms(gradients)
        factor = factor.to(self.norms.device)  # gradients may be in host memory
        self.norm = torch.linalg.vector_norm(self.norms) * factor
        if finite_only and not self.norms.isfinite().all().item():
            return False
        if clip_norm is not None:
            # The same as torch.nn.utils.clip_grad_norm_, but in one pass with `factor`.
            factor = factor * (clip_norm / (self.norm + 1e-6)).clamp(max=1.0)
        if factor.is_cuda or factor.item() != 1.0:
            torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
        self.optimizer.step()
        return True

    def fragments(self, update: str) -> dict[str, Fragment]:
        """Return this rank's part of the optimizer's states, by their names in checkpoints."""
        result = {}
        for name, parameter in self.model.named_parameters():
            for slot, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    result[f"{OPTIMIZERS}{update}/{name}/{slot}"] = self._fragment(value)
        return result

    def allocate(self, update: str, shapes: Shapes) -> None:
        """Create the optimizer states that a checkpoint holds, as zeros to be filled.

        Raises:
            UserError: the checkpoint has states of a parameter that the model does not have.
        """
        slots = optimizer_slots(update, self.model, shapes)
        on_device = self.optimizer.defaults.get("fused") or self.optimizer.defaults.get("capturable")
        for name, parameter in self.model.named_parameters():
            for slot, has_parameter_shape in slots[name].items():
                value = torch.zeros_like(parameter, requires_grad=False) if has_parameter_shape else torch.zeros(
                    (), device=parameter.device if on_device else "cpu")
                self.optimizer.state[parameter][slot] = value

    def after_fill(self) -> None:
        """Bring the rest of the state up to date after new values were copied into the fragments."""

    def masters(self) -> list[Tensor]:
        """Return the tensors that the optimizer changes: this rank's part of the trained parameters, in fp32."""
        return [self._local(parameter) for parameter in self._parameters]

    def parts(self, values: Sequence[Tensor]) -> dict[str, Fragment]:
        """Return the fragments of tensors that are laid out as `masters`, by the names of the parameters."""
        return {name: replace(self._fragment(parameter), part=value)
                for name, parameter, value in zip(self._names, self._parameters, values, strict=True)}

    def _fragment(self, tensor: Tensor) -> Fragment:
        return Fragment.whole(tensor)

    def _local(self, tensor: Tensor) -> Tensor:
        """Return the part of the tensor that this rank holds."""
        return tensor

    def _norms(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm of each gradient over all ranks, [gradients], in float64 so that squares do not overflow."""
        return torch.stack(torch._foreach_norm(gradients)).double()
