"""The models of a checkpoint, of whatever strategy and number of ranks, as files for others. Imports no torch.

A tensor goes from the ranks' files into the new one some megabytes at a time: a model of any size passes through little
memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainers.checkpoints.manifest import STATE
from trainers.checkpoints.tensor_files import Layout, Parts, write
from trainers.contract.errors import UserError
from trainers.contract.files import flush_folder, read_json, replace_json

CONFIG = "config.json"
SHARD_BYTES = 5 * 10**9  # of a file in Hugging Face's layout, as transformers cuts them

PREFIX = "models/"


@dataclass(frozen=True)
class Model:
    """One model of a checkpoint."""

    parts: Parts
    tensors: Mapping[str, str]  # by the model's own name for it, the checkpoint's; of each tensor once
    tied: Mapping[str, str]     # further names of some: by that name, the checkpoint's

    def layouts(self, tied: bool) -> dict[str, Layout]:
        """By the model's own names; `tied`: by all of them."""
        return {name: self.parts.layout(key) for name, key in self._names(tied).items()}

    def write(self, file: Path, layouts: Mapping[str, Layout], metadata: Mapping[str, str]) -> int:
        """Returns: bytes. Raises: OSError."""
        names = self._names(True)
        # "format" is what transformers asks of a file before it loads it.
        return write(file, layouts, lambda name: self.parts.pieces(names[name]), {"format": "pt", **metadata})["size"]

    def _names(self, tied: bool) -> dict[str, str]:
        return {**self.tensors, **(self.tied if tied else {})}


def read_models(checkpoint: Path) -> dict[str, Model]:
    """The models of a checkpoint that is whole, by name. Raises: Exception, if its files are not ours."""
    parts = Parts(checkpoint)
    tied = read_json(checkpoint / STATE).get("tied", {})
    found: dict[str, Model] = {}
    for key in parts.shapes:
        if key.startswith(PREFIX):
            model, _, name = key.removeprefix(PREFIX).partition("/")
            found.setdefault(model, Model(parts, {}, {})).tensors[name] = key
    for alias, key in tied.items():
        model, _, name = alias.removeprefix(PREFIX).partition("/")
        found[model].tied[name] = key
    return found


def to_safetensors(model: Model, file: Path, metadata: Mapping[str, str]) -> int:
    """Write a model into one file, by all the names that its `load_state_dict` wants.

    Returns: bytes.
    Raises:
        UserError: it cannot be written; what was there before is left.
    """
    with _written(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with _beside(file) as beside:
            size = model.write(beside, model.layouts(tied=True), metadata)
            os.replace(beside, file)
        flush_folder(file.parent)
    return size


def to_huggingface(model: Model, layout: Path, folder: Path, metadata: Mapping[str, str]) -> int:
    """Make a folder that `from_pretrained` loads: the weights, each once, and what lies in `layout` (config.json, ...).

    Returns: bytes of the weights.
    Raises:
        UserError: it cannot be written, or holds files of others.
    """
    shards = _shards(model.layouts(tied=False))
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    with _written(folder):
        given = sorted(path.name for path in layout.iterdir())
        if folder.exists() and (others := sorted(set(os.listdir(folder)) - {*names, *given, INDEX})):
            raise UserError(f"`{folder}` holds other files: {', '.join(others[:3])}", "-o names a folder of its own")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _beside(folder) as beside:
            beside.mkdir()
            size = sum(model.write(beside / name, shard, metadata) for name, shard in zip(names, shards))
            if len(shards) > 1:
                places = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
                total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
                replace_json(beside / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
            for name in given:
                shutil.copyfile(layout / name, beside / name)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(beside, folder)
        flush_folder(folder.parent)
    return size


INDEX = "model.safetensors.index.json"


def _shards(layouts: Mapping[str, Layout]) -> list[dict[str, Layout]]:
    """In order, as many in each as fit."""
    shards: list[dict[str, Layout]] = [{}]
    free = SHARD_BYTES
    for name, layout in layouts.items():
        if layout.nbytes > free and shards[-1]:
            shards.append({})
            free = SHARD_BYTES
        shards[-1][name] = layout
        free -= layout.nbytes
    return shards


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A name for what takes the place of `path` once it is whole; if that fails, nothing is left over."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True) if beside.is_dir() else beside.unlink(missing_ok=True)
        raise


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write `{path}`: {error.strerror or error}", "-o PATH writes it elsewhere") from None
