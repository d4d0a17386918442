"""The interface of a task: the data, models, losses and measures that a task gives to the engine."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple, Protocol, Sequence

import numpy as np
from torch import Tensor, nn

from trainers.config.schema import Group, Optim, RunConfig
from trainers.contract.errors import UserError
from trainers.engine.world import World


@dataclass(frozen=True)
class Share:
    """The samples of one micro-batch on one rank, at least one.

    In an evaluation the whole evaluation set counts as one global batch.
    """

    indices: np.ndarray  # int64 [n]: rows of the data set
    slots: np.ndarray    # int64 [n]: positions of these samples in the global batch, from 0 to size - 1
    size: int            # number of samples in the global batch
    seed: int            # seed of the global batch, the same on every rank
    # int64 [n]: the epoch, from 0, in which each sample is drawn; 0 in an evaluation
    epochs: np.ndarray = None  # type: ignore[assignment]  # __post_init__ sets it
    # The batch has too few samples for all ranks and micro-batches: this is a sample of another share, so that every rank makes
    # the same number of forward passes. The engine counts neither its loss nor its measures and rows.
    filler: bool = False

    def __post_init__(self) -> None:
        if self.epochs is None:
            object.__setattr__(self, "epochs", np.zeros(len(self.indices), dtype=np.int64))

    def generator(self) -> np.random.Generator:
        """Return a new random generator, seeded for the global batch.

        Draw `size` values and use `values[slots]`. A sample then gets the same value with any number of ranks and
        micro-batches.
        """
        return np.random.Generator(np.random.Philox(self.seed))


class Dataset(Protocol):
    """A training set or an evaluation set. Every rank has the same samples in the same order.

    A data set whose samples have uneven lengths may also have an attribute `lengths`: whole numbers, [samples], or [samples,
    sides] for pairs. An evaluation then takes samples of similar lengths together, and `train.batch_tokens` can be used.

    A data set may also have a method `fingerprint()`, which returns a text that differs for other samples, and depends neither on
    the device nor on library versions. A run is not resumed on a data set with another fingerprint. Without the method, the
    fingerprint is a hash of `lengths` or of an attribute `targets`.
    """

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def batch(self, share: Share) -> Any:
        """Return the samples `share.indices`, on the rank's device. The task's own losses and measures receive the result.

        Augmentation draws from `share.generator()`. The global generators of Python, numpy and torch are seeded for each
        micro-batch of a rank: a resumed run draws the same values from them, but another number of ranks draws others.
        `normal` and `uniform` of trainers.engine.batches.noise draw on the device, and depend neither on the ranks nor on the
        micro-batches: a GAN's batch holds its noise beside the samples.
        """
        ...


class MapDataset(Protocol):
    """A data set of torch's map-style kind. The loop makes its batches of single samples, as `MapStyle` describes."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, row: int) -> Any:
        """Return one sample, on the CPU."""
        ...


class Loss(NamedTuple):
    """A loss before its division. The engine divides the sum by the count, both over all ranks and micro-batches.

    Attributes:
        sum: scalar with its autograd graph: the loss summed over `count` items.
        count: number of items (images, tokens): a number, or a scalar on the rank's device, which spares the host a wait
            (`mask.sum()`). In half precision it would not be exact.
    """

    sum: Tensor
    count: int | Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody calls on a Loss


# By name, (sum, count): the engine adds up both over all batches and ranks, then divides the sum by the count. The two may have
# any shapes that broadcast, for example [classes] and [classes], or [classes, classes] and a number.
# Or a plain tensor of any shape: the engine adds it up, and the task's `report` gets the sum, for a metric that is no mean
# (counts of n-grams, true positives). Integers are added up exactly, as int64.
Measures = Mapping[str, tuple[Tensor, Tensor | int] | Tensor]


@dataclass(frozen=True)
class Update:
    """One optimizer, the model that it trains and the loss that it lowers. A classifier has one update, a GAN has two.

    Updates are counted as follows. `train.steps` are training steps, in each of which every update takes its `draws` optimizer
    steps. An epoch of `train.epochs` is one pass over the training set by the update that draws most (of several, the first);
    an update that draws less passes more slowly. The learning rate of an update follows its own optimizer steps, so that
    `optim.warmup` counts these too. Updates draw the samples in orders of their own.

    While the loss of an update runs, only the model that it trains requires gradients. The gradient flows through other models,
    so a GAN's generator learns from its critic, and a critic's loss needs no `torch.no_grad` around the generator.
    """

    name: str                                             # different from the task's other updates
    trains: str                                           # name of the model whose parameters the optimizer changes
    loss: Callable[[Mapping[str, nn.Module], Any], Loss]  # (models by name, batch) -> Loss of one micro-batch
    draws: int = 1                                        # optimizer steps in each training step, each on a new global batch
    optim: Optim | None = None                            # settings of the optimizer; None: the run's `optim`


