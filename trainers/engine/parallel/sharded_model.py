"""A model under training by one optimizer: what a strategy gives to a runner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from trainers.engine.parallel.fragments import Fragment, slots

Shapes = Mapping[str, tuple[int, ...]]


class ShardedModel:
    """Gradients in the parameters' own `grad`, as under DDP and `fully_shard`; ZeRO's keeps them elsewhere.

    Attributes:
        module: what to run forward in training.
        evaluated: what to run forward in evaluation.
        model: the module whose parameters are trained.
        optimizer: the learning rates of its groups are the runner's to set.
        norm: of the last step's gradients, as they were before clipping; on the device.
        norms: those of its single gradients; on the device, and of each step a tensor of its own.
        named: whose they are: the parameters' names, None where a norm is of several.
    """

    def __init__(self, module: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.module, self.evaluated, self.model, self.optimizer = module, model, model, optimizer
        self._names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        device = self._parameters[0].device
        self.norm = torch.zeros((), dtype=torch.float64, device=device)
        self.norms = self.norm.view(1)
        self.named: Sequence[str | None] = [None]

    def accumulating(self, last: bool) -> AbstractContextManager:
        """The context of a micro-batch's forward and backward; `last`: of the step."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, factor: Tensor, clip_norm: float | None, finite_only: bool,
             again: Callable[[], object]) -> bool:
        """Multiply the gradients by `factor`, scale them to at most `clip_norm`, and let the optimizer step.

        No host sync, except with `finite_only`: then nothing is changed if a gradient is not finite, and the
        answer is False.

        Args:
            again: does the step's backwards once more, from no gradients on: for a strategy that has let go of those
                that it must name.
        """
        gradients = [self._local(p.grad) for p in self._parameters if p.grad is not None]
        self.named = self._names if len(gradients) == len(self._names) else [
            name for name, p in zip(self._names, self._parameters) if p.grad is not None]
        self.norms = self._norms(gradients)
        factor = factor.to(self.norms.device)  # gradients may lie in host memory
        self.norm = torch.linalg.vector_norm(self.norms) * factor
        if finite_only and not self.norms.isfinite().all().item():
            return False
        if clip_norm is not None:
            # As torch.nn.utils.clip_grad_norm_ does, in one pass with the factor.
            factor = factor * (clip_norm / (self.norm + 1e-6)).clamp(max=1.0)
        if factor.is_cuda or factor.item() != 1.0:
            torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
        self.optimizer.step()
        return True

    def fragments(self, update: str) -> dict[str, Fragment]:
        """The optimizer's states, by the names that a checkpoint gives them."""
        found = {}
        for name, parameter in self.model.named_parameters():
            for slot, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    found[f"optim/{update}/{name}/{slot}"] = self._fragment(value)
        return found

    def allocate(self, update: str, shapes: Shapes) -> None:
        """Make the optimizer's states that a checkpoint's tensors say, to be filled."""
        found = slots(update, self.model, shapes)
        on_device = self.optimizer.defaults.get("fused") or self.optimizer.defaults.get("capturable")
        for name, parameter in self.model.named_parameters():
            for slot, like in found[name].items():
                value = torch.zeros_like(parameter, requires_grad=False) if like else torch.zeros(
                    (), device=parameter.device if on_device else "cpu")
                self.optimizer.state[parameter][slot] = value

    def filled(self) -> None:
        """The fragments of model and optimizer were filled."""

    def _fragment(self, tensor: Tensor) -> Fragment:
        return Fragment.whole(tensor)

    def _local(self, tensor: Tensor) -> Tensor:
        """What this rank holds of it."""
        return tensor

    def _norms(self, gradients: list[Tensor]) -> Tensor:
        """The norm of each gradient over all ranks, [gradients], float64 (whose squares do not overflow)."""
        return torch.stack(torch._foreach_norm(gradients)).double()
