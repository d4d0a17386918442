"""The typed schema of a run: what a spec may say. Imports no torch.

A task adds its own keys by a subclass that gives `model` and `data` a type::

    class MyConfig(RunConfig):
        model: MyModel = MyModel()
        data: MyData = MyData()
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from trainers.contract.errors import UserError
from trainers.contract.text import either

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Every = Union[PositiveInt, Literal["epoch", "never"]]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


def _name(text: str) -> str:
    # It begins a folder's name, a job's and an id in W&B.
    if not re.fullmatch(r"\w[\w.-]{0,79}", text):
        raise ValueError("must be made of letters, digits, `_`, `-` and `.`, and begin with neither of the last two")
    return text


def _reference(text: str) -> str:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", text):
        raise ValueError("must be of the form `module:Class`")
    return text


def _json_file(value: Any) -> Any:
    # Read where the user stands: the spec of a run holds what the file held then.
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(Path(value).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"must be JSON, or the path of its file: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"must be a JSON file: {error}") from None
    if not isinstance(found, dict):
        raise ValueError("must be a file that holds a JSON object")
    return found


Name = Annotated[str, AfterValidator(_name)]
Reference = Annotated[str, AfterValidator(_reference)]


class Section(BaseModel):
    """A part of a spec: no unknown key, no silent conversion, no later change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False,
                              ser_json_inf_nan="constants")


