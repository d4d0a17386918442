"""Weights that a run starts from, or that an evaluation is of: a checkpoint's, or those in files of safetensors.

They are taken by name: `blocks.0.out.weight`, where there are several models `critic.blocks.0.out.weight`. What a
checkpoint holds besides (optimizers, the position) is left.
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

from trainers.checkpoints import manifest
from trainers.contract.errors import UserError
from trainers.engine.parallel.fragments import Fragment, fill, state
from trainers.engine.saving import storage
from trainers.engine.world import World

MOST_SHOWN = 4


@dataclass(frozen=True)
class Place:
    """A tensor of the models. Tied ones have several names, in whose order they are looked for."""

    key: str               # in a checkpoint
    shape: tuple[int, ...]
    names: tuple[str, ...]
    floating: bool = True


Layout = Sequence[Place]


def layout(models: Mapping[str, nn.Module]) -> Layout:
    """Of models that are not yet placed."""
    found = []
    for model_name, model in models.items():
        prefix = f"{model_name}." if len(models) > 1 else ""
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(prefix + name)
        for name, tensor in state(model).items():
            found.append(Place(f"models/{model_name}/{name}", tuple(tensor.shape),
                               tuple(names.get(id(tensor), [prefix + name])), tensor.is_floating_point()))
    return found


class Source(Protocol):
    step: int | None  # of the checkpoint
    shapes: Mapping[str, tuple[int, ...]]
    integers: Mapping[str, str]  # the type of those that are known to hold whole numbers

    def read(self, name: str, start: int, count: int) -> Tensor:
        """`count` elements from `start` on, flat, on the CPU."""
        ...


def open_source(path: Path, world: World) -> Source:
    """On all ranks, which verify a checkpoint's files together.

    Raises:
        UserError: it is gone or broken, or holds no such thing.
    """
    if (path / manifest.NAME).exists():
        return Checkpoint(path, world)
    if not path.exists():
        raise UserError(f"there is no `{path}` any more, whose weights this run starts from (`init.source`)",
                        "put it back, or start a new run from other weights")
    try:
        return Files(path)
    except UserError:
        raise
    except Exception as error:  # whatever a file that is none makes of its reader
        raise UserError(f"the weights in `{path}` cannot be read: {error}",
                        "they must be files of safetensors: see https://github.com/huggingface/safetensors") from error


class Checkpoint:
    """The models of one of our checkpoints."""

    def __init__(self, folder: Path, world: World):
        self.step = _verified(folder, world)
        self._reader = storage.Reader(folder)
        shapes = {key: shape for key, shape in self._reader.shapes.items() if key.startswith("models/")}
        alone = len({key.split("/")[1] for key in shapes}) == 1
        self._keys = {key.split("/", 2)[2] if alone else key.removeprefix("models/").replace("/", ".", 1): key for key in shapes}
        self.shapes = {name: shapes[key] for name, key in self._keys.items()}
        self.integers: dict[str, str] = {}

    def read(self, name: str, start: int, count: int) -> Tensor:
        return self._reader.read(self._keys[name], start, count)


def _verified(folder: Path, world: World) -> int:
    """The step of a whole checkpoint; each rank reads its share of the files."""
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
    if problem := next((each for each in problems if each is not None), None):
        raise UserError(f"the checkpoint {folder} is broken: {problem}", "choose another: RUN@STEP names one of a run")
    return step


class Files:
    """One file of safetensors, or all in a folder, as Hugging Face's libraries write them."""

    step = None

    def __init__(self, path: Path):
        from safetensors import safe_open

        self._slices: dict[str, tuple[Any, Any]] = {}
        for file in files_of(path):
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


