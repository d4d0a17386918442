"""The typed schema of a run: the keys and values that a spec may have. Imports no torch.

A task adds its own keys with a subclass that gives `model` and `data` a type::

    class MyConfig(RunConfig):
        model: MyModel = MyModel()
        data: MyData = MyData()
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from trainers.config.batching import Batching
from trainers.contract.home import expanded

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Every = Union[PositiveInt, Literal["epoch", "never"]]
Fraction = Annotated[float, Field(ge=0, le=1)]
Betas = Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Pattern = Annotated[str, Field(min_length=1)]


def _name(text: str) -> str:
    # The name is the start of a folder's name, of a SLURM job's name and of an id in W&B.
    if not re.fullmatch(r"\w[\w.-]{0,79}", text):
        raise ValueError("must be 1 to 80 letters, digits, `_`, `-` and `.`, and start with a letter, a digit or `_`")
    return text


def _reference(text: str) -> str:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", text):
        raise ValueError("must be of the form `module:Class`")
    return text


def _json_file(value: Any) -> Any:
    # Read the file now, while relative paths are still right. The run's spec then holds the file's content, not its path.
    if not isinstance(value, str):
        return value
    try:
        content = json.loads(expanded(value).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"must be a JSON object or the path of a JSON file: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"must be a JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError("must be a JSON file that holds an object")
    return content


Name = Annotated[str, AfterValidator(_name)]
Reference = Annotated[str, AfterValidator(_reference)]


class Section(BaseModel):
    """A part of a spec. It accepts no unknown key, converts no value silently, and cannot be changed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False,
                              ser_json_inf_nan="constants")


