"""One update at work: its optimizer, its schedule, its position, and one optimizer step at a time."""

from __future__ import annotations

import time
from typing import Any, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.config import Optim, Precision, RunConfig
from trainers.engine.precision import autocast, loss_scaler
from trainers.engine.sampling import Shuffled, mix
from trainers.engine.schedule import learning_rate
from trainers.engine.strategy import Ddp
from trainers.engine.task import Dataset, Loss, Update
from trainers.engine.world import World


def make_optimizer(optim: Optim, model: nn.Module, precision: Precision) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Not in fp16: fused SGD (torch 2.15) leaves its momentum unset when its first step is skipped.
    common = dict(lr=optim.lr, weight_decay=optim.weight_decay, fused=precision != "fp16")
    match optim.name:
        case "sgd":
            return torch.optim.SGD(parameters, momentum=optim.momentum, nesterov=optim.nesterov, **common)
        case "adam":
            return torch.optim.Adam(parameters, betas=tuple(optim.betas), eps=optim.eps, **common)
        case "adamw":
            return torch.optim.AdamW(parameters, betas=tuple(optim.betas), eps=optim.eps, **common)


class Learner:
    """An Update with what it needs to run: `take_step` does one optimizer step on one global batch."""

    def __init__(self, update: Update, config: RunConfig, world: World, strategy: Ddp, dataset: Dataset,
                 plain: Mapping[str, nn.Module], wrapped: Mapping[str, nn.Module]):
        self.update, self.config, self.world, self.strategy, self.dataset = update, config, world, strategy, dataset
        # Only the trained model runs through its wrapper: backward through another's would start its reduction.
        self.models = {**plain, update.trains: wrapped[update.trains]}
        self.all_models = list(plain.values())
        self.optim = update.optim or config.optim
        self.optimizer = make_optimizer(self.optim, plain[update.trains], config.train.precision)
        self.scaler = loss_scaler(config.train.precision, world.device)
        self.samples = Shuffled(len(dataset), config.train.batch_size, config.train.seed, update.name)
        _, self.accumulation = config.train.split(world.size)
        self.applied = 0             # steps that changed the parameters: what schedules follow
        self.skipped = 0             # fp16 steps whose gradients overflowed
        self.skipped_in_row = 0
        self.data_wait_s = 0.0       # time spent making batches since `measured` was last called
        self.lr = self.optim.lr
        self.norm: Tensor | None = None
        self._last = torch.zeros(2, dtype=torch.float64, device=world.device)  # [loss sum, count] of the last step
        self._items = torch.zeros((), dtype=torch.float64, device=world.device)

    def take_step(self, draw: int, total: int) -> None:
        """One optimizer step on global batch `draw`; the schedule ends at `total` applied steps. No host sync
        (fp16 has one, to learn whether the step was skipped)."""
        self.lr = learning_rate(self.optim, self.applied, total)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self._clear()
        sums = self._accumulate(draw)
        if self.world.size > 1:
            dist.all_reduce(sums)
        self._last = sums
        self._items += sums[1]
        self._normalise(sums[1])
        parameters = self.optimizer.param_groups[0]["params"]
        if self.optim.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            self.norm = self.strategy.clip(parameters, self.optim.clip_norm)
        if not self.scaler.is_enabled():
            self.optimizer.step()
            self.applied += 1
            return
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        skipped = self.scaler.get_scale() < before
        self.skipped += skipped
        self.applied += not skipped
        self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0

    def _accumulate(self, draw: int, factor: float = 1.0) -> Tensor:
        """Backward over this rank's micro-batches. Returns its [loss sum, count], float64."""
        loss_sum = torch.zeros((), device=self.world.device)
        count = 0
        scale = factor * self.world.size / self.config.train.batch_size  # DDP divides by the world size
        shares = self.samples.shares(draw, self.world.rank, self.world.size, self.accumulation)
        for micro, share in enumerate(shares):
            torch.manual_seed(mix(self.config.train.seed, "noise", self.update.name, draw, self.world.rank, micro))
            began = time.perf_counter()
            batch = self.dataset.batch(share)
            self.data_wait_s += time.perf_counter() - began
            last = micro == len(shares) - 1
            with self.strategy.accumulating(self.models[self.update.trains], last):
                loss = self._loss(batch)
                self.scaler.scale(loss.sum * scale).backward()
            loss_sum += loss.sum.detach()
            count += loss.count
        return torch.stack([loss_sum.double(), loss_sum.new_full((), count, dtype=torch.float64)])

    def _loss(self, batch: Any) -> Loss:
        with autocast(self.config.train.precision, self.world.device):
            return self.update.loss(self.models, batch)

    def _normalise(self, count: Tensor) -> None:
        """Gradients were divided by the batch size beforehand, which keeps fp16 in range; the true
        divisor is the number of items over all ranks and micro-batches."""
        nominal = self.config.train.batch_size
        if self.world.device.type == "cpu" and count.item() == nominal:
            return
        gradients = [p.grad for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, (nominal / count.clamp(min=1)).to(gradients[0].dtype))

    def _clear(self) -> None:
        # Of all models: this update's loss may have reached into those of another.
        for model in self.all_models:
            model.zero_grad(set_to_none=True)

    def settle(self, draw: int) -> None:
        """Two backwards that leave no trace: see Ddp.settles."""
        buffers = [(b, b.clone()) for model in self.all_models for b in model.buffers()]
        for _ in range(2):
            self._accumulate(draw, factor=0.0)
        self._clear()
        for buffer, value in buffers:
            buffer.copy_(value)
        self.data_wait_s = 0.0

    def last_loss(self) -> float:
        """The mean loss of the last step over its global batch. Waits for the device."""
        loss, count = self._last.tolist()
        return loss / max(count, 1.0)

    def measured(self) -> tuple[float, float]:
        """(items, seconds spent making batches on this rank) since the last call. Waits for the device."""
        values = self._items.item(), self.data_wait_s
        self._items.zero_()
        self.data_wait_s = 0.0
        return values

    def state(self) -> dict[str, Any]:
        return {"applied": self.applied, "skipped": self.skipped, "scaler": self.scaler.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.applied, self.skipped = state["applied"], state["skipped"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
