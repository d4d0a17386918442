"""What an error of torch means for the run: memory is full, or an operation has no deterministic kernel."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainers.contract.errors import Work

MEMORY_FULL = (
    "out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED", "CUFFT_ALLOC_FAILED",
    # cuDNN tries its algorithms in turn, and says this if none could get its workspace.
    "unable to find an engine to execute this computation", "No valid execution plans built",
)


class MemoryFull(Exception):
    """Memory is full; `work` says what the rank was doing."""

    def __init__(self, work: Work):
        super().__init__(work)
        self.work = work


@contextmanager
def memory_for(work: Work) -> Iterator[None]:
    """Raise MemoryFull instead of errors in this block that say that memory is full. A block inside of this one names the work
    more exactly."""
    try:
        yield
    except MemoryFull:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise MemoryFull(work) from error
        raise


def out_of_memory(error: BaseException | None) -> bool:
    """Return whether `error`, or an error that caused it, says that the memory of a device or of the host is full."""
    return any(isinstance(cause, (torch.OutOfMemoryError, MemoryError, MemoryFull))
               or isinstance(cause, RuntimeError) and any(words in str(cause) for words in MEMORY_FULL)
               for cause in _causes(error))


def work_without_memory(error: BaseException) -> Work | None:
    """Return what the rank was doing when memory was full; None if it did no work that `memory_for` names."""
    return next((cause.work for cause in _causes(error) if isinstance(cause, MemoryFull)), None)


def without_deterministic_kernel(error: BaseException) -> str | None:
    """Return the operation that has no deterministic kernel, if `error` or an error that caused it says so."""
    for cause in _causes(error):
        if isinstance(cause, RuntimeError) and (match := re.search(r"(\S+) does not have a deterministic implementation",
                                                                   str(cause))):
            return match[1]
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