class Train(Section):
    epochs: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        None, description="number of passes over the training set (of several updates: by the one that draws most); give "
                          "`epochs` or `steps`"
    )
    steps: Annotated[int, Field(gt=0, le=10**15)] | None = Field(
        None, description="number of training steps; give `steps` or `epochs`"
    )
    batch_size: Annotated[int, Field(gt=0, le=10**9)] | None = Field(
        None, description="number of samples in one optimizer step, over all ranks; 64 unless `batch_tokens` is given"
    )
    batch_tokens: Annotated[int, Field(gt=0, le=10**12)] | None = Field(
        None, description="instead of `batch_size`: the most tokens in one optimizer step, over all ranks, in samples of similar "
                          "length; padding counts, and so does each side of a pair"
    )
    micro_batch_size: Union[PositiveInt, Literal["auto"], None] = Field(
        None, description="most samples (with `batch_tokens`: tokens) that one rank computes at a time; null: its whole part of "
                          "the batch, without gradient accumulation; auto: as many as fit in memory"
    )
    precision: Precision = "fp32"
    strategy: Literal["ddp", "zero1", "zero2", "zero3", "fsdp"] = Field(
        "ddp", description="how the model is distributed over ranks; ddp: each rank holds a copy; zero1, zero2, zero3 "
                           "(DeepSpeed) and fsdp: each rank holds a part"
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none", description="what to keep in host memory: optimizer states (zero1, zero2, zero3), or parameters too (zero3, fsdp)"
    )
    checkpoint_activations: bool = Field(False, description="compute each block again in the backward pass, to save memory")
    sync_batchnorm: bool = Field(
        False, description="BatchNorm uses the statistics of the micro-batches of all ranks; false: each rank of its own"
    )
    deepspeed: Annotated[dict[str, Any], BeforeValidator(_json_file)] = Field(
        default_factory=dict, description="for zero1, zero2 and zero3: your own DeepSpeed settings, merged over launch's; an "
                                          "object, or the path of a JSON file"
    )
    patience: PositiveInt | None = Field(
        None, description="stop early once `checkpoint.metric` has not become better in so many evaluations in a row; null: never"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of an exponential moving average of the weights, for example 0.999: evaluations and exports use "
                          "the average; null: no average"
    )
    compile: bool = Field(False, description="compile the models with torch.compile")
    deterministic: bool | Literal["warn"] = Field(
        True, description="use deterministic kernels; an operation without one makes the run continue with warnings; warn: with "
                          "warnings from the start; false: use the fastest kernels, so a resumed run on GPUs may differ slightly"
    )

    @model_validator(mode="before")
    @classmethod
    def _default_batch(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("batch_size") is None and values.get("batch_tokens") is None:
            return {**values, "batch_size": 64}
        return values

    @model_validator(mode="after")
    def _size_or_tokens(self) -> "Train":
        if self.batch_size is not None and self.batch_tokens is not None:
            raise ValueError("give one of train.batch_size and train.batch_tokens")
        return self

    @model_validator(mode="after")
    def _epochs_or_steps(self) -> "Train":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give one of train.epochs and train.steps")
        return self


class Group(Section):
    """Parameters for which the optimizer has settings of their own."""

    match: Pattern | Annotated[list[Pattern], Field(min_length=1)] = Field(
        description="names of parameters, or of modules that hold them; `*` stands for any text: head, *.bias, [embed*, blocks.0]"
    )
    lr_scale: NonNegativeFloat = Field(1.0, description="factor on the learning rate")
    weight_decay: NonNegativeFloat | None = Field(None, description="null: that of `optim`, as for the keys below")
    momentum: Fraction | None = Field(None, description="for sgd")
    betas: Betas | None = Field(None, description="for adam and adamw")
    eps: PositiveFloat | None = Field(None, description="for adam and adamw")

    @model_serializer(mode="wrap")
    def _without_null(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Without this, most of a printed group would be null.
        return {key: value for key, value in serialize(self).items() if value is not None}

    @property
    def patterns(self) -> list[str]:
        return [self.match] if isinstance(self.match, str) else self.match


class Optim(Section):
    name: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: PositiveFloat = Field(1e-3, description="the highest learning rate of the schedule")
    momentum: Fraction = Field(0.9, description="momentum, for sgd")
    nesterov: bool = Field(False, description="Nesterov momentum, for sgd")
    betas: Betas = Field(
        [0.9, 0.999], description="the two betas, for adam and adamw"
    )
    eps: PositiveFloat = Field(1e-8, description="epsilon, for adam and adamw")
    weight_decay: NonNegativeFloat = 0.0
    decay_norms_and_biases: bool = Field(
        True, description="false: no weight decay for biases and for the parameters of norms, as is usual for transformers"
    )
    groups: list[Group] = Field(
        default_factory=list, description="settings for parameters by name; the first group that matches a parameter counts"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="factor on the learning rate from each block to the block before it, for fine-tuning; null: none"
    )
    clip_norm: PositiveFloat | None = Field(None, description="clip gradients to this norm; null: no clipping")
    schedule: Literal["constant", "cosine", "linear", "onecycle", "inverse_sqrt"] = Field(
        "constant", description="after the warm-up; inverse_sqrt: falls as 1 / sqrt(step), and needs a warm-up"
    )
    warmup: Annotated[float, Field(ge=0)] = Field(
        0.0, description="length of the linear warm-up (onecycle: of the rise): below 1, a fraction of all steps; otherwise a "
                         "number of steps"
    )
    final_lr: Fraction = Field(0.0, description="learning rate at the end of cosine and linear, as a fraction of lr")

    @model_validator(mode="after")
    def _groups_fit_the_optimizer(self) -> "Optim":
        if key := self.foreign_key(self.groups):
            raise ValueError(f"optim.groups sets `{key}`, which optim.name={self.name} does not have")
        return self

    def foreign_key(self, groups: Iterable[Group]) -> str | None:
        """Return a key that one of these groups sets and that the optimizer `name` does not have; None if there is none."""
        keys = ("betas", "eps") if self.name == "sgd" else ("momentum",)
        return next((key for group in groups for key in keys if getattr(group, key) is not None), None)

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "Optim":
        if self.name == "sgd" and self.nesterov and not self.momentum:
            raise ValueError("optim.nesterov is true, but optim.momentum is 0")
        return self

    @model_validator(mode="after")
    def _inverse_sqrt_needs_warmup(self) -> "Optim":
        if self.schedule == "inverse_sqrt" and not self.warmup:
            raise ValueError("optim.schedule=inverse_sqrt needs optim.warmup, the steps until the learning rate is optim.lr and "
                             "begins to fall: for example optim.warmup=4000, or 0.1 for a tenth of all steps")
        return self


class Init(Section):
    source: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="weights to start from: of a run (RUN, RUN@best or RUN@STEP), or of safetensors (a file or a folder)"
    )
    skip: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="modules and tensors that are not loaded from `source`, for example [head, blocks.0]"
    )

    average: Annotated[int, Field(ge=2)] | None = Field(
        None, description="the mean of the trained weights of so many checkpoints of a run: of `source` and those before it"
    )
    raw: bool = Field(False, description="of a run with `train.ema`, take the trained weights; false: take their average")

    @model_validator(mode="after")
    def _only_with_source(self) -> "Init":
        for key in ("skip", "raw", "average"):
            if getattr(self, key) and self.source is None:
                raise ValueError(f"init.{key} is given without init.source")
        return self


