"""The weights that a run starts from or that an evaluation measures, from a checkpoint or from safetensors files.

Weights are found by name: `blocks.0.out.weight`, or `critic.blocks.0.out.weight` if the task has several models. The rest of
a checkpoint (optimizers, the position) is not read.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn

from trainers.checkpoints import averaging, manifest
from trainers.checkpoints.names import AVERAGES, MODELS, tensors_of_models
from trainers.config.schema import Init
from trainers.contract.errors import UserError
from trainers.contract.text import MOST_SHOWN, first_few
from trainers.engine.parallel.fragments import Fragment, fill, model_tensors
from trainers.engine.saving import storage
from trainers.engine.world import World


@dataclass(frozen=True)
class Place:
    """One tensor of the models. A tied tensor has several names."""

    key: str                # its name in a checkpoint
    shape: tuple[int, ...]
    names: tuple[str, ...]  # its names in weights, in the order in which they are tried
    floating: bool = True


Layout = Sequence[Place]


def layout(models: Mapping[str, nn.Module]) -> Layout:
    """List the tensors of the models. Call this before the models are placed."""
    places = []
    for model_name, model in models.items():
        prefix = f"{model_name}." if len(models) > 1 else ""
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(prefix + name)
        for name, tensor in model_tensors(model).items():
            places.append(Place(f"{MODELS}{model_name}/{name}", tuple(tensor.shape),
                                tuple(names.get(id(tensor), [prefix + name])), tensor.is_floating_point()))
    return places


class Source(Protocol):
    """Weights by name, in files."""

    @property
    def step(self) -> int | None:
        """The step of the checkpoint; None if the files are not a checkpoint."""

    @property
    def about(self) -> str:
        """Which weights of a run these are, in words in parentheses; empty if there is no choice."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor, by name."""

    @property
    def integers(self) -> Mapping[str, str]:
        """The dtypes of tensors that are known to hold integers, by name."""

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Return elements `start` to `start + count` of a tensor, flat [count], on the CPU."""
        ...


def open_source(path: Path, world: World, init: Init = Init()) -> Source:
    """Open a checkpoint or safetensors files. Every rank must call this: the ranks share the work of verifying a checkpoint.

    Args:
        init: says which weights of a checkpoint to take.

    Raises:
        UserError: the path does not exist, is broken, or holds no weights.
    """
    if (path / manifest.NAME).exists():
        return Checkpoint(path, world, init.raw, init.average or 1)
    if not path.exists():
        raise UserError(f"`{path}` does not exist any more, but this run starts from its weights (`init.source`)",
                        "put it back, or start a new run from other weights")
    try:
        return Files(path)
    except UserError:
        raise
    except Exception as error:  # reading a file in another format may raise anything
        raise UserError(f"the weights in `{path}` cannot be read: {error}",
                        "use safetensors files: see https://github.com/huggingface/safetensors") from error


class Checkpoint:
    """The models in a checkpoint that `launch` has written.

    Args:
        raw: take the trained weights, even if the checkpoint has an average of them (`train.ema`).
        count: if above 1, take the mean of the trained weights of this checkpoint and those before it.
    """

    def __init__(self, folder: Path, world: World, raw: bool, count: int):
        older = averaging.older(folder, count - 1)
        self.step, *steps = [_verified(each, world) for each in (folder, *older)]
        self.reader = storage.Reader(folder, older)
        keys = tensors_of_models(self.reader.shapes, raw or count > 1)
        self.about = ""
        if steps:
            self.about = f" ({averaging.mean_of(self.step, steps)})"
        elif any(key.startswith(AVERAGES) for key in keys.values()):
            self.about = " (averaged weights: train.ema)"
        one_model = len({model for model, _ in keys}) == 1
        self._keys = {name if one_model else f"{model}.{name}": key for (model, name), key in keys.items()}
        self.shapes = {name: self.reader.shapes[key] for name, key in self._keys.items()}
        self.integers: dict[str, str] = {}

    def read(self, name: str, start: int, count: int) -> Tensor:
        return self.reader.read(self._keys[name], start, count)


def _verified(folder: Path, world: World) -> int:
    """Verify a checkpoint, each rank its share of the files, and return the checkpoint's step.

    Raises:
        UserError: the checkpoint is broken.
    """
    problem = None
    try:
        step = json.loads((folder / manifest.NAME).read_text(encoding="utf-8"))["step"]
        entries = manifest.read(folder, step)["files"]
        by_size = sorted(entries, key=lambda name: (-entries[name]["size"], name))
        for name in by_size[world.rank::world.size]:
            manifest.check(folder, name, entries[name])
    except (manifest.Broken, OSError, ValueError, KeyError, TypeError) as error:
        problem = str(error)
    problems = [problem]
    if world.size > 1:
        problems = [None] * world.size
        dist.all_gather_object(problems, problem)
    if first_problem := next((problem for problem in problems if problem is not None), None):
        raise UserError(f"the checkpoint {folder} is broken: {first_problem}",
                        "use RUN@STEP to choose another checkpoint of a run")
    return step


class Files:
    """One safetensors file, or all safetensors files of a folder as Hugging Face's libraries write them."""

    step = None
    about = ""

    def __init__(self, path: Path):
        from safetensors import safe_open

        self._slices: dict[str, tuple[Any, Any]] = {}
        for file in _weight_files(path):
            opened = safe_open(file, framework="pt")
            for name in opened.keys():
                if name in self._slices:
                    raise UserError(f"`{name}` is in several files of `{path}`", "give one of the files as `init.source`")
                self._slices[name] = opened, opened.get_slice(name)
        self.shapes = {name: tuple(values.get_shape()) for name, (_, values) in self._slices.items()}
        types = {name: values.get_dtype() for name, (_, values) in self._slices.items()}
        self.integers = {name: kind for name, kind in types.items() if not kind.startswith(("F", "BF"))}

    def read(self, name: str, start: int, count: int) -> Tensor:
        opened, values = self._slices[name]
        shape = self.shapes[name]
        if not shape:
            return opened.get_tensor(name).reshape(1)
        row = math.prod(shape[1:])
        first, last = start // row, -(-(start + count) // row)
        return values[first:last].reshape(-1)[start - first * row:][:count]


