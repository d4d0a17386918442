"""Run one Update of a task: one optimizer step at a time, with its learning rate, loss scale and checks."""

from __future__ import annotations

import math
import numbers
import time
from contextlib import nullcontext
from dataclasses import dataclass
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
from trainers.engine.failures import memory_for
from trainers.engine.groups import ParameterGroup, grouped
from trainers.engine.parallel.buffers import replaced, snapshot
from trainers.engine.parallel.gradients import untrained, without_gradients
from trainers.engine.parallel.strategy import Strategy
from trainers.engine.precision import LossScale, autocast
from trainers.engine.schedule import learning_rate
from trainers.engine.task import Dataset, Loss, Share, Update
from trainers.engine.world import World

HINT = "lower optim.lr, set optim.clip_norm, or use train.precision=fp32; the checkpoints of earlier steps are whole"
CHECK_EVERY = 100  # optimizer steps after which gradients are checked, even if nothing was logged or saved meanwhile
MOST_SKIPS = 25    # steps skipped in a row: 25 halvings bring the loss scale of fp16 from 2**16 to below 1


@dataclass(frozen=True)
class Reading:
    """Numbers of one update, read from the device after a training step.

    Attributes:
        loss: mean loss of the last optimizer step over its global batch.
        norm: norm of the last optimizer step's gradients before clipping.
        items: items of all losses of this attempt, over all ranks.
        data_wait_s: seconds in which this rank has waited for batches in this attempt.
    """

    loss: float
    norm: float
    items: float
    data_wait_s: float

    @classmethod
    def nothing(cls) -> Reading:
        """Return the reading of an update that has not taken a step."""
        return cls(0.0, 0.0, 0.0, 0.0)


