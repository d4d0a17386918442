"""Export the models of a checkpoint as files for other tools, for any strategy and number of ranks. Imports no torch.

A tensor is copied from the ranks' files into the new file some megabytes at a time: a model of any size needs little memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainers.checkpoints.averaging import Mean
from trainers.checkpoints.manifest import STATE
from trainers.checkpoints.names import AVERAGES, tensors_of_models
from trainers.checkpoints.tensor_files import Layout, Parts, write
from trainers.contract.errors import UserError
from trainers.contract.files import exchange_folder, flush_folder, read_json, replace_json, temporary_path

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # size limit of a file in Hugging Face's layout, the same as in transformers


@dataclass(frozen=True)
class Model:
    """One model of a checkpoint."""

    parts: Parts
    tensors: dict[str, str]  # the model's name of a tensor -> the checkpoint's name; each tensor has one entry
    tied: dict[str, str]     # further names of tied tensors -> the checkpoint's name

    @property
    def averaged(self) -> bool:
        """Whether some weights are averages (`train.ema`)."""
        return any(key.startswith(AVERAGES) for key in self.tensors.values())

    def layouts(self, tied: bool) -> dict[str, Layout]:
        """Return the layouts by the model's names. `tied`: also by the further names of tied tensors."""
        return {name: self.parts.layout(key) for name, key in self._names(tied).items()}

    def write(self, file: Path, layouts: Mapping[str, Layout], metadata: Mapping[str, str]) -> int:
        """Write tensors into a safetensors file.

        Returns: the size of the file in bytes.
        Raises:
            OSError: the file cannot be written.
        """
        names = self._names(True)
        # transformers loads only files whose metadata has "format".
        return write(file, layouts, lambda name: self.parts.pieces(names[name]), {**metadata, "format": "pt"})["size"]

    def _names(self, tied: bool) -> dict[str, str]:
        return {**self.tensors, **(self.tied if tied else {})}


def read_models(checkpoint: Path, raw: bool = False, older: Sequence[Path] = ()) -> dict[str, Model]:
    """Return the models of a checkpoint by name. The checkpoint must be whole.

    Args:
        raw: take the trained weights; otherwise their averages, if the checkpoint has averages.
        older: checkpoints of the same run. If there are any, take the mean of the trained weights of all.

    Raises:
        Exception: of any kind, if a file is not as this software writes it.
    """
    parts = Mean([checkpoint, *older]) if older else Parts(checkpoint)
    tied = read_json(checkpoint / STATE).get("tied", {})
    models: dict[str, Model] = {}
    for (model, name), key in tensors_of_models(parts.shapes, raw or bool(older)).items():
        models.setdefault(model, Model(parts, {}, {})).tensors[name] = key
    for alias, key in tied.items():
        _, model, name = alias.split("/", 2)
        models[model].tied[name] = models[model].tensors[key.split("/", 2)[2]]
    return models


def to_safetensors(model: Model, file: Path, metadata: Mapping[str, str]) -> int:
    """Write a model into one file, with all the names that the model's `load_state_dict` needs.

    Returns: the size of the file in bytes.
    Raises:
        UserError: the file cannot be written. A file that was there before stays.
    """
    with _write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(file) as temporary:
            size = model.write(temporary, model.layouts(tied=True), metadata)
            os.replace(temporary, file)
        flush_folder(file.parent)
    return size


def to_huggingface(model: Model, layout: Path, folder: Path, metadata: Mapping[str, str]) -> int:
    """Make a folder that `from_pretrained` loads: each weight once, and the files in the folder `layout` (config.json, ...).

    Returns: the size of the weights' files in bytes.
    Raises:
        UserError: the folder cannot be written, or holds other files.
    """
    shards = _shards(model.layouts(tied=False))
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    with _write_errors(folder):
        given = sorted(path.name for path in layout.iterdir())
        if folder.exists() and (others := sorted(set(os.listdir(folder)) - {*names, *given, INDEX})):
            raise UserError(f"`{folder}` holds other files: {', '.join(others[:3])}", "use -o to name another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(folder) as temporary:
            temporary.mkdir()
            size = sum(model.write(temporary / name, shard, metadata) for name, shard in zip(names, shards))
            if len(shards) > 1:
                places = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
                total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
                replace_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
            for name in given:
                shutil.copyfile(layout / name, temporary / name)
            _replace_folder(folder, temporary)
        flush_folder(folder.parent)
    return size


def _replace_folder(folder: Path, new: Path) -> None:
    """Rename `new` to `folder`. An older folder is deleted only after that; if the rename fails, the older folder stays."""
    if not folder.exists():
        os.rename(new, folder)
        return
    old = temporary_path(folder)
    exchange_folder(folder, new, old)
    shutil.rmtree(old, ignore_errors=True)


def _shards(layouts: Mapping[str, Layout]) -> list[dict[str, Layout]]:
    """Divide tensors among files: in order, as many in each file as fit into SHARD_BYTES."""
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
def _temporary(path: Path) -> Iterator[Path]:
    """Give the path of a temporary file or folder that will replace `path`. On an error, delete the file or folder."""
    temporary = temporary_path(path)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that says `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write `{path}`: {error.strerror or error}", "use -o PATH to write elsewhere") from None
