"""Crash a process between two file operations, for tests of the files that the process leaves behind."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

CRASH_CODE = 9  # the exit code of a crashed process


def crash_at(number: int | None, root: Path, power: random.Random | None = None) -> Callable[[], int]:
    """Crash this process just before its `number`-th file operation in the folder `root`.

    The operations are: open, create, rename, remove, list, flush and write. A write that crashes has written half of its
    bytes.

    Args:
        number: counted from 1; None means never, so that the operations are only counted.
        power: simulate a power failure: each file that was not flushed is cut at a random position, drawn from `power`.
    Returns:
        A function that returns the number of operations so far.
    """
    operations, unflushed = 0, set()
    write, fsync = os.write, os.fsync

    def count(before_crash: Callable[[], object] = lambda: None) -> None:
        nonlocal operations
        operations += 1
        if operations == number:
            before_crash()
            for path in unflushed if power else ():
                os.truncate(path, power.randrange(os.path.getsize(path) + 1))
            os._exit(CRASH_CODE)

    def hook(event: str, args: tuple) -> None:
        paths = [os.fspath(arg) for arg in args if isinstance(arg, (str, os.PathLike))]
        if operations == number or not (event == "open" or event.startswith(("os.", "shutil."))):
            return
        if not any(path.startswith(str(root)) for path in paths):
            return
        count()
        if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
            unflushed.add(paths[0])
        elif event == "os.rename":
            unflushed.update([paths[1]] if paths[0] in unflushed else [])
            unflushed.discard(paths[0])
        elif event == "os.remove":
            unflushed.discard(paths[0])

    def path_of(handle: int) -> str:
        return os.readlink(f"/proc/self/fd/{handle}")

    def counted_write(handle: int, content: memoryview) -> int:
        if path_of(handle).startswith(str(root)):
            count(lambda: write(handle, content[:len(content) // 2]))
        return write(handle, content)

    def counted_fsync(handle: int) -> None:
        if path_of(handle).startswith(str(root)):
            count()
        fsync(handle)
        unflushed.discard(path_of(handle))

    os.write, os.fsync = counted_write, counted_fsync
    sys.addaudithook(hook)
    return lambda: operations


def run_forked(work: Callable[[], int]) -> int:
    """Run `work` in a forked process, wait for the process, and return its exit code.

    The exit code is what `work` returns. Call this function only where no other thread runs.
    """
    return exit_code_of(fork(work))


def fork(work: Callable[[], int]) -> int:
    """Start a forked process that runs `work`, and return its pid. The result of `work` is the exit code."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        code = work()
    finally:
        sys.stdout.flush()
        os._exit(code)


def exit_code_of(child: int) -> int:
    """Wait for a child process to end and return its exit code; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
