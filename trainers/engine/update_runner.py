"""One update at work: its schedule, its position, and one optimizer step at a time."""

from __future__ import annotations

import time
from typing import Any, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.config.schema import RunConfig
from trainers.contract import heartbeat
from trainers.contract.errors import TrainingError
from trainers.engine.batches.sampling import Shuffled, seed_noise
from trainers.engine.parallel.strategy import Strategy
from trainers.engine.precision import LossScale, autocast
from trainers.engine.schedule import learning_rate
from trainers.engine.task import Dataset, Loss, Update
from trainers.engine.world import World

MENDS = "lower optim.lr, set optim.clip_norm, or use train.precision=fp32; the checkpoints before it are whole"
UNCHECKED = 100    # steps of an update after which gradients are looked at, if logs and checkpoints are rarer
SKIPS_IN_ROW = 25  # halving fp16's loss scale so often brings it from 2**16 to below 1


class UpdateRunner:
    """An Update with what it needs to run: `take_step` does one optimizer step on one global batch."""

    def __init__(self, update: Update, config: RunConfig, world: World, strategy: Strategy, dataset: Dataset,
                 models: Mapping[str, nn.Module]):
        """`models`: placed by the strategy."""
        self.update, self.config, self.world, self.strategy, self.dataset = update, config, world, strategy, dataset
        self.optim = update.optim or config.optim
        self.sharded = strategy.shard(models[update.trains], self.optim)
        # Only the trained model runs through its wrapper: backward through another's would start its reduction.
        self.models = {**models, update.trains: self.sharded.module}
        self.all_models = list(models.values())
        self.scale = LossScale(config.train.precision)
        self.samples = Shuffled(len(dataset), config.train.batch_size, config.train.seed, update.name)
        _, self.accumulation = config.train.split(world.size)
        self.applied = 0             # steps that changed the parameters: what schedules follow
        self.skipped = 0             # fp16 steps whose gradients overflowed
        self.skipped_in_row = 0
        self.data_wait_s = 0.0       # time spent making batches since `measured` was last called
        self.lr = self.optim.lr
        self._last = torch.zeros(2, dtype=torch.float64, device=world.device)  # [loss sum, count] of the last step
        self._items = torch.zeros((), dtype=torch.float64, device=world.device)
        # (draw, gradients' norms, whose they are) of the steps since the last check
        self._norms: list[tuple[int, Tensor, Sequence[str | None]]] = []

    @property
    def norm(self) -> Tensor:
        """The norm of the last step's gradients, before clipping; on the device."""
        return self.sharded.norm

    def take_step(self, draw: int, total: int) -> None:
        """One optimizer step on global batch `draw`; the schedule ends at `total` applied steps. No host sync
        (fp16 has one, to learn whether the step was skipped, and ZeRO's own).

        Raises:
            TrainingError: by `check`, which is asked where a strategy does not take the step, and every UNCHECKED steps.
        """
        self.lr = learning_rate(self.optim, self.applied, total)
        for group in self.sharded.optimizer.param_groups:
            group["lr"] = self.lr
        self._clear()
        sums = self._accumulate(draw)
        if self.world.size > 1:
            dist.all_reduce(sums)
        self._last = sums
        self._items += sums[1]
        # Gradients were divided by the batch size beforehand, which keeps fp16 in range; the true divisor is the
        # number of items over all ranks and micro-batches.
        factor = (self.config.train.batch_size / self.scale.scale) / sums[1].clamp(min=1)

        def again() -> None:
            self._clear()
            self._accumulate(draw)

        applied = self.sharded.step(factor, self.optim.clip_norm, finite_only=self.scale.enabled, again=again)
        self.scale.update(applied)
        self.applied += applied
        self.skipped += not applied
        self.skipped_in_row = 0 if applied else self.skipped_in_row + 1
        if not self.scale.enabled:
            self._norms.append((draw, self.sharded.norms, self.sharded.named))
            if not applied or len(self._norms) == UNCHECKED:
                self.check()

    def _accumulate(self, draw: int, factor: float = 1.0) -> Tensor:
        """Backward over this rank's micro-batches. Returns its [loss sum, count], float64."""
        loss_sum = torch.zeros((), device=self.world.device)
        count = 0
        # Strategies average over ranks.
        scale = factor * self.scale.scale * self.world.size / self.config.train.batch_size
        shares = self.samples.shares(draw, self.world.rank, self.world.size, self.accumulation)
        for micro, share in enumerate(shares):
            seed_noise(self.world.device, self.config.train.seed, "noise", self.update.name, draw, self.world.rank, micro)
            heartbeat.batch_begins()
            began = time.perf_counter()
            batch = self.dataset.batch(share)
            self.data_wait_s += time.perf_counter() - began
            heartbeat.batch_ends()
            with self.sharded.accumulating(last=micro == len(shares) - 1):
                loss = self._loss(batch)
                heartbeat.beat()
                self.sharded.backward(loss.sum * scale)
            loss_sum += loss.sum.detach()
            count += loss.count
        return torch.stack([loss_sum.double(), loss_sum.new_full((), count, dtype=torch.float64)])

    def _loss(self, batch: Any) -> Loss:
        with autocast(self.config.train.precision, self.world.device):
            return self.update.loss(self.models, batch)

    def _clear(self) -> None:
        # Of all models: this update's loss may have reached into those of another.
        self.strategy.clear(self.all_models)

    def settle(self, draw: int) -> None:
        """Two backwards that leave no trace: see Strategy.settles."""
        buffers = [(b, b.clone()) for model in self.all_models for b in model.buffers()]
        for _ in range(2):
            self._accumulate(draw, factor=0.0)
        self._clear()
        for buffer, value in buffers:
            buffer.copy_(value)
        self.data_wait_s = 0.0

    def check(self) -> None:
        """Whether all gradients and losses so far were finite. Waits for the device.

        Raises:
            TrainingError: one was not.
        """
        norms, self._norms = self._norms, []
        if norms and not torch.cat([each for _, each, _ in norms]).isfinite().all():
            for draw, each, named in norms:
                if not all(finite := each.isfinite().tolist()):
                    raise self._not_finite(draw, named[finite.index(False)])
        step = (self.applied + self.skipped - 1) // self.update.draws + 1
        if self.skipped_in_row > SKIPS_IN_ROW:
            raise TrainingError(f"the gradients of update `{self.update.name}` overflowed in {self.skipped_in_row} steps in a "
                                f"row, up to step {step}", "lower optim.lr, or use train.precision=bf16 or fp32")
        if not torch.isfinite(self._last).all() and not self.skipped_in_row:
            raise TrainingError(f"the loss of update `{self.update.name}` is {self.last_loss()} at step {step}", MENDS)

    def _not_finite(self, draw: int, name: str | None) -> TrainingError:
        what = f"of `{name}`" if name else "of a parameter"
        return TrainingError(f"update `{self.update.name}`, step {draw // self.update.draws + 1}: the gradient {what} is not "
                             f"finite (the last loss is {self.last_loss():g})", MENDS)

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
        return {"applied": self.applied, "skipped": self.skipped, "in_row": self.skipped_in_row, "scale": self.scale.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.applied, self.skipped, self.skipped_in_row = state["applied"], state["skipped"], state["in_row"]
        self.scale.load_state(state["scale"])