class Log(Section):
    every: PositiveInt = Field(10, description="log every so many steps; 1: every step")


class Rows(Section):
    """What `launch predict` asks of its ranks."""

    format: Literal["text", "json"] = Field("text", description="text: a row that is text is one line, all others are JSON; "
                                                                "json: every row is JSON")
    lines: str | None = Field(None, description="file with one input in each line; null: the samples of `set`")
    set: Literal["eval", "test"] = Field("eval", description="without `lines`: the task's evaluation set or test set")
    output: str | None = Field(None, description="file for the rows; null: rows.txt in the run's folder")


class Eval(Section):
    every: Every = Field(
        "epoch", description="when to evaluate: a number of steps, `epoch` or `never`; the end is also evaluated, unless `never`"
    )
    batch_size: PositiveInt | None = Field(
        None, description="number of samples that one rank evaluates at a time; null: 4 x the micro-batch size"
    )
    batch_tokens: PositiveInt | None = Field(
        None, description="instead of `batch_size`: the most tokens that one rank evaluates at a time; null: 4 x the micro-batch "
                          "size, where that counts tokens"
    )
    report_s: PositiveFloat | None = Field(
        1800.0, description="like run.hang_s, but while the task's `report` computes metrics or draws figures; null: "
                            "never, as with `run.hang_s: null`"
    )
    only: bool = Field(False, description="evaluate the weights of init.source once and do not train, as `launch eval` does")
    rows: Rows | None = Field(None, description="with `only`: write the task's rows in place of measures, as `launch predict`")

    @model_validator(mode="after")
    def _size_or_tokens(self) -> "Eval":
        if self.batch_size is not None and self.batch_tokens is not None:
            raise ValueError("give one of eval.batch_size and eval.batch_tokens")
        return self


# Words in the names of metrics, by which values are better.
LOWER = re.compile(r"(^|[^a-z])(loss|error|errors|err|perplexity|ppl|mse|rmse|mae|mape|msle|nll|bpc|wer|cer|ter|fid|kid|brier"
                   r"|distance|divergence)([^a-z]|$)")
HIGHER = re.compile(r"(^|[^a-z])(top\d*|acc|accuracy|f\d|bleu\d?|chrf\d?|rouge\w*|auc|auroc|auprc|ap|map|miou|iou|dice|r2|mcc"
                    r"|kappa|precision|recall|score|reward|psnr|ssim|spearman|pearson|correlation)([^a-z]|$)")


def better(metric: str) -> Literal["max", "min"] | None:
    """Tell from a metric's name whether higher (max) or lower (min) values are better; None if the name does not tell."""
    name = metric.lower().replace("_", " ")
    lower, higher = LOWER.search(name) is not None, HIGHER.search(name) is not None
    return None if lower == higher else "min" if lower else "max"


class Checkpoint(Section):
    every: Every = Field(
        "epoch", description="when to save a checkpoint: a number of steps, `epoch` or `never`; the end is always saved"
    )
    layout: Literal["full", "sharded"] = Field(
        "sharded", description="full: rank 0 writes everything; sharded: each rank writes a part"
    )
    keep_last: PositiveInt = Field(2, description="how many of the newest checkpoints to keep")
    keep_best: Annotated[int, Field(ge=0)] = Field(1, description="how many of the best checkpoints by `metric` to keep as well")
    keep_every: PositiveInt | None = Field(
        None, description="never delete a checkpoint whose step is a multiple of this number"
    )
    metric: str | None = Field(None, description="the evaluation metric that decides which checkpoints are best")
    mode: Literal["max", "min"] | None = Field(
        None, description="max: higher values of `metric` are better; min: lower values are; null: told from the metric's name"
    )

    @model_validator(mode="before")
    @classmethod
    def _tell_mode(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("mode") is not None or not isinstance(values.get("metric"), str):
            return values
        return {**values, "mode": better(values["metric"])}

    @model_validator(mode="after")
    def _mode_is_known(self) -> "Checkpoint":
        if self.metric is not None and self.mode is None:
            raise ValueError(f"checkpoint.mode must be max or min: the name `{self.metric}` does not tell whether higher or "
                             "lower values are better")
        return self

    @property
    def best_by(self) -> str | None:
        """What makes a checkpoint one of the best, in words; None if none is kept for being good."""
        if self.metric is None or not self.keep_best:
            return None
        return f"{self.metric} ({'highest' if self.mode == 'max' else 'lowest'})"


class Wandb(Section):
    mode: Literal["online", "offline", "off"] = "off"
    project: str = "launch"
    entity: str | None = None


class Run(Section):
    max_restarts: Annotated[int, Field(ge=0)] = Field(0, description="how many new attempts to start after failures")
    grace_s: PositiveFloat = Field(60.0, description="seconds from asking ranks to stop until they are killed")
    include: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="on SLURM: patterns of further files to copy with the code, whatever their size")
    leave_out: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="on SLURM: patterns of files that a run can do without and that are not copied")


