"""Tensors in the files of a checkpoint: each rank writes one file of safetensors, an index says what is where.

A file `<rank>.safetensors` holds flat parts of tensors by name, in the format of
https://github.com/huggingface/safetensors (an 8-byte length, a JSON header, the bytes), which any reader of it opens.
`index.json` gives each tensor's shape, and the start of its part in each file that has one. Nothing in them is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainers.files import read_json, replace_text

Places = Mapping[str, tuple[int, tuple[int, ...]]]  # by name: the start of a part in its tensor, the tensor's shape

INDEX = "index.json"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}
CHUNK_BYTES = 1 << 24  # written and hashed at a time


def write(file: Path, parts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write and flush contiguous CPU tensors as flat ones, without a copy of them in memory.

    Returns: the file's manifest entry, {"size": bytes, "sha256": hex}, of what was to be written.
    Raises:
        OSError: it could not be written. ValueError: a dtype that the format has not.
    """
    header, at = {}, 0
    for name, part in parts.items():
        if part.dtype not in DTYPES:
            raise ValueError(f"`{name}` is {part.dtype}, which checkpoints cannot hold")
        header[name] = {"dtype": DTYPES[part.dtype], "shape": [part.numel()], "data_offsets": [at, at + part.nbytes]}
        at += part.nbytes
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(file, "wb", buffering=0) as opened:
        for content in (len(text).to_bytes(8, "little") + text, *map(raw, parts.values())):
            content = memoryview(content)
            for start in range(0, len(content), CHUNK_BYTES):
                chunk = content[start:start + CHUNK_BYTES]
                digest.update(chunk)
                while chunk:  # a write may be cut short
                    chunk = chunk[opened.write(chunk):]
        os.fsync(opened.fileno())
        return {"size": opened.tell(), "sha256": digest.hexdigest()}


def raw(tensor: Tensor) -> np.ndarray:
    """The bytes of a contiguous CPU tensor, [nbytes], shared with it."""
    return tensor.detach().view(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)


def write_index(folder: Path, places: Mapping[str, Places]) -> None:
    """`places`: by file, those of the parts that it holds. Raises: OSError."""
    tensors: dict[str, Any] = {}
    for file, parts in places.items():
        for name, (start, shape) in parts.items():
            tensors.setdefault(name, {"shape": list(shape), "parts": {}})["parts"][file] = start
    replace_text(folder / INDEX, json.dumps({"tensors": dict(sorted(tensors.items()))}, ensure_ascii=False) + "\n")


class Reader:
    """The tensors of one checkpoint; reads no more of a file than is asked for.

    Raises, from every method: Exception, of any kind, where the files are not what `write` left.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._tensors = read_json(folder / INDEX)["tensors"]
        self._files: dict[str, Any] = {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(entry["shape"]) for name, entry in self._tensors.items()}

    def read(self, name: str, start: int, count: int) -> Tensor:
        """`count` elements from `start` on: flat, on the CPU, the caller's own."""
        result: Tensor | None = None
        missing = count
        for file, begins in self._tensors[name]["parts"].items():
            part = self._open(file).get_slice(name)
            (length,) = part.get_shape()
            first, last = max(start, begins), min(start + count, begins + length)
            if first >= last:
                continue
            values = part[first - begins:last - begins]
            if last - first == count:
                return values.clone()  # not a view of the mapped file
            if result is None:
                result = torch.empty(count, dtype=values.dtype)
            result[first - start:last - start] = values
            missing -= last - first
        if missing:
            raise ValueError(f"{missing} of the {count} elements of `{name}` from {start} on are in no file")
        return torch.empty(0) if result is None else result

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, in its shape."""
        shape = tuple(self._tensors[name]["shape"])
        count = int(np.prod(shape, dtype=np.int64))
        if count == 0:
            (file,) = list(self._tensors[name]["parts"])[:1]
            return self._open(file).get_tensor(name).view(shape)
        return self.read(name, 0, count).view(shape)

    def _open(self, file: str) -> Any:
        from safetensors import safe_open

        if Path(file).name != file:
            raise ValueError(f"{INDEX} points out of the checkpoint, to {file!r}")
        if file not in self._files:
            self._files[file] = safe_open(self.folder / file, framework="pt")
        return self._files[file]