class Train(Section):
    epochs: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        None, description="passes over the training set; or give `steps`"
    )
    steps: Annotated[int, Field(gt=0, le=10**15)] | None = Field(None, description="optimizer steps; or give `epochs`")
    batch_size: Annotated[int, Field(gt=0, le=10**9)] = Field(64, description="samples in one optimizer step, over all ranks")
    micro_batch_size: Union[PositiveInt, Literal["auto"], None] = Field(
        None, description="samples one rank takes at a time; null: batch_size / ranks, no accumulation; auto: as many as fit"
    )
    precision: Precision = "fp32"
    strategy: Literal["ddp", "zero1", "zero2", "zero3", "fsdp"] = Field(
        "ddp", description="how a model is spread over ranks: ddp, copies; zero1 to zero3 (DeepSpeed) and fsdp, parts"
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none", description="kept in host memory: the optimizer's states (zero), or the parameters too (zero3, fsdp)"
    )
    checkpoint_activations: bool = Field(False, description="compute each block again in backward, to save memory")
    deepspeed: Annotated[dict[str, Any], BeforeValidator(_json_file)] = Field(
        default_factory=dict, description="of zero1 to zero3: DeepSpeed's own JSON, or the path of its file, merged into ours"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    compile: bool = Field(False, description="torch.compile the models")
    deterministic: bool = Field(True, description="deterministic kernels: needed for bit-equal resumption on GPUs")

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give one of train.epochs and train.steps")
        return self

    def split(self, ranks: int) -> tuple[int, int]:
        """(micro-batch size, accumulation) such that batch_size = ranks x micro-batch x accumulation; of `auto` the
        first that is tried, the largest.

        Raises:
            UserError: the batch does not divide; the hint lists what would.
        """
        if self.batch_size % ranks:
            near = sorted({max(1, self.batch_size // ranks) * ranks, (self.batch_size // ranks + 1) * ranks})
            fits = [n for n in range(1, min(self.batch_size, 4 * ranks) + 1) if self.batch_size % n == 0]
            raise UserError(
                f"`train.batch_size` is {self.batch_size}, not a multiple of {ranks} ranks",
                f"use train.batch_size={either(near)}, or {_listed(fits)} ranks",
            )
        share = self.batch_size // ranks
        micro = share if self.micro_batch_size in (None, "auto") else self.micro_batch_size
        if share % micro:
            fits = [n for n in range(1, share + 1) if share % n == 0]
            raise UserError(
                f"`train.micro_batch_size` is {micro}, which does not divide the {share} samples of "
                f"each of {ranks} rank(s) (`train.batch_size` is {self.batch_size})",
                f"use train.micro_batch_size={_listed(fits)}",
            )
        return micro, share // micro


def _listed(numbers: list[int], most: int = 12) -> str:
    """'1, 2 or 4', the largest `most` of them."""
    shown = [str(n) for n in numbers[-most:]]
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " or " + shown[-1]


class Optim(Section):
    name: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: PositiveFloat = Field(1e-3, description="the highest learning rate of the schedule")
    momentum: Fraction = Field(0.9, description="of sgd")
    nesterov: bool = Field(False, description="of sgd")
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = Field([0.9, 0.999], description="of adam")
    eps: PositiveFloat = Field(1e-8, description="of adam")
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat | None = Field(None, description="largest gradient norm")
    schedule: Literal["constant", "cosine", "linear", "onecycle"] = "constant"
    warmup: Annotated[float, Field(ge=0)] = Field(
        0.0, description="linear warm-up (onecycle: the rise): below 1 a share of all steps, else steps"
    )
    final_lr: Fraction = Field(0.0, description="where cosine and linear end, as a share of lr")


class Init(Section):
    source: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="weights to start from: a run (RUN, RUN@best or RUN@STEP), or safetensors (a file or a folder)"
    )
    skip: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="modules and tensors, [head, blocks.0], that start afresh, not from `source`"
    )

    @model_validator(mode="after")
    def _of_something(self) -> "Init":
        if self.skip and self.source is None:
            raise ValueError("init.skip is given without init.source")
        return self


class Log(Section):
    every: PositiveInt = Field(10, description="steps between logged ones; 1 logs each")


class Eval(Section):
    every: Every = Field("epoch", description="steps, `epoch` or `never`; the end is evaluated too unless `never`")
    batch_size: PositiveInt | None = Field(None, description="samples one rank evaluates at a time; null: 4 x micro-batch")
    only: bool = Field(False, description="evaluate the weights of init.source once, and train nothing: as `launch eval` does")


class Checkpoint(Section):
    every: Every = Field("epoch", description="steps, `epoch` or `never`; the end is saved in any case")
    layout: Literal["full", "sharded"] = Field("sharded", description="full: rank 0 writes all; sharded: each rank a part")
    keep_last: PositiveInt = Field(2, description="the newest ones that are kept")
    keep_best: Annotated[int, Field(ge=0)] = Field(1, description="the best ones by `metric` that are kept besides")
    keep_every: PositiveInt | None = Field(None, description="keep each whose step is a multiple of this, for good")
    metric: str | None = Field(None, description="the evaluation's metric by which a checkpoint is good")
    mode: Literal["max", "min"] = Field("max", description="whether more of `metric` is better")


class Wandb(Section):
    mode: Literal["online", "offline", "off"] = "off"
    project: str = "launch"
    entity: str | None = None


class Run(Section):
    max_restarts: Annotated[int, Field(ge=0)] = Field(0, description="new attempts after failures")
    grace_s: PositiveFloat = Field(60.0, description="seconds between asking ranks to stop and killing them")


class WatchedRun(Run):
    # Less than NCCL's own 600 s: where that comes first, ranks that only waited end, and by a signal.
    hang_s: PositiveFloat | None = Field(
        300.0, description="seconds without progress after which ranks hang: the attempt has failed; null: never"
    )
    start_s: PositiveFloat | None = Field(
        None, description="the same until a rank's first step, and in reports, which may take long; null: never"
    )


class TaskConfig(Section):
    """What the runs of all tasks have."""

    name: Name = Field(description="what the run's id begins with")
    task: Reference = Field(description="the task's class, `module:Class`")
    config: Reference | None = Field(
        None, description="its config class, `module:Class`, a subclass of trainers.config.RunConfig"
    )
    path: str | None = Field(None, description="the folder of a user's own modules: comes last on sys.path")

    def check(self) -> None:
        """What can be refused before a rank starts; reads the file system; raises UserError."""

    def missing(self, environment: Mapping[str, str] = os.environ) -> list[str]:
        """What ranks with this environment would have to download, in words. Asks the file system, and nobody else."""
        return []


class RunConfig(TaskConfig):
    """What a run of a training task is."""

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
    def _something_to_evaluate(self) -> "RunConfig":
        if self.eval.only and self.init.source is None:
            raise ValueError("eval.only is given without init.source, whose weights are to be evaluated")
        return self

    def evaluation_batch(self, ranks: int) -> int:
        """Samples that one rank evaluates at a time.

        Raises:
            UserError: the training batch does not divide over the ranks, as it must where there is training.
        """
        if self.eval.batch_size is not None:
            return self.eval.batch_size
        try:
            return 4 * self.train.split(ranks)[0]
        except UserError:
            if not self.eval.only:
                raise
            micro = self.train.micro_batch_size
            return 4 * (micro if isinstance(micro, int) else max(1, self.train.batch_size // ranks))


class SearchConfig(TaskConfig):
    """What a run of a task without steps is, which runs itself (trainers/runner.py), on CPUs."""

    model: Any = Field(default_factory=dict)
    data: Any = Field(default_factory=dict)
    search: Any = Field(default_factory=dict)
    wandb: Wandb = Wandb()
    run: Run = Run()


class ScriptConfig(Section):
    """What a run of a user's own script is."""

    name: Name = Field(description="what the run's id begins with")
    script: str = Field(description="absolute path")
    args: list[str] = []
    run: Run = Run()
