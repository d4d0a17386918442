"""Files of safetensors, as bytes: an 8-byte length, a JSON header, the tensors' bytes one after another
(https://github.com/huggingface/safetensors). Imports no torch, so that checkpoints are exported without it.
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
CHUNK_BYTES = 1 << 24  # read, written and hashed at a time
OPEN_FILES = 256       # held open at once; a process may have some thousand, ranks may be more


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in a file: its type by safetensors' name, its shape."""

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
    """Write and flush a file of tensors, of which `contents` gives the bytes by name, in pieces of any size.

    Returns: the file's manifest entry, {"size": bytes, "sha256": hex}, of what was to be written.
    Raises:
        OSError: it could not be written. ValueError: the bytes are not as many as the layout says.
    """
    # The widest elements first: each then begins at a multiple of its size, as readers that map the file like it.
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
            while chunk:  # a write may be cut short
                chunk = chunk[os.write(opened.fileno(), chunk):]


class Parts:
    """The tensors of one checkpoint, as bytes, in parts that lie in its files; reads no more of them than is asked for.

    Raises, from every method: Exception, of any kind, where the files are not what was written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._tensors = read_json(folder / INDEX)["tensors"]
        for file in {file for entry in self._tensors.values() for file in entry["parts"]}:
            if not names_file(file):
                raise ValueError(f"{INDEX} points out of the checkpoint, to {file!r}")
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(entry["shape"]) for name, entry in self._tensors.items()}
        self._headers: dict[str, dict[str, tuple[Layout, int]]] = {}
        # Open, a file can be read to its end though retention has deleted it.
        self._open = lru_cache(OPEN_FILES)(lambda file: open(folder / file, "rb", buffering=0))

    def layout(self, name: str) -> Layout:
        """Of the whole tensor."""
        [dtype] = {self._header(file)[name][0].dtype for file in self._tensors[name]["parts"]}
        return Layout(dtype, self.shapes[name])

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer of bytes with the elements from `start` on."""
        size = SIZES[self.layout(name).dtype]
        at, end = start, start + len(buffer) // size
        for file, begins in sorted(self._tensors[name]["parts"].items(), key=lambda part: part[1]):
            part, place = self._header(file)[name]
            last = min(end, begins + part.count)
            if begins <= at < last:
                _read(self._open(file), place + (at - begins) * size, buffer[(at - start) * size:(last - start) * size])
                at = last
        if at < end:
            raise ValueError(f"{end - at} of the {end - start} elements of `{name}` from {start} on are in no file")

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of a whole tensor, some at a time; each piece is good until the next."""
        layout = self.layout(name)
        size = SIZES[layout.dtype]
        buffer = memoryview(bytearray(min(layout.nbytes, CHUNK_BYTES)))
        for start in range(0, layout.count, max(len(buffer) // size, 1)):
            piece = buffer[:min(len(buffer), (layout.count - start) * size)]
            self.read_into(name, start, piece)
            yield piece

    def _header(self, file: str) -> dict[str, tuple[Layout, int]]:
        """By name: the layout of the part that the file holds, and its first byte."""
        if file not in self._headers:
            opened = self._open(file)
            length = bytearray(8)
            _read(opened, 0, memoryview(length))
            begins = 8 + int.from_bytes(length, "little")
            text = bytearray(min(begins, os.fstat(opened.fileno()).st_size) - 8)
            _read(opened, 8, memoryview(text))
            self._headers[file] = {
                name: (Layout(entry["dtype"], tuple(entry["shape"])), begins + entry["data_offsets"][0])
                for name, entry in json.loads(text).items() if name != "__metadata__"}
        return self._headers[file]


def _read(opened: FileIO, at: int, buffer: memoryview) -> None:
    """Fill the buffer from byte `at` on. Raises: OSError; ValueError if the file ends before."""
    while buffer:
        count = os.preadv(opened.fileno(), [buffer], at)
        if count == 0:
            raise ValueError(f"{Path(opened.name).name} ends at byte {at}")
        buffer, at = buffer[count:], at + count
