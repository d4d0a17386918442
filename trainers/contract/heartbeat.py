"""Signs of life: how far a rank has come, in memory that it shares with its node process. Imports no torch.

LAUNCH_HEARTBEAT names an inherited file descriptor of that memory. Without it (torchrun, accelerate) the same is
written where nobody reads it. A beat touches no file, no device and no other rank: 0.2 microseconds.

A beat says that the rank's own Python has come to the next place in the loop: a batch made, a forward pass begun or
ended, a step's end, a micro-batch of an evaluation. Ranks pass the same places in the same order, so that among ranks
that wait for one another the one with the fewest beats is waited for. On a GPU the host runs ahead of the device: a
kernel that hangs is found at the next place that waits for it, at the latest after `log.every` steps.

Not every long silence is a hang. A rank rests, which has a limit of its own or none, until its first step has ended
(imports, downloads, compilation), in its first micro-batch of an evaluation (compilation again), and where `rest` says
so (a task's report, the end). While a checkpoint is being written, bytes that move count as beats.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "LAUNCH_HEARTBEAT"
STACKS = signal.SIGUSR1  # makes a rank that is READY write the stacks of its threads to standard error

# The memory: one int64 each.
READY, BEATS, RESTING, SAVING, STEP, STEPS, WALL_NS, WORK_NS, DATA_NS = range(9)
# STEP: the last that was done; STEPS: how many this process did. Over those:
# WALL_NS: how long they took
# WORK_NS: of it, the main thread at work, waiting for a CPU, or asleep while it made batches; the rest is waiting for
#          others. It says nothing where the main thread waits for a GPU, which it does by spinning
# DATA_NS: of it, making batches
BYTES = 8 * 9

_page: memoryview | array = array("q", bytes(BYTES))
_known: set[str] = set()   # the kinds of work of which this process has done some, and so compiled what they need
_began = (0, 0)            # the step's: (time, main thread's work) in ns
_batch_began = (0, 0)      # (time, main thread's CPU time) in ns
_data_ns = _asleep_ns = 0  # of this step, making batches: all, and off the CPU
_schedstat: int | None = None


def new_page() -> tuple[int, memoryview]:
    """For a node process: (file descriptor, for the rank to inherit; the memory)."""
    if hasattr(os, "memfd_create"):
        number = os.memfd_create("heartbeat")
    else:
        with tempfile.TemporaryFile() as file:
            number = os.dup(file.fileno())
    os.ftruncate(number, BYTES)
    page = memoryview(mmap.mmap(number, BYTES)).cast("q")
    page[RESTING] = 1
    return number, page


def start() -> None:
    """From now on the node process sees what this rank does, and may ask for its stacks."""
    global _page, _schedstat
    number = os.environ.pop(VARIABLE, None)  # this process's alone, not those that it starts
    if number is None:
        return
    _page = memoryview(mmap.mmap(int(number), BYTES)).cast("q")
    os.close(int(number))
    try:
        _schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        pass  # then waiting for a CPU does not count as work
    faulthandler.register(STACKS, all_threads=True, chain=False)
    _page[READY] = 1


def beat(kind: str = "step") -> None:
    """The main thread has come to the next place, in work of this kind."""
    _page[BEATS] += 1
    _page[RESTING] = kind not in _known


def done(kind: str) -> None:
    """Some work of this kind is done: from now on it takes no unusual time."""
    _known.add(kind)
    beat(kind)


def rest() -> None:
    """What follows, up to the next beat, may take its time."""
    _page[RESTING] = 1


@contextmanager
def saving() -> Iterator[None]:
    """Meanwhile this process's reading and writing are signs of life too; in any thread."""
    _page[SAVING] += 1
    try:
        yield
    finally:
        _page[SAVING] -= 1


def step_begins() -> None:
    global _began, _data_ns, _asleep_ns
    _data_ns = _asleep_ns = 0
    _began = time.monotonic_ns(), _busy_ns()
    beat()


def batch_begins() -> None:
    global _batch_began
    beat()
    _batch_began = time.monotonic_ns(), time.thread_time_ns()


def batch_ends() -> None:
    global _data_ns, _asleep_ns
    took_ns = time.monotonic_ns() - _batch_began[0]
    _data_ns += took_ns
    _asleep_ns += took_ns - (time.thread_time_ns() - _batch_began[1])
    beat()


def step_ends(step: int) -> None:
    _page[WALL_NS] += time.monotonic_ns() - _began[0]
    _page[WORK_NS] += _busy_ns() - _began[1] + _asleep_ns
    _page[DATA_NS] += _data_ns
    _page[STEP] = step
    _page[STEPS] += 1
    done("step")


def _busy_ns() -> int:
    """The main thread's time on a CPU and in the queue for one."""
    queued_ns = int(os.pread(_schedstat, 64, 0).split()[1]) if _schedstat is not None else 0
    return time.thread_time_ns() + queued_ns
