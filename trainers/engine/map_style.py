"""Data sets of torch's map-style kind (`__len__` and `__getitem__`), with worker processes that make batches ahead."""

from __future__ import annotations

import atexit
import copy
import multiprocessing
import multiprocessing.connection
import pickle
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from trainers.contract.errors import TrainingError, UserError, system_error
from trainers.contract.signals import blocked, leave_stops_to_rank
from trainers.engine.batches.noise import unchanged
from trainers.engine.batches.samples import Failed, Maker
from trainers.engine.device import to_device
from trainers.engine.task import Share

NO_POSITIONS = ("a run continues at a position, so the loop asks for samples by row: use a data set with `__len__` and "
                "`__getitem__`, for example one that reads row i from an index of the files")
WHY_ENDED = {
    signal.SIGKILL: "the kernel ends processes with SIGKILL when memory runs out: use fewer workers, or ask for more memory",
    signal.SIGBUS: "the shared memory is full: enlarge /dev/shm (docker run --shm-size=8g), or use fewer workers",
}


class DataError(TrainingError):
    """A sample could not be made. A new attempt may succeed: files may be back, and more memory may be free."""

    retry = True


class MapStyle:
    """Gives a map-style data set to the loop: an object with `__len__` and `__getitem__`, such as torchvision's ImageFolder.

    Before each sample is made, Python's, numpy's and torch's global generators on the CPU are seeded from the run's seed, the
    sample's epoch and its row. Transforms that draw from them give the same values on any number of ranks and workers, with any
    micro-batch, and after a resumption.

    Workers are processes that make batches ahead, through torch's DataLoader. Each rank has its own. They live as long as the
    rank and obey only the rank.

    Args:
        dataset: has `__len__`, and returns the sample of a row from `__getitem__`, on the CPU.
        workers: number of worker processes on each rank; 0: the rank makes each batch itself when it needs it.
        collate: makes one batch of a list of samples; None: torch's `default_collate`.
        prefetch: number of micro-batches that each worker makes ahead.
        start_method: how workers start. "fork" takes 20 ms a worker, shares the memory of the data set, and takes any data set.
            "forkserver" and "spawn" start from a fresh Python, for libraries that do not survive a fork: this takes seconds, the
            data set must be picklable, and each worker has a copy of it.

    Raises:
        UserError: `dataset` is not a map-style data set, or a number is out of range.
    """

    def __init__(self, dataset: Any, workers: int = 0, collate: Callable[[list[Any]], Any] | None = None, prefetch: int = 2,
                 start_method: Literal["fork", "forkserver", "spawn"] = "fork"):
        check_map_style(dataset)
        for name, number, least in (("workers", workers, 0), ("prefetch", prefetch, 1)):
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise UserError(f"MapStyle: `{name}` is {number!r}", f"use a whole number of at least {least}")
        if start_method not in (methods := multiprocessing.get_all_start_methods()):
            raise UserError(f"MapStyle: `start_method` is {start_method!r}", f"use {', '.join(map(repr, methods))}")
        self.dataset, self.workers, self.prefetch, self.start_method = dataset, workers, prefetch, start_method
        self.collate = collate or default_collate
        self._bind("data set", 0, torch.device("cpu"))

    def bound(self, name: str, seed: int, device: torch.device) -> MapStyle:
        """Return a copy for one purpose in one run, with workers of its own. The loop calls this.

        Args:
            name: of the data set, in errors.
            seed: for the random numbers that samples draw.
            device: where batches go.
        """
        bound = copy.copy(self)
        bound._bind(name, seed, device)
        return bound

    def _bind(self, name: str, seed: int, device: torch.device) -> None:
        self.name, self.device = name, device
        self._maker = Maker(self.dataset, self.collate, seed)
        self._coming = _Coming()
        self._loader: DataLoader | None = None
        self._made: Iterator[Any] = iter(())
        self._processes: list[Any] = []

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def lengths(self) -> np.ndarray:
        """The lengths of the samples, if the data set has them."""
        return self.dataset.lengths

    def ahead(self, shares: Iterable[Share]) -> None:
        """Let the workers make these shares ahead, in this order. Starts the workers the first time, from the main thread.

        `batch` makes a share that is not among them in the rank.

        Raises:
            UserError: the workers cannot start.
        """
        if self.workers == 0:
            return
        self._coming.restart(shares)
        if self._loader is None:
            self._start()
        else:
            self._made = self._waiting(lambda: iter(self._loader))  # type: ignore[arg-type]

    def batch(self, share: Share) -> Any:
        """Return what `collate` returned for the samples of the share, with its tensors on the device.

        Raises:
            DataError: a sample or the batch cannot be made, or a worker has ended.
        """
        if self._coming.reach(share, skip=lambda: self._waiting(lambda: next(self._made))):
            made = self._waiting(lambda: next(self._made))
        else:
            with unchanged(), one_thread():
                made = self._maker[share]
        if isinstance(made, Failed):
            if made.traceback:
                sys.stderr.write(made.traceback)
            raise DataError(f"{self.name}: {made.message}", made.hint)
        return on_device(made, self.device)

    def close(self) -> None:
        """End the workers."""
        atexit.unregister(self.close)
        for process in self._processes:
            process.kill()  # they ignore SIGTERM
        self._made, self._loader, self._processes = iter(()), None, []

    def _start(self) -> None:
        before = set(multiprocessing.active_children())
        on_child = signal.getsignal(signal.SIGCHLD)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # trainers/engine/batches/data_sets.py warns of too many workers, counting all ranks
            self._loader = DataLoader(
                self._maker,  # type: ignore[arg-type]  # any object with `__getitem__` works
                batch_size=None, sampler=self._coming, num_workers=self.workers, collate_fn=_same,
                prefetch_factor=self.prefetch, persistent_workers=True, pin_memory=self.device.type == "cuda",
                multiprocessing_context=self.start_method, worker_init_fn=leave_stops_to_rank,
                generator=torch.Generator(),  # otherwise the loader draws from the rank's generator
            )
            try:
                with blocked():  # a signal must not reach a worker before the worker ignores it
                    self._made = iter(self._loader)
            except OSError as error:
                raise system_error(error) from error
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                if self.start_method == "fork":
                    raise
                raise UserError(f"{self.name}: {type(self.dataset).__name__} cannot be sent to a worker: {error}",
                                'use start_method="fork", or define its classes and functions at the top of a module') from error
        # torch's handler raises an error wherever the rank is when a worker ends. `_waiting` raises it where it belongs.
        signal.signal(signal.SIGCHLD, on_child or signal.SIG_DFL)
        self._processes = list(set(multiprocessing.active_children()) - before)
        atexit.register(self.close)  # before multiprocessing's own atexit function, which would wait for the workers

    def _waiting(self, wait: Callable[[], Any]) -> Any:
        """Return `wait()`, or raise DataError if a worker ends before."""
        before = signal.signal(signal.SIGCHLD, lambda number, frame: self._check_workers())
        try:
            return wait()
        except DataError:
            raise
        except Exception as error:  # torch looks every 5 s: without a fork, a worker is no child of this process: no SIGCHLD
            if isinstance(error, (OSError, EOFError)):  # the sockets of a killed worker close before its end can be seen
                ended = multiprocessing.connection.wait([process.sentinel for process in self._processes], timeout=2)
                for process in self._processes:
                    if process.sentinel in ended:
                        process.join(2)
            self._check_workers()
            raise
        finally:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)

    def _check_workers(self) -> None:
        """Raise DataError if a worker has ended."""
        for process in self._processes:
            if (code := process.exitcode) is not None:
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                raise DataError(f"{self.name}: a worker (process {process.pid}, one of {self.workers}) {how}",
                                WHY_ENDED.get(-code, "look into the log of the rank, or use workers=0 to find the cause"))


