"""Tensors in the files of one folder, by torch.distributed.checkpoint.

Importing that package takes a second or more, so this module is imported when the first checkpoint is
written or read.
"""

from __future__ import annotations

import os
import pickle
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Iterator, Mapping

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.futures import Future

METADATA = ".metadata"

# Said at every use in a single process, where it is just what is wanted.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def write(folder: Path, tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None) -> set[str]:
    """Write and flush what all ranks of `group` (None: this process alone) give, as one set of tensors.

    Collective. Plain tensors of one name must be given by one rank only, or be equal.

    Returns: the names of the files that this rank wrote.
    Raises:
        OSError: it failed on some rank; all ranks get the same message.
    """
    writer = _Writer(folder)
    try:
        dcp.save(dict(tensors), storage_writer=writer, planner=DefaultSavePlanner(flatten_state_dict=False),
                 process_group=group, no_dist=group is None)
    except CheckpointException as error:  # no Exception, but a BaseException
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        raise OSError(f"{cause} (rank {rank})") from error
    for name in writer.written:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
    return writer.written


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, on the CPU, contiguous. Not collective: each rank reads for itself.

    Raises:
        Exception: of any kind, where the files are not what `write` left.
    """
    reader = _Reader(folder)
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype)
               for name, entry in reader.read_metadata().state_dict_metadata.items()}
    try:
        dcp.load(tensors, storage_reader=reader, planner=DefaultLoadPlanner(flatten_state_dict=False), no_dist=True)
    except CheckpointException as error:
        (cause, _), *_ = error.failures.values()
        raise OSError(str(cause)) from error
    return tensors


class _Writer(dcp.FileSystemWriter):
    """Notes which files it wrote, writes none for a rank that has nothing, and fails in plain words."""

    def __init__(self, folder: Path):
        # `write` flushes instead: up to torch 2.11 at least, dcp called fsync before Python's own buffer was empty.
        super().__init__(folder, sync_files=False)
        self.written: set[str] = set()

    def write_data(self, plan: Any, planner: Any) -> Future:
        if not plan.items:
            nothing: Future = Future()
            nothing.set_result([])
            return nothing
        with _plain_errors():
            done = super().write_data(plan, planner)
        self.written = {result.storage_data.relative_path for result in done.value()}
        return done

    def finish(self, metadata: Any, results: Any) -> None:
        with _plain_errors():
            super().finish(metadata, results)
        self.written.add(METADATA)

    def storage_meta(self) -> metadata.StorageMeta:
        return metadata.StorageMeta()  # no path of this machine, no random id


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Only the words of an error go on: dcp sends it to the other ranks by pickle, which loses its causes
    and may refuse the error itself, and then those ranks would wait for ever."""
    try:
        yield
    except Exception as error:
        # torch.save reports a full disk as "unexpected pos 64 vs 0"; the reason lies under it.
        causes = [error]
        while under := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(under)
        system = [cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror]
        raise OSError(system[0] if system else f"{type(error).__name__}: {error}") from None


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        with open(Path(self.path) / METADATA, "rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, metadata.Metadata):
            raise pickle.UnpicklingError(f"{METADATA} holds a {type(found).__name__}")
        for info in found.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise pickle.UnpicklingError(f"{METADATA} points out of the checkpoint, to {info.relative_path!r}")
        return found


class _Unpickler(pickle.Unpickler):
    """Admits the classes of torch.distributed.checkpoint's metadata (torch 2.11 to 2.15) and no others."""

    ADMITTED = {(cls.__module__, cls.__qualname__): cls for cls in (
        metadata.Metadata, metadata.MetadataIndex, metadata.StorageMeta, metadata.TensorStorageMetadata,
        metadata.TensorProperties, metadata.ChunkStorageMetadata, metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
    )} | {("torch", "Size"): torch.Size, ("torch.serialization", "_get_layout"): torch.serialization._get_layout}

    def __init__(self, file: IO[bytes]):
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ADMITTED:
            return self.ADMITTED[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{METADATA} names `{module}.{name}`, which no checkpoint needs: refused")
