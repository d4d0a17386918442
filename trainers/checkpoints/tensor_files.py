"""Read and write safetensors files as bytes. Imports no torch: checkpoints can be exported without torch.

A file is an 8-byte length, a JSON header, and the bytes of the tensors one after another
(https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any

from trainers.checkpoints.manifest import INDEX, names_file
from trainers.contract.files import read_json

SIZES = {  # bytes of an element
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
    "BOOL": 1, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}
CHUNK_BYTES = 1 << 24  # bytes that are read, written or hashed at a time
OPEN_FILES = 256       # at most so many files are open at once: a process may open a few thousand, and a run may have more ranks


@dataclass(frozen=True)
class Layout:
    """The type (by safetensors' name) and the shape of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * SIZES[self.dtype]


def write(file: Path, layouts: Mapping[str, Layout], contents: Callable[[str], Iterable[memoryview]],
          metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Write and flush a file of tensors. `contents` returns the bytes of a tensor by name, in pieces of any size.

    Returns:
        The file's manifest entry, {"size": bytes, "sha256": hex}. The hash is computed from the bytes that `contents`
        returns. The file is not read back.
    Raises:
        OSError: the file cannot be written.
        ValueError: a tensor does not have as many bytes as its layout says.
    """
    # The widest elements come first. Each tensor then starts at a multiple of its element size, which suits readers that map
    # the file into memory.
    names = sorted(layouts, key=lambda name: -SIZES[layouts[name].dtype])
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in names:
        layout = layouts[name]
        header[name] = {"dtype": layout.dtype, "shape": list(layout.shape), "data_offsets": [at, at + layout.nbytes]}
        at += layout.nbytes
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(file, "wb", buffering=0) as opened:
        _append(opened, [memoryview(len(text).to_bytes(8, "little") + text)], digest)
        for name in names:
            before = opened.tell()
            _append(opened, contents(name), digest)
            if opened.tell() - before != layouts[name].nbytes:
                raise ValueError(f"`{name}` has {opened.tell() - before} bytes, not {layouts[name].nbytes}")
        os.fsync(opened.fileno())
        return {"size": opened.tell(), "sha256": digest.hexdigest()}


def _append(opened: FileIO, contents: Iterable[memoryview], digest: Any) -> None:
    for content in contents:
        for start in range(0, len(content), CHUNK_BYTES):
            chunk = content[start:start + CHUNK_BYTES]
            digest.update(chunk)
            while chunk:  # one call may write less than all of it
                chunk = chunk[os.write(opened.fileno(), chunk):]


class Parts:
    """The tensors of one checkpoint, as bytes. Each rank's file holds parts of tensors. Only the needed parts are read.

    Every method raises an Exception, of any kind, if the files are not what was written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._tensors = read_json(folder / INDEX)["tensors"]
        for file in {file for entry in self._tensors.values() for file in entry["parts"]}:
            if not names_file(file):
                raise ValueError(f"{INDEX} names a file outside of the checkpoint: {file!r}")
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(entry["shape"]) for name, entry in self._tensors.items()}
        self._headers: dict[str, dict[str, tuple[Layout, int]]] = {}
        # An open file can be read to its end even if retention deletes it.
        self._open = lru_cache(OPEN_FILES)(lambda file: open(folder / file, "rb", buffering=0))

    def layout(self, name: str) -> Layout:
        """Return the layout of a whole tensor."""
        [dtype] = {self._header(file)[name][0].dtype for file in self._tensors[name]["parts"]}
        return Layout(dtype, self.shapes[name])

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer of bytes with a tensor's elements, starting with element `start`."""
        size = SIZES[self.layout(name).dtype]
        at, end = start, start + len(buffer) // size
        for file, part_start in sorted(self._tensors[name]["parts"].items(), key=lambda part: part[1]):
            part, first_byte = self._header(file)[name]
            stop = min(end, part_start + part.count)
            if part_start <= at < stop:
                _read(self._open(file), first_byte + (at - part_start) * size, buffer[(at - start) * size:(stop - start) * size])
                at = stop
        if at < end:
            raise ValueError(f"element {at} of `{name}` is in no file")

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a whole tensor in pieces. A piece is valid until the next piece is asked for."""
        layout = self.layout(name)
        size = SIZES[layout.dtype]
        buffer = memoryview(bytearray(min(layout.nbytes, CHUNK_BYTES)))
        for start in range(0, layout.count, max(len(buffer) // size, 1)):
            piece = buffer[:min(len(buffer), (layout.count - start) * size)]
            self.read_into(name, start, piece)
            yield piece

    def _header(self, file: str) -> dict[str, tuple[Layout, int]]:
        """Return, by tensor name, (layout of the part in this file, position of its first byte)."""
        if file not in self._headers:
            opened = self._open(file)
            length = bytearray(8)
            _read(opened, 0, memoryview(length))
            data_start = 8 + int.from_bytes(length, "little")
            text = bytearray(min(data_start, os.fstat(opened.fileno()).st_size) - 8)
            _read(opened, 8, memoryview(text))
            self._headers[file] = {
                name: (Layout(entry["dtype"], tuple(entry["shape"])), data_start + entry["data_offsets"][0])
                for name, entry in json.loads(text).items() if name != "__metadata__"}
        return self._headers[file]


def _read(opened: FileIO, at: int, buffer: memoryview) -> None:
    """Fill a buffer with a file's bytes, starting at byte `at`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file ends too early.
    """
    while buffer:
        count = os.preadv(opened.fileno(), [buffer], at)
        if count == 0:
            raise ValueError(f"{Path(opened.name).name} ends at byte {at}")
        buffer, at = buffer[count:], at + count
