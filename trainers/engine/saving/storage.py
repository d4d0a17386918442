"""Tensors in the files of a checkpoint: each rank writes one file of safetensors, an index says what is where.

A file `<rank>.safetensors` holds flat parts of tensors by name, which any reader of safetensors opens. `index.json` gives
each tensor's shape, and the start of its part in each file that has one. Nothing in them is executed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainers.checkpoints import tensor_files
from trainers.checkpoints.manifest import INDEX
from trainers.checkpoints.tensor_files import Layout, Parts
from trainers.contract.errors import UserError
from trainers.contract.files import read_json, replace_text

Places = Mapping[str, tuple[int, tuple[int, ...]]]  # by name: the start of a part in its tensor, the tensor's shape

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16",
    torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


def write(file: Path, parts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write and flush contiguous CPU tensors as flat ones, without a copy of them in memory.

    Returns: the file's manifest entry, {"size": bytes, "sha256": hex}, of what was to be written.
    Raises:
        OSError: it could not be written. ValueError: a dtype that the format has not.
    """
    for name, part in parts.items():
        if part.dtype not in DTYPES:
            raise ValueError(f"`{name}` is {part.dtype}, which checkpoints cannot hold")
    layouts = {name: Layout(DTYPES[part.dtype], (part.numel(),)) for name, part in parts.items()}
    return tensor_files.write(file, layouts, lambda name: [memoryview(raw(parts[name]))])


def raw(tensor: Tensor) -> np.ndarray:
    """The bytes of a contiguous CPU tensor, [nbytes], shared with it."""
    if not tensor.numel():
        return np.empty(0, np.uint8)
    # Strided, because of a single element any stride is contiguous, and only of stride 1 are there bytes.
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()


def write_index(folder: Path, places: Mapping[str, Places]) -> None:
    """`places`: by file, those of the parts that it holds. Raises: OSError."""
    tensors: dict[str, Any] = {}
    for file, parts in places.items():
        for name, (start, shape) in parts.items():
            tensors.setdefault(name, {"shape": list(shape), "parts": {}})["parts"][file] = start
    replace_text(folder / INDEX, json.dumps({"tensors": dict(sorted(tensors.items()))}, ensure_ascii=False) + "\n")


class Reader:
    """The tensors of one checkpoint; reads no more of a file than is asked for.

    Raises, from every method: UserError, where the files are not what `write` left.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        with self._ours():
            self._parts = Parts(folder)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._parts.shapes

    def read(self, name: str, start: int, count: int) -> Tensor:
        """`count` elements from `start` on: flat, on the CPU, the caller's own."""
        with self._ours():
            result = torch.empty(count, dtype=BY_NAME[self._parts.layout(name).dtype])
            self._parts.read_into(name, start, memoryview(raw(result)))
            return result

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, in its shape."""
        shape = self.shapes[name]
        return self.read(name, 0, torch.Size(shape).numel()).view(shape)

    def json(self, name: str) -> Any:
        """What another file of the checkpoint holds."""
        with self._ours():
            return read_json(self.folder / name)

    @contextmanager
    def _ours(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a file that is not ours makes of a reader
            raise UserError(f"{self.folder} cannot be loaded: {error or type(error).__name__}",
                            "if you did not write it, do not trust it; without that folder the next older checkpoint is "
                            "used") from error
