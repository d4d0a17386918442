"""Run one Update of a task: one optimizer step at a time, with its learning rate, loss scale and checks."""

from __future__ import annotations

import time
from typing import Any, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.config.schema import RunConfig
from trainers.contract import heartbeat
from trainers.contract.errors import TrainingError, UserError
from trainers.engine.batches.noise import seed_noise
from trainers.engine.batches.sampler import make_sampler
from trainers.engine.batches.sampling import NUMPY
from trainers.engine.ema import Average
from trainers.engine.groups import ParameterGroup, grouped
from trainers.engine.parallel.buffers import replaced, snapshot
from trainers.engine.parallel.strategy import Strategy
from trainers.engine.precision import LossScale, autocast
from trainers.engine.schedule import learning_rate
from trainers.engine.task import Dataset, Loss, Update
from trainers.engine.world import World

HINT = "lower optim.lr, set optim.clip_norm, or use train.precision=fp32; the checkpoints of earlier steps are whole"
CHECK_EVERY = 100  # optimizer steps after which gradients are checked, even if nothing was logged or saved meanwhile
MOST_SKIPS = 25    # steps skipped in a row: 25 halvings bring the loss scale of fp16 from 2**16 to below 1


class UpdateRunner:
    """Runs one Update. `take_step` does one optimizer step on one global batch.

    Every optimizer step is either applied, and then it changes the parameters, or skipped, because gradients overflowed in
    fp16. The learning rate follows the number of applied steps.

    Attributes:
        sharded: the trained model and its optimizer.
        samples: the global batches.
        loss_scale: the factor on the loss in fp16.
        applied: optimizer steps that changed the parameters.
        skipped: optimizer steps that changed nothing because gradients overflowed.
        skipped_in_row: the steps skipped since the last applied step.
        groups: the parameters that share settings of the optimizer.
        lr: learning rate of the last optimizer step, before the factors of groups.
        average: the averaged weights of the trained model (`train.ema`), which the loop sets; None: no average.
    """

    def __init__(self, update: Update, config: RunConfig, world: World, strategy: Strategy, dataset: Dataset,
                 models: Mapping[str, nn.Module], groups: Sequence[ParameterGroup] | None = None):
        """Make the optimizer of `models[update.trains]`. The strategy must have placed the models already.

        Args:
            groups: the parameter groups of the optimizer; None: those of the settings.
        """
        self.update, self.config, self.world, self.strategy, self.dataset = update, config, world, strategy, dataset
        self.optim = update.optim or config.optim
        model = models[update.trains]
        self.groups = grouped(model, self.optim, self.optim.groups) if groups is None else groups
        self.sharded = strategy.shard(model, self.optim, self.groups)
        # Only the trained model runs through its wrapper (DDP). A backward through the wrapper of another model would start
        # the reduction of that model's gradients.
        self.models = {**models, update.trains: self.sharded.module}
        self.all_models = list(models.values())
        self.loss_scale = LossScale(config.train.precision)
        self.split = config.batching(world.size)
        self.samples = make_sampler(dataset, self.split, config.train.seed, update.name)
        self.applied = self.skipped = self.skipped_in_row = 0
        self.lr = self.optim.lr
        self.average: Average | None = None
        self._data_wait_s = 0.0  # seconds spent making batches since the last call of `read_counters`
        self._items = torch.zeros((), dtype=torch.float64, device=world.device)  # items since then, over all ranks
        self._last = torch.zeros(2, dtype=torch.float64, device=world.device)  # [loss sum, count] of the last step
        # (draw, norms of the gradients, names of their parameters) of each step since the last check
        self._norms: list[tuple[int, Tensor, Sequence[str | None]]] = []

    @property
    def norm(self) -> Tensor:
        """The norm of the last step's gradients before clipping, a scalar on the device."""
        return self.sharded.norm

    def take_step(self, draw: int, total: int) -> None:
        """Do one optimizer step on one global batch.

        The host does not wait for the device, with two exceptions: fp16 must know whether the step was skipped, and ZeRO
        waits by itself.

        Args:
            draw: number of the global batch, counted from 0 for each update.
            total: number of applied steps at which the schedule of the learning rate ends.

        Raises:
            TrainingError: a gradient or loss is not finite. Checked every CHECK_EVERY steps, and when the strategy did not
                apply this step.
        """
        self.lr = learning_rate(self.optim, self.applied, total)
        for group in self.sharded.optimizer.param_groups:
            group["lr"] = self.lr * group["lr_scale"]
        self._clear_gradients()
        sums = self._accumulate(draw)
        if self.world.size > 1:
            dist.all_reduce(sums)
        self._last = sums
        self._items += sums[1]
        # The loss was divided by the batch size before the backward, to keep fp16 gradients in range. The right divisor is the
        # number of items over all ranks and micro-batches: the factor corrects the division.
        factor = (self.split.batch / self.loss_scale.scale) / sums[1].clamp(min=1)

        def repeat_backward() -> None:
            self._clear_gradients()
            self._accumulate(draw)

        applied = self.sharded.step(factor, self.optim.clip_norm, finite_only=self.loss_scale.enabled,
                                    repeat_backward=repeat_backward)
        self.loss_scale.adjust(applied)
        if applied and self.average is not None:
            self.average.update(self.applied)
        self.applied += applied
        self.skipped += not applied
        self.skipped_in_row = 0 if applied else self.skipped_in_row + 1
        if not self.loss_scale.enabled:
            self._norms.append((draw, self.sharded.norms, self.sharded.norm_names))
            if not applied or len(self._norms) == CHECK_EVERY:
                self.check_finite()

    def _accumulate(self, draw: int, factor: float = 1.0) -> Tensor:
        """Run forward and backward over this rank's micro-batches of global batch `draw`.

        Returns:
            [loss sum, count] of this rank, float64 [2], on the device.
        """
        loss_sum = torch.zeros((), device=self.world.device)
        count = 0
        # The strategies average gradients over ranks. Multiplying by the number of ranks makes the average a sum.
        scale = factor * self.loss_scale.scale * self.world.size / self.split.batch
        shares = self.samples.shares(draw, self.world.rank, self.world.size)
        for micro, share in enumerate(shares):
            seed_noise(self.world.device, self.config.train.seed, "noise", self.update.name, draw, self.world.rank, micro)
            heartbeat.batch_begins()
            began = time.perf_counter()
            batch = self.dataset.batch(share)
            self._data_wait_s += time.perf_counter() - began
            heartbeat.batch_ends()
            with self.sharded.accumulating(last=micro == len(shares) - 1):
                loss = self._loss(batch)
                heartbeat.beat()
                self.sharded.backward(loss.sum * (0.0 if share.filler else scale))
            if not share.filler:
                loss_sum += loss.sum.detach()
                count += loss.count
        return torch.stack([loss_sum.double(), loss_sum.new_full((), count, dtype=torch.float64)])

    def _loss(self, batch: Any) -> Loss:
        with autocast(self.config.train.precision, self.world.device):
            loss = self.update.loss(self.models, batch)
        if not isinstance(loss, Loss):
            raise UserError(f"the loss of update `{self.update.name}` is a {type(loss).__name__}, but must be "
                            "Loss(sum, count) of trainers.engine.task",
                            "return Loss(the loss summed over all items, the number of items): README, \"A task of your own\"")
        return loss

    def _clear_gradients(self) -> None:
        # Clear all models: the loss of this update may also depend on models that another update trains.
        self.strategy.clear_gradients(self.all_models)

    def settle(self, draw: int) -> None:
        """Run two backwards and discard everything that they changed. `Strategy.needs_settling` says why."""
        with replaced(snapshot(self.all_models)):
            for _ in range(2):
                self._accumulate(draw, factor=0.0)
        self._clear_gradients()
        self._data_wait_s = 0.0

    def check_finite(self) -> None:
        """Check that all gradients since the last check, and the last loss, are finite. Waits for the device.

        Raises:
            TrainingError: a gradient or the loss is not finite, or fp16 skipped more than MOST_SKIPS steps in a row.
        """
        steps, self._norms = self._norms, []
        if steps and not torch.cat([norms for _, norms, _ in steps]).isfinite().all():
            for draw, norms, names in steps:
                if not all(finite := norms.isfinite().tolist()):
                    raise self._not_finite(draw, names[finite.index(False)])
        step = (self.applied + self.skipped - 1) // self.update.draws + 1
        if self.skipped_in_row > MOST_SKIPS:
            raise TrainingError(f"the gradients of update `{self.update.name}` overflowed in {self.skipped_in_row} steps in a "
                                f"row, up to step {step}", "lower optim.lr, or use train.precision=bf16 or fp32")
        if not torch.isfinite(self._last).all() and not self.skipped_in_row:
            raise TrainingError(f"the loss of update `{self.update.name}` is {self.last_loss()} at step {step}", HINT)

    def _not_finite(self, draw: int, name: str | None) -> TrainingError:
        parameter = f"`{name}`" if name else "a parameter"
        return TrainingError(f"update `{self.update.name}`, step {draw // self.update.draws + 1}: the gradient of {parameter} "
                             f"is not finite (the last loss is {self.last_loss():g})", HINT)

    def last_loss(self) -> float:
        """Return the mean loss of the last step over its global batch. Waits for the device."""
        loss, count = self._last.tolist()
        return loss / max(count, 1.0)

    def read_counters(self) -> tuple[float, float]:
        """Return (items over all ranks, seconds spent making batches on this rank) since the last call, and reset both.

        Waits for the device.
        """
        values = self._items.item(), self._data_wait_s
        self._items.zero_()
        self._data_wait_s = 0.0
        return values

    def state(self) -> dict[str, Any]:
        """Return the order of the samples, the counters and the loss scale, for a checkpoint's state.json."""
        return {"order": self.samples.order, "applied": self.applied, "skipped": self.skipped, "in_row": self.skipped_in_row,
                "scale": self.loss_scale.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned. Raises: UserError: the order of the samples is unknown."""
        self.samples.continue_in(state.get("order", NUMPY))  # older versions had one order, and did not name it
        self.applied, self.skipped, self.skipped_in_row = state["applied"], state["skipped"], state["in_row"]
        self.loss_scale.load_state(state["scale"])