def _weight_files(path: Path) -> list[Path]:
    """Return the file itself, or the safetensors files of a folder. Raises: UserError: the folder has none."""
    if not path.is_dir():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.exists():
        return sorted({path / Path(name).name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"`{path}` holds no checkpoint and no *.safetensors",
                        "give a run, the folder of a checkpoint, or safetensors files")
    return files


def load_weights(source: Source, models: Layout, fragments: Mapping[str, Fragment], skip: Sequence[str], where: str,
                 hint: str | None = None) -> str:
    """Copy the source's weights into the models' fragments. Return a sentence for the log that says what was loaded.

    Args:
        models: the tensors of the models, from `layout`.
        skip: names of modules and tensors. The models' tensors of these names keep their values, and the source's tensors of
            these names are ignored.
        where: what the source is, for messages.
        hint: how to fix weights that do not fit; None: advice about `init.skip`.

    Raises:
        UserError: the weights do not fit the models, or `skip` has a name that does not exist.
    """
    known = {name for place in models for name in place.names}
    skipped = {name for name in {*known, *source.shapes} if _is_in(name, skip)}
    _check_skip(skip, known | source.shapes.keys())
    loaded: dict[str, tuple[str, ...]] = {}  # by key: the names that the tensor has in the source
    problems: dict[str, str] = {}            # by name
    kept = []
    for place in models:
        wanted = [name for name in place.names if name not in skipped]
        if not wanted:
            kept.append(place.names[0])
            continue
        names = tuple(name for name in wanted if name in source.shapes)
        if not names:
            problems[wanted[0]] = f"`{wanted[0]}` is missing"
        for name in names:
            if source.shapes[name] != place.shape:
                problems[name] = f"`{name}` is {list(source.shapes[name])}, not {list(place.shape)}"
            elif place.floating and name in source.integers:
                problems[name] = f"`{name}` is quantized ({source.integers[name]})"
        loaded[place.key] = names
    ignored = sorted(name for name in source.shapes if name in skipped)
    problems |= {name: f"`{name}` is not in the model" for name in sorted(source.shapes) if name not in known | skipped}
    if problems:
        raise UserError(f"the weights of {where} do not fit the model: {first_few(list(problems.values()))}",
                        hint or _skip_hint(problems.keys(), known | source.shapes.keys(), skip))

    def read(key: str, start: int, count: int) -> Tensor:
        name, *others = loaded[key]
        values = source.read(name, start, count)
        for other in others:  # tied in the model, but perhaps not in the source
            if not values.equal(source.read(other, start, count)):
                raise UserError(f"`{name}` and `{other}` are tied in the model, but differ in the weights of {where}",
                                f"use init.skip=[{other}] to load only `{name}`")
        return values

    fill({key: fragment for key, fragment in fragments.items() if key in loaded},
         {place.key: place.shape for place in models if place.key in loaded}, read)
    message = f"weights of {where}{source.about}: {len(loaded)} tensors loaded"
    if kept:
        message += f"; not loaded because of init.skip: {first_few([f'`{name}`' for name in kept])}"
    if ignored:
        message += f"; ignored because of init.skip: {first_few([f'`{name}`' for name in ignored])}"
    return message


def _is_in(name: str, modules: Iterable[str]) -> bool:
    """Return whether the name is that of one of the modules or tensors, or of a tensor inside one of the modules."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _check_skip(skip: Sequence[str], names: Iterable[str]) -> None:
    """Raises: UserError: an entry of `skip` matches none of the names of tensors."""
    names = set(names)
    for module in skip:
        if not any(_is_in(name, [module]) for name in names):
            modules = {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}
            near = difflib.get_close_matches(module, modules, n=1)
            raise UserError(f"`init.skip` has `{module}`, which is no module or tensor of the model or of the weights",
                            f"did you mean `{near[0]}`?" if near else f"there is {first_few(sorted(modules))}")


def _skip_hint(bad: Iterable[str], names: Iterable[str], skip: Sequence[str]) -> str:
    """Return advice to skip the tensors that do not fit, by naming the largest modules in which no tensor fits."""
    bad = set(bad)
    good = set(names) - bad
    modules: dict[str, None] = {}
    for name in sorted(bad):
        parts = name.split(".")
        enclosing = [".".join(parts[:count]) for count in range(1, len(parts))]
        modules[next((module for module in enclosing if not any(_is_in(other, [module]) for other in good)), name)] = None
    if len(modules) > MOST_SHOWN or not good:
        return "check that these weights belong to this model; init.skip=[NAME, ...] leaves out modules that do not fit"
    return f"use init.skip=[{','.join([*skip, *modules])}] to leave these out: the model keeps its initial values there"
