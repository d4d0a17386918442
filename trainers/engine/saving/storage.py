"""The files that hold a checkpoint's tensors: one safetensors file for each rank, and an index.

A file `<rank>.safetensors` holds flat parts of tensors, by the tensors' names. Any reader of safetensors can open the file.
`index.json` gives the shape of each tensor, and for each file with a part of the tensor the index of the part's first element.
Reading these files executes no code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainers.checkpoints import tensor_files
from trainers.checkpoints.averaging import Mean
from trainers.checkpoints.manifest import INDEX
from trainers.checkpoints.tensor_files import Layout, Parts
from trainers.contract.errors import UserError
from trainers.contract.files import read_json, replace_text

Places = Mapping[str, tuple[int, tuple[int, ...]]]  # {tensor: (first element of a part, shape of the whole tensor)}

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16",
    torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


def write(file: Path, parts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write contiguous CPU tensors as flat tensors, without copying them in memory, and flush the file.

    Returns:
        The file's manifest entry, {"size": bytes, "sha256": hex}, computed from the tensors, not from the disk.

    Raises:
        OSError: the file could not be written.
        ValueError: the format has no such dtype.
    """
    for name, part in parts.items():
        if part.dtype not in DTYPES:
            raise ValueError(f"`{name}` is {part.dtype}, which checkpoints cannot hold")
    layouts = {name: Layout(DTYPES[part.dtype], (part.numel(),)) for name, part in parts.items()}
    return tensor_files.write(file, layouts, lambda name: [raw(parts[name]).data])


def raw(tensor: Tensor) -> np.ndarray:
    """Return the bytes of a contiguous CPU tensor, [nbytes] uint8, in the tensor's own memory."""
    if not tensor.numel():
        return np.empty(0, np.uint8)
    # A tensor of one element is contiguous with any stride, but viewing it as bytes needs stride 1.
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()


def write_index(folder: Path, places: Mapping[str, Places]) -> None:
    """Write and flush the index.

    Args:
        places: for each file, the places of its parts.

    Raises:
        OSError: the index could not be written.
    """
    tensors: dict[str, Any] = {}
    for file, parts in places.items():
        for name, (start, shape) in parts.items():
            tensors.setdefault(name, {"shape": list(shape), "parts": {}})["parts"][file] = start
    replace_text(folder / INDEX, json.dumps({"tensors": dict(sorted(tensors.items()))}, ensure_ascii=False) + "\n")


class Reader:
    """The tensors of one checkpoint, or their means over several. Reads only the requested parts of the files.

    Args:
        folder: the checkpoint.
        older: checkpoints of the same run, over which tensors are averaged too.

    Raises:
        UserError: from every method, if the files are not what `write` has written.
    """

    def __init__(self, folder: Path, older: Sequence[Path] = ()):
        self.folder = folder
        with self._user_errors():
            self._parts = Mean([folder, *older]) if older else Parts(folder)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._parts.shapes

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Return elements `start` to `start + count` of a tensor, flat [count], in new CPU memory."""
        with self._user_errors():
            result = torch.empty(count, dtype=BY_NAME[self._parts.layout(name).dtype])
            self._parts.read_into(name, start, raw(result).data)
            return result

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor, in its shape."""
        shape = self.shapes[name]
        return self.read(name, 0, torch.Size(shape).numel()).view(shape)

    def json(self, name: str) -> Any:
        """Return the content of a JSON file of the checkpoint."""
        with self._user_errors():
            return read_json(self.folder / name)

    @contextmanager
    def _user_errors(self) -> Iterator[None]:
        """Turn every error into a UserError: reading a file that `write` has not written may raise anything."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self.folder} cannot be loaded: {str(error) or type(error).__name__}",
                            "do not trust a checkpoint that you did not write; delete that folder to use the next older "
                            "checkpoint") from error