def read(runners: Sequence[UpdateRunner]) -> list[Reading]:
    """Read the numbers of all updates in one copy from the device. Waits for the device.

    Raises:
        TrainingError: a gradient since the last reading, or the last loss, is not finite, or fp16 skipped more than MOST_SKIPS
            steps in a row.
    """
    rows = torch.stack([runner.packed() for runner in runners]).tolist()
    return [runner.checked(values) for runner, values in zip(runners, rows)]


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
        self._untrained = untrained(models, update.trains)
        self._data_wait_s = 0.0  # seconds in which this rank has waited for batches
        self._items = torch.zeros((), dtype=torch.float64, device=world.device)  # items of all losses, over all ranks
        self._last = torch.zeros(2, dtype=torch.float64, device=world.device)  # [loss sum, count] of the last step
        # (draw, norms of the gradients, names of their parameters) of each step since the last check
        self._norms: list[tuple[int, Tensor, Sequence[str | None]]] = []

    def draws(self, step: int) -> range:
        """Return the numbers of the global batches that this update takes in training step `step` (from 0)."""
        return range(step * self.update.draws, (step + 1) * self.update.draws)

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
        factor = (self.split.batch / self.loss_scale.scale) / sums[1].where(sums[1] > 0, 1.0)

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
                read([self])

    def shares(self, draw: int) -> list[Share]:
        """Return this rank's micro-batches of global batch `draw`."""
        return self.samples.shares(draw, self.world.rank, self.world.size)

    def _accumulate(self, draw: int, factor: float = 1.0) -> Tensor:
        """Run forward and backward over this rank's micro-batches of global batch `draw`.

        Models that this update does not train get no gradients: the gradient only flows through them.

        Returns:
            [loss sum, count] of this rank, float64 [2], on the device.
        """
        with without_gradients(self._untrained):
            return self._accumulate_trained(draw, factor)

    def _accumulate_trained(self, draw: int, factor: float) -> Tensor:
        losses: list[Tensor] = []
        counts: list[Tensor] = []  # of the losses that count on the device
        count: float = 0  # of the losses that count on the host
        # The strategies average gradients over ranks. Multiplying by the number of ranks makes the average a sum.
        scale = factor * self.loss_scale.scale * self.world.size / self.split.batch
        shares = self.shares(draw)
        for micro, share in enumerate(shares):
            seed_noise(self.world.device, self.config.train.seed, "noise", self.update.name, draw, self.world.rank, micro)
            heartbeat.batch_begins()
            began = time.perf_counter()
            batch = self.dataset.batch(share)
            self._data_wait_s += time.perf_counter() - began
            heartbeat.batch_ends()
            # Where one sample alone does not fit, no smaller micro-batch fits.
            alone = memory_for("sample") if len(share.indices) == 1 else nullcontext()
            with self.sharded.accumulating(last=micro == len(shares) - 1), alone:
                loss = self._loss(batch)
                heartbeat.beat()
                self.sharded.backward(loss.sum * (0.0 if share.filler else scale))
            if share.filler:
                continue
            losses.append(loss.sum.detach().double())  # in fp64, also if the loss is in half precision
            if isinstance(loss.count, Tensor):
                counts.append(loss.count.double())
            else:
                count += loss.count
        return torch.stack([self._sum(losses), self._sum(counts, count)])

    def _sum(self, values: Sequence[Tensor], start: float = 0.0) -> Tensor:
        """Return the sum of float64 scalars, on the device, in few operations: a small model feels each of them."""
        if len(values) == 1 and not start:
            return values[0]
        total = torch.full((), start, dtype=torch.float64, device=self.world.device)
        for value in values:
            total += value
        return total

    def _loss(self, batch: Any) -> Loss:
        with autocast(self.config.train.precision, self.world.device):
            loss = self.update.loss(self.models, batch)
        if fault := _fault(loss):
            raise UserError(f"the loss of update `{self.update.name}` {fault}",
                            "return Loss(the loss summed over all items, the number of items): README, \"A task of your own\"")
        return loss

    def _clear_gradients(self) -> None:
        # Clear all models: the gradients of another update would take memory while this one runs.
        self.strategy.clear_gradients(self.all_models)

    def settle(self, draw: int) -> None:
        """Run two backwards and discard everything that they changed. `Strategy.needs_settling` says why."""
        with replaced(snapshot(self.all_models)):
            for _ in range(2):
                self._accumulate(draw, factor=0.0)
        self._clear_gradients()
        self._data_wait_s = 0.0

    def packed(self) -> Tensor:
        """Return the numbers that `checked` expects, float64 [5], on the device."""
        norms = [norms for _, norms, _ in self._norms]
        finite = torch.cat(norms).isfinite().all() if norms else torch.ones(())
        return torch.stack([*self._last, *(value.to(self._last) for value in (self.sharded.norm, self._items, finite))])

    def checked(self, values: Sequence[float]) -> Reading:
        """Return the reading of the values that `packed` returned.

        Raises:
            TrainingError: as `read` describes.
        """
        loss, count, norm, items, finite = values
        steps, self._norms = self._norms, []
        loss /= count if count > 0 else 1.0
        if not finite:
            for draw, norms, names in steps:
                if not all(each := norms.isfinite().tolist()):
                    raise self._not_finite(draw, names[each.index(False)], loss)
        step = (self.applied + self.skipped - 1) // self.update.draws + 1
        if self.skipped_in_row > MOST_SKIPS:
            raise TrainingError(f"the gradients of update `{self.update.name}` overflowed in {self.skipped_in_row} steps in a "
                                f"row, up to step {step}", "lower optim.lr, or use train.precision=bf16 or fp32")
        if not (math.isfinite(loss) and math.isfinite(count)) and not self.skipped_in_row:
            raise TrainingError(f"the loss of update `{self.update.name}` is {loss} at step {step}", HINT)
        return Reading(loss, norm, items, self._data_wait_s)

    def _not_finite(self, draw: int, name: str | None, loss: float) -> TrainingError:
        parameter = f"`{name}`" if name else "a parameter"
        return TrainingError(f"update `{self.update.name}`, step {draw // self.update.draws + 1}: the gradient of {parameter} "
                             f"is not finite (the last loss is {loss:g})", HINT)

    def state(self) -> dict[str, Any]:
        """Return the order of the samples, the counters and the loss scale, for a checkpoint's state.json."""
        return {"order": self.samples.order, "applied": self.applied, "skipped": self.skipped, "in_row": self.skipped_in_row,
                "scale": self.loss_scale.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned. Raises: UserError: the order of the samples is unknown."""
        self.samples.continue_in(state.get("order", NUMPY))  # older versions had one order, and did not name it
        self.applied, self.skipped, self.skipped_in_row = state["applied"], state["skipped"], state["in_row"]
        self.loss_scale.load_state(state["scale"])


def _fault(loss: object) -> str | None:
    """Return in words what is wrong with the loss that a task returned; None if it can be trained on."""
    if not isinstance(loss, Loss):
        return f"is a {type(loss).__name__}, but must be Loss(sum, count) of trainers.engine.task"
    total, count = loss
    if not isinstance(total, Tensor) or total.ndim or not total.is_floating_point():
        return f"has {_described(total)} as its sum, but the sum must be a tensor of one number"
    if not total.requires_grad:
        return ("does not depend on the parameters that the update trains: the sum was computed without gradients (under "
                "torch.no_grad, or from detached values), or from other models alone")
    if isinstance(count, Tensor):
        if count.ndim or count.is_complex() or count.dtype in (torch.bfloat16, torch.float16):
            return f"has {_described(count)} as its count, but the count must be one number, of integers or fp32"
    elif not isinstance(count, numbers.Real):
        return f"has {_described(count)} as its count, but the count must be one number"
    return None


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}"