class _Coming:
    """The shares that workers will be asked for, as the sampler of a DataLoader, and those that they make at present."""

    def __init__(self) -> None:
        self._shares: Iterator[Share] = iter(())
        self._sent: deque[Share] = deque()

    def restart(self, shares: Iterable[Share]) -> None:
        self._shares = iter(shares)
        self._sent.clear()

    def __iter__(self) -> Iterator[Share]:
        return self

    def __next__(self) -> Share:
        share = next(self._shares)
        self._sent.append(share)
        return share

    def reach(self, share: Share, skip: Callable[[], Any]) -> bool:
        """Return whether workers make this share. `skip` is called for each share before it, which nobody has asked for."""
        place = next((place for place, sent in enumerate(self._sent) if _equal(sent, share)), None)
        if place is None:
            return False
        for _ in range(place):
            self._sent.popleft()
            skip()
        self._sent.popleft()
        return True


def _equal(a: Share, b: Share) -> bool:
    return (a.seed == b.seed and np.array_equal(a.indices, b.indices) and np.array_equal(a.slots, b.slots)
            and np.array_equal(a.epochs, b.epochs))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread on the CPU, as in a worker: threads change the bits of the sum over a large image."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _same(batch: Any) -> Any:
    return batch


def check_map_style(dataset: Any) -> None:
    """Raise a UserError if this is not a map-style data set."""
    name = type(dataset).__name__
    if isinstance(dataset, DataLoader):
        raise UserError("the data set is a DataLoader", "return the data set itself; for workers: MapStyle(data_set, workers=N)")
    if isinstance(dataset, IterableDataset) or hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__"):
        raise UserError(f"{name} only gives its samples one after another", NO_POSITIONS)
    if missing := [method for method in ("__len__", "__getitem__") if not hasattr(dataset, method)]:
        raise UserError(f"{name} is no data set: it has no `{missing[0]}`",
                        'define `__len__`, and `batch(share)` or `__getitem__(row)`: README, "A task of your own"')


def on_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on the device. Copies to a GPU go through pinned memory, and the host does not wait."""
    match batch:
        case Tensor():
            return to_device(batch, device)
        case Mapping():
            changed = copy.copy(batch)  # of its own class: transformers' BatchEncoding, for example
            changed.update({key: on_device(value, device) for key, value in batch.items()})  # type: ignore[attr-defined]
            return changed
        case tuple() if hasattr(batch, "to"):  # a PackedSequence, of which a part must stay on the CPU
            return batch.to(device)
        case tuple() if hasattr(batch, "_fields"):
            return type(batch)(*(on_device(value, device) for value in batch))
        case list() | tuple():
            return type(batch)(on_device(value, device) for value in batch)
    return batch.to(device) if hasattr(batch, "to") else batch