class WatchedRun(Run):
    # Less than the timeout of torch's process groups (30 minutes), which kills ranks that only wait for the rank that hangs.
    hang_s: PositiveFloat | None = Field(
        300.0, description="seconds without progress after which a rank counts as hung and the attempt fails; null: never"
    )
    start_s: PositiveFloat | None = Field(
        None, description="like hang_s, but before a rank's first step and at the end of a run, which may take long; null: never"
    )


class TaskConfig(Section):
    """The keys that a run of any task has.

    Attributes:
        seed_keys: the keys that `--seeds` sets to the seed. Tables show the first one. Empty: the task has no seed.
    """

    seed_keys: ClassVar[tuple[str, ...]] = ()

    name: Name = Field(description="the first part of the run's id")
    task: Reference = Field(description="the task's class, as `module:Class`")
    config: Reference | None = Field(
        None, description="the task's config class, as `module:Class`; a subclass of trainers.config.RunConfig"
    )
    path: str | None = Field(None, description="folder of the user's own modules; it comes last on sys.path")

    def check(self) -> None:
        """Check what can be checked before a rank starts. May read the file system.

        Raises:
            UserError: a value cannot work.
        """

    def missing(self, environment: Mapping[str, str] = os.environ) -> list[str]:
        """Return in words what ranks with this environment would have to download. Looks only at the file system."""
        return []


class RunConfig(TaskConfig):
    """A run of a training task."""

    seed_keys = ("train.seed",)

    model: Any = Field(default_factory=dict)
    data: Any = Field(default_factory=dict)
    train: Train = Field(description="give `train.epochs` or `train.steps`")
    optim: Optim = Optim()
    init: Init = Init()
    log: Log = Log()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    wandb: Wandb = Wandb()
    run: WatchedRun = WatchedRun()

    @model_validator(mode="after")
    def _patience_needs_a_metric(self) -> "RunConfig":
        if self.train.patience is not None and self.checkpoint.metric is None:
            raise ValueError("train.patience is given without checkpoint.metric, which names what must become better")
        if self.train.patience is not None and self.eval.every == "never":
            raise ValueError("train.patience counts evaluations, but eval.every is never")
        return self

    @model_validator(mode="after")
    def _only_needs_source(self) -> "RunConfig":
        if self.eval.only and self.init.source is None:
            raise ValueError("eval.only is given without init.source, which names the weights to evaluate")
        if self.eval.rows is not None and not self.eval.only:
            raise ValueError("eval.rows is for `launch predict`, which also sets eval.only")
        return self

    def batching(self, ranks: int) -> Batching:
        """Return how the batches of training and evaluation are split over `ranks` ranks.

        Raises:
            UserError: the run trains, and the ranks cannot share its batch.
        """
        split = Batching.of(ranks, vars(self.train), vars(self.eval))
        if not self.eval.only:
            split.check()
        return split


class SearchConfig(TaskConfig):
    """A run of a task without steps (a search), which runs itself (trainers/runner.py) on CPUs."""

    model: Any = Field(default_factory=dict)
    data: Any = Field(default_factory=dict)
    search: Any = Field(default_factory=dict)
    wandb: Wandb = Wandb()
    run: Run = Run()


class ScriptTrain(Section):
    """Settings for scripts that use accelerate. Other scripts do not see them."""

    strategy: Literal["ddp", "zero1", "zero2", "zero3", "fsdp"] | None = None
    precision: Literal["fp32", "bf16", "fp16", "fp8"] | None = None


class ScriptConfig(Section):
    """A run of a user's own script."""

    name: Name = Field(description="the first part of the run's id")
    script: str = Field(description="absolute path of the script, or of the module's file")
    module: str | None = Field(None, description="name of the module to run as `python -m` does; null: run the file")
    path: str | None = Field(None, description="folder that comes first on PYTHONPATH; null: none")
    args: list[str] = []
    train: ScriptTrain = ScriptTrain()
    accelerate: dict[str, Any] = Field(default_factory=dict, description="keys of accelerate's config file")
    accelerate_env: dict[str, str] = Field(default_factory=dict, description="the variables that accelerate sets from these")
    deepspeed: dict[str, Any] | None = Field(None, description="the content of the file `deepspeed_config_file`")
    run: Run = Run()
