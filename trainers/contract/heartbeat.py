"""Heartbeats: a rank's progress, in memory that the rank shares with its node process. Imports no torch.

LAUNCH_HEARTBEAT names an inherited file descriptor of that memory. Without the variable (torchrun, accelerate), a rank writes
its progress to memory that nobody reads. A beat touches no file, no device and no other rank, and takes 0.2 microseconds.

A beat says that the rank's Python code has reached the next place in the loop: a batch is made, a forward pass starts or ends,
a step ends, or a micro-batch of an evaluation starts or ends. All ranks pass the same places in the same order. When ranks wait
for each other, they therefore wait for the rank with the fewest beats. On a GPU the host runs ahead of the device: a kernel that
hangs is found at the next place that waits for the kernel, at the latest after `log.every` steps.

A long silence is not always a hang. While a rank rests, another time limit applies, or none. A rank rests:

- until its first step has ended: imports, downloads and compilation may take long
- in its first micro-batch of an evaluation, which may be compiled too
- after a call of `rest`: at the end of the run
- after a call of `report`: while the task computes its metrics or draws its figures; this has a limit of its own

While a checkpoint is written, bytes that the rank reads or writes count as beats.
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
STACKS = signal.SIGUSR1  # a READY rank that gets this signal writes the stacks of its threads to standard error

# Fields of the memory, one int64 each.
READY, BEATS, RESTING, SAVING, STEP, STEPS, WALL_NS, WORK_NS, DATA_NS, ENDED = range(10)
# STEP:    the last step that was completed
# STEPS:   number of steps that this process has completed; the times below are sums over these steps
# WALL_NS: total time
# WORK_NS: the part of WALL_NS in which the main thread computed, waited for a CPU, or slept while it made batches; in the rest
#          it waited for other ranks. Meaningless where the main thread waits for a GPU, because that wait keeps the CPU busy
# DATA_NS: the part of WALL_NS in which the main thread made batches
# ENDED:   1 once the rank has done its work and chosen its exit code itself
# RESTING: 0, or one of the two kinds of rest
BYTES = 8 * 10
REST, REPORT = 1, 2

_page: memoryview | array = array("q", bytes(BYTES))
_known: set[str] = set()      # kinds of work that this process has done before: nothing is left to compile for them
_step_started = (0, 0)        # (time, main thread's busy time) in ns
_batch_started = (0, 0)       # (time, main thread's CPU time) in ns
_data_ns = _asleep_ns = 0     # this step's time for making batches: all of it, and the part without a CPU
_schedstat: int | None = None


def new_page() -> tuple[int, memoryview]:
    """Make the memory for one rank, in the node process.

    Returns:
        (a file descriptor that the rank must inherit, the memory)
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("heartbeat")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, BYTES)
    page = memoryview(mmap.mmap(descriptor, BYTES)).cast("q")
    page[RESTING] = REST
    return descriptor, page


def start() -> None:
    """Share this rank's progress with the node process from now on, and write stacks when asked."""
    global _page, _schedstat
    descriptor = os.environ.pop(VARIABLE, None)  # processes that this rank starts must not beat
    if descriptor is None:
        return
    _page = memoryview(mmap.mmap(int(descriptor), BYTES)).cast("q")
    os.close(int(descriptor))
    try:
        _schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        pass  # without this file, waiting for a CPU does not count as work
    faulthandler.register(STACKS, all_threads=True, chain=False)
    _page[READY] = 1


def beat(kind: str = "step") -> None:
    """Say that the main thread has reached the next place, in work of this kind."""
    _page[BEATS] += 1
    _page[RESTING] = kind not in _known


def done(kind: str) -> None:
    """Say that some work of this kind is done. From now on, such work takes no unusual time."""
    _known.add(kind)
    beat(kind)


def rest() -> None:
    """Say that the work up to the next beat may take long."""
    _page[RESTING] = REST


def report() -> None:
    """Say that the work up to the next beat is a task's report."""
    _page[RESTING] = REPORT


def end() -> None:
    """Record that this rank ends as it should. The node process believes exit codes 0 and 75 only after this call."""
    _page[ENDED] = 1


@contextmanager
def saving() -> Iterator[None]:
    """Count this process's reading and writing as signs of life in this context. Works in any thread."""
    _page[SAVING] += 1
    try:
        yield
    finally:
        _page[SAVING] -= 1


def step_begins() -> None:
    global _step_started, _data_ns, _asleep_ns
    _data_ns = _asleep_ns = 0
    _step_started = time.monotonic_ns(), _busy_ns()
    beat()


def batch_begins() -> None:
    global _batch_started
    beat()
    _batch_started = time.monotonic_ns(), time.thread_time_ns()


def batch_ends() -> None:
    global _data_ns, _asleep_ns
    took_ns = time.monotonic_ns() - _batch_started[0]
    _data_ns += took_ns
    _asleep_ns += took_ns - (time.thread_time_ns() - _batch_started[1])
    beat()


def step_ends(step: int) -> None:
    _page[WALL_NS] += time.monotonic_ns() - _step_started[0]
    _page[WORK_NS] += _busy_ns() - _step_started[1] + _asleep_ns
    _page[DATA_NS] += _data_ns
    _page[STEP] = step
    _page[STEPS] += 1
    done("step")


def _busy_ns() -> int:
    """Return the main thread's time on a CPU and in the queue for a CPU."""
    queued_ns = int(os.pread(_schedstat, 64, 0).split()[1]) if _schedstat is not None else 0
    return time.thread_time_ns() + queued_ns
