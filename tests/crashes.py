"""A process that ends between two operations on files, for tests of what it leaves."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

CODE = 9  # the exit code of a process that ended so


def crash_at(number: int | None, root: Path, power: random.Random | None = None) -> Callable[[], int]:
    """End this process just before its `number`-th operation on what lies in `root`: opening, making, renaming, removing,
    listing, flushing, or writing, half of which is done then. From 1; None: never.

    Returns: a function that gives the operations so far.
    Args:
        power: it is the power that fails: what was not flushed loses an end, of this randomness.
    """
    seen, unflushed = 0, set()
    write, fsync = os.write, os.fsync

    def count(end: Callable[[], object] = lambda: None) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            end()
            for path in unflushed if power else ():
                os.truncate(path, power.randrange(os.path.getsize(path) + 1))
            os._exit(CODE)

    def hook(event: str, args: tuple) -> None:
        paths = [os.fspath(arg) for arg in args if isinstance(arg, (str, os.PathLike))]
        if seen == number or not (event == "open" or event.startswith(("os.", "shutil."))):
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

    def name(handle: int) -> str:
        return os.readlink(f"/proc/self/fd/{handle}")

    def counted_write(handle: int, content: memoryview) -> int:
        if name(handle).startswith(str(root)):
            count(lambda: write(handle, content[:len(content) // 2]))
        return write(handle, content)

    def counted_fsync(handle: int) -> None:
        if name(handle).startswith(str(root)):
            count()
        fsync(handle)
        unflushed.discard(name(handle))

    os.write, os.fsync = counted_write, counted_fsync
    sys.addaudithook(hook)
    return lambda: seen


def forked(work: Callable[[], int]) -> int:
    """The exit code of a process that did `work`, which ended with it. Fork where no other thread runs."""
    return ended(fork(work))


def fork(work: Callable[[], int]) -> int:
    """Its process id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        code = work()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