def files_of(path: Path) -> list[Path]:
    """Raises: UserError: the folder has none."""
    if not path.is_dir():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.exists():
        return sorted({path / Path(name).name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise UserError(f"`{path}` holds no checkpoint and no *.safetensors", "give a run, a checkpoint's folder, or safetensors")
    return found


def take(source: Source, models: Layout, fragments: Mapping[str, Fragment], skip: Sequence[str], where: str,
         hint: str | None = None) -> str:
    """Fill the models' fragments with the source's values. Returns what was done, in words.

    Args:
        skip: modules and tensors that are left as they are, and not taken.
        where: what the source is, in words.
        hint: what to do if it does not fit, where that is not to skip something.

    Raises:
        UserError: they do not fit.
    """
    skipped = {name for name in {*(name for place in models for name in place.names), *source.shapes} if _within(name, skip)}
    _no_idle(skip, skipped, source, models)
    taken: dict[str, tuple[str, ...]] = {}  # by key: the names by which the source has it
    problems: dict[str, str] = {}           # by name
    fresh = []
    for place in models:
        wanted = [name for name in place.names if name not in skipped]
        if not wanted:
            fresh.append(place.names[0])
            continue
        names = tuple(name for name in wanted if name in source.shapes)
        if not names:
            problems[wanted[0]] = f"there is no `{wanted[0]}`"
        for name in names:
            if source.shapes[name] != place.shape:
                problems[name] = f"`{name}` is {list(source.shapes[name])}, not {list(place.shape)}"
            elif place.floating and name in source.integers:
                problems[name] = f"`{name}` is quantized ({source.integers[name]})"
        taken[place.key] = names
    known = {name for place in models for name in place.names}
    left = sorted(name for name in source.shapes if name in skipped)
    problems |= {name: f"`{name}` is not of the model" for name in sorted(source.shapes) if name not in known | skipped}
    if problems:
        everything = known | source.shapes.keys()
        raise UserError(f"the weights of {where} do not fit the model: {_some(list(problems.values()))}",
                        hint or _mend(problems.keys(), everything, skip))

    def read(key: str, start: int, count: int) -> Tensor:
        name, *others = taken[key]
        values = source.read(name, start, count)
        for other in others:  # tied here, and perhaps not there
            if not values.equal(source.read(other, start, count)):
                raise UserError(f"`{name}` and `{other}` are one in the model, and two in the weights of {where}",
                                f"init.skip=[{other}] takes the first alone")
        return values

    fill({key: fragment for key, fragment in fragments.items() if key in taken},
         {place.key: place.shape for place in models if place.key in taken}, read)
    said = f"weights of {where}: {len(taken)} tensors taken"
    if fresh:
        said += f"; by init.skip these start afresh: {_some([f'`{name}`' for name in fresh])}"
    if left:
        said += f"; by init.skip these are left: {_some([f'`{name}`' for name in left])}"
    return said


def _within(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _no_idle(skip: Sequence[str], skipped: Iterable[str], source: Source, models: Layout) -> None:
    for module in skip:
        if not any(_within(name, [module]) for name in skipped):
            names = {*source.shapes, *(name for place in models for name in place.names)}
            modules = {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}
            near = difflib.get_close_matches(module, modules, n=1)
            raise UserError(f"`init.skip` has `{module}`, which names no module or tensor of the model or of the weights",
                            f"did you mean `{near[0]}`?" if near else f"there is {_some(sorted(modules))}")


def _mend(bad: Iterable[str], everything: Iterable[str], skip: Sequence[str]) -> str:
    """The modules, as large as can be, of which nothing fits."""
    bad, good = set(bad), set(everything) - set(bad)
    modules: dict[str, None] = {}
    for name in sorted(bad):
        parts = name.split(".")
        beginnings = [".".join(parts[:count]) for count in range(1, len(parts))]
        modules[next((module for module in beginnings if not any(_within(each, [module]) for each in good)), name)] = None
    if len(modules) > MOST_SHOWN or not good:
        return "are they of this model? what `init.skip=[...]` names starts afresh, or is left"
    return f"to start afresh there, and to leave what the model has not: init.skip=[{','.join([*skip, *modules])}]"


def _some(words: Sequence[str], most: int = MOST_SHOWN) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more