class Task:
    """Base class of tasks. Every rank makes one object of the task's class.

    A task with one model and one loss defines `data`, `model` and `loss`, and often `measure`.
    A task with several models or updates defines `data`, `models`, `updates` and `evaluate`.

    Attributes:
        config: the settings of the run.
        unit: what a Loss counts, in the plural. The displayed rate uses this word ("images" gives "1,234 images/s").
        trained_facts: in an evaluation of a checkpoint, what `facts` returned when the run trained; otherwise empty.
    """

    unit = "samples"
    trained_facts: Mapping[str, Any] = {}

    def __init__(self, config: RunConfig):
        self.config = config

    def prefetch(self) -> list[str]:
        """Download the files that `data` and `model` need, for ranks that have no internet access.

        `launch prefetch` calls this in a separate process before any rank starts. So does the submission to a cluster
        without internet, if `config.missing` names something to download.

        Returns:
            One line of text for each download, with the place where the files are now.

        Raises:
            UserError: a download failed.
        """
        return []

    def data(self, world: World) -> tuple[Dataset | MapDataset, Dataset | MapDataset | None]:
        """Return (training set, evaluation set or None). Every rank calls this.

        The batches of a `Dataset` must be on `world.device`. A map-style data set gives its samples on the CPU; wrapped as
        `MapStyle(data_set, workers=N)` of trainers.engine.map_style, worker processes make its batches.

        Raises:
            UserError: the data is missing or malformed.
            TypeError: the task does not define this method.
        """
        raise TypeError(f"{type(self).__name__} must define data(self, world)")

    def test_set(self, world: World) -> Dataset | MapDataset | None:
        """Return samples that neither train nor choose a checkpoint; None if the task has none. Called after `data`.

        At the end of a run, the best checkpoint by `checkpoint.metric` is evaluated on them once. Its metrics are `test_loss`
        and so on in run.json.

        Raises:
            UserError: the data is missing or malformed.
        """
        return None

    def facts(self) -> dict[str, Any]:
        """Return what the weights mean only together with: facts of the training data, by name. The engine calls this after
        `data`.

        For example the names of the classes in the order of the model's outputs, the statistics that normalise the inputs, or
        a vocabulary. JSON must be able to hold the values. Checkpoints and exports hold the facts. A run is not resumed on data
        with other facts. An evaluation sets `trained_facts` before `data`, so that the task can use them with other data.
        """
        return {}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold besides the models and optimizers, by name: a queue, running statistics, a counter.

        Buffers of the models need no place here, because a checkpoint holds them. Return the tensors that the task uses, not
        copies: a resumed run fills them in place. JSON must be able to hold all other values, which go to `load_state`. The
        state must be the same on all ranks: reduce or gather what goes into it. Change it in the loss, and not in an evaluation,
        which an interrupted run may repeat. The loss runs for filler shares too (`train.batch_tokens`): let the batch hold
        `share.filler` if their samples must stay out of the state. The state begins anew in a run that starts from the weights
        of another one (`init.source`); an evaluation of a checkpoint fills it too.
        """
        return {}

    def load_state(self, values: dict[str, Any]) -> None:
        """Take over the values of `state` that are not tensors, as JSON gives them back, by name."""

    def model(self) -> nn.Module:
        """Return a new model on the CPU. Every rank calls this, after `data`.

        `launch plan` calls this on torch's meta device and without `data`, to count parameters. If that raises an
        AttributeError, KeyError, TypeError or RuntimeError, `launch plan` calls `data` first.

        Initialize the model from torch's global generator: the engine has seeded that generator with the run's seed, the
        same on every rank.

        Raises:
            UserError: the model cannot be made from the settings.
            TypeError: the task does not define this method.
        """
        raise TypeError(f"{type(self).__name__} must define model(self)")

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        """Return the summed loss of one micro-batch and the number of items in that sum.

        Runs under autocast, in the run's precision. The batch has at least one sample. The default `measure` calls this too,
        with the model in evaluation mode.

        Args:
            batch: what `Dataset.batch` returned.

        Raises:
            TypeError: the task does not define this method.
        """
        raise TypeError(f"{type(self).__name__} must define loss(self, model, batch)")

    def measure(self, model: nn.Module, batch: Any) -> Measures:
        """Return the measures of one evaluation batch: (sum, count), or a plain sum, by name. The default measures the loss.

        Runs without gradients, under autocast, with the model in evaluation mode. All batches on all ranks return the same
        names, with the same shapes.
        """
        total, count = self.loss(model, batch)
        return {"loss": (total, count)}

    def report(self, measured: Mapping[str, Tensor], figures: Path | None) -> dict[str, float]:
        """Return the metrics of an evaluation by name. The default returns every measure that is a scalar, plain sums too.

        Args:
            measured: for each measure its sum divided by its count, over the whole evaluation set: float64 on the rank's
                device, in the shape that the two broadcast to, the same on every rank. Of a plain sum, the sum itself:
                int64 if it holds integers, otherwise float64.
            figures: an existing folder for pictures (*.png). None: draw no pictures. Only rank 0 draws, at the end of a run;
                `draw` draws during a run.
        """
        return {name: value.item() for name, value in measured.items() if value.ndim == 0}

    def models(self) -> dict[str, nn.Module]:
        """Return all models by name. The default is the one model that `model` returns, with the name "model"."""
        return {"model": self.model()}

    def updates(self) -> list[Update]:
        """Return the updates in the order in which each training step runs them. The default trains "model" by `loss`."""
        return [Update("model", trains="model", loss=lambda models, batch: self.loss(models["model"], batch))]

    def groups(self, update: Update, model: nn.Module) -> Sequence[Group]:
        """Return settings of the optimizer for parameters by name, for one update. The default returns none.

        For example a lower learning rate for an encoder that was trained before: [Group(match="encoder", lr_scale=0.1)]. With
        several models, the names of parameters begin with the name of the model. The user's `optim.groups` come first, and the
        first group that matches a parameter counts. A factor of `optim.layer_decay` is multiplied with `lr_scale`.

        Args:
            model: the model that the update trains.
        """
        return ()

    def huggingface(self, model: nn.Module, folder: Path) -> None:
        """Write the files that a Hugging Face export of `model` needs besides the weights into `folder`.

        These files are config.json and, if the model has a tokenizer, the tokenizer's files. The default writes the config of
        a transformers model, and nothing for any other model.
        """
        config = getattr(model, "config", None)
        if hasattr(model, "save_pretrained") and config is not None:
            config = copy.deepcopy(config)
            config.architectures = [type(model).__name__]
            config.save_pretrained(folder)
        generation_config = getattr(model, "generation_config", None)
        if generation_config is not None:
            generation_config.save_pretrained(folder)

    def evaluate(self, models: Mapping[str, nn.Module], batch: Any) -> Measures:
        """Return the measures of one evaluation batch, as `measure` does. The default calls `measure` with "model"."""
        return self.measure(models["model"], batch)

    def rows(self, models: Mapping[str, nn.Module], batch: Any) -> Sequence[Any]:
        """Return one row for each sample of a batch, in the order of the batch: what `launch predict` writes.

        A row is text (a translation, a tag sequence), or whatever JSON can hold. The batch is from the evaluation set, or from
        the data set that `inputs` returned. Runs without gradients, under autocast, with the models in evaluation mode.

        Every sample gets its row once, at any number of ranks. Ranks that share a model (fsdp) must run it equally often: under
        such a strategy, a decoder must run a fixed number of steps.

        Raises:
            TypeError: the task does not define this method.
        """
        raise TypeError(f"{type(self).__name__} must define rows(self, models, batch)")

    def inputs(self, lines: Sequence[str], world: World) -> Dataset | MapDataset:
        """Return a data set with one sample for each line of text, in order, for `rows`. Batches must be on `world.device`.

        The engine calls this in place of `data`, before `model`: the training data need not exist any more. `trained_facts`
        has what `facts` returned in training, for example the vocabulary. A line may be empty. The lines are read from a file
        when they are used, so that a large input need not fit in memory.

        Raises:
            UserError: the task takes no lines of text, or a line is wrong.
        """
        raise UserError(f"the task `{self.config.task}` takes no lines of text",
                        "`launch predict RUN --set eval` predicts the run's own evaluation set; your own task can define "
                        "inputs(self, lines, world)")

    def draw(self, models: Mapping[str, nn.Module], folder: Path | None, step: int) -> None:
        """Draw pictures (*.png) of this step into `folder`: samples of a generator, attention. The default draws nothing.

        The engine calls this after each evaluation that is due, also if there is no evaluation set, and W&B gets the pictures.
        Every rank calls this, because ranks may share a model and must run it together: run the same forward passes and
        collectives on every rank, then draw. Only rank 0 has a folder; on the others `folder` is None.

        Runs without gradients, under autocast, with the models in evaluation mode. torch's generators have the same seed on all
        ranks and at all steps, so noise from them gives comparable pictures, and the noise of training stays as it is. An error
        is a warning, and the run goes on, unless another rank waits in a collective for the rank that failed.
        """
