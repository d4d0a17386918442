"""The errors that a user reads. Imports no torch."""

from __future__ import annotations

import errno
from typing import Literal

from trainers.contract import exit_codes


class UserError(Exception):
    """An error that the user can fix. `message` says what is wrong and where, `hint` says how to fix it.

    It ends a command, or a rank, with exit code 2 and without a traceback.
    """

    exit_code = exit_codes.USER_ERROR
    retry = False  # whether a new attempt may succeed

    def __init__(self, message: str, hint: str | None = None):
        # A file's name that is not UTF-8 holds characters that cannot be printed or written.
        message, hint = _printable(message), hint and _printable(hint)
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"error: {self.message}" + (f"\nhint: {self.hint}" if self.hint else "")


def _printable(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


class TrainingError(UserError):
    """A failure that a new attempt would repeat: a loss that is not a number, or a full disk at the last checkpoint.

    It ends a rank with exit code 1 and without a traceback. No new attempt starts automatically.
    """

    exit_code = exit_codes.FAILED


# What to do about an error of the operating system.
HINTS = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "another user may own it: ask the owner, or change its permissions"),
    errno.EROFS: "it is on a file system that is mounted read-only: use another place",
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "your disk quota is used up: free some space",
    errno.EMFILE: "raise the limit of open files: `ulimit -n 4096`",
    errno.ENFILE: "this host has too many open files: close some programs",
    errno.EAGAIN: "this user has too many processes: see `ulimit -u`, and the limit of the container",
    errno.ENOMEM: "this host has too little free memory",
    errno.ELOOP: "a symbolic link points to itself: remove it",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ESTALE: "the network file system has lost the file: try again",
    errno.EIO: "the disk or the network file system is damaged or gone: ask whoever runs it",
}


def system_error(error: OSError) -> UserError:
    """Return an error of the operating system in words: the file, what is wrong, and what to do."""
    file = f"`{error.filename}`: " if error.filename else ""
    return UserError(f"{file}{error.strerror or error}", HINTS.get(error.errno or 0))


Work = Literal["step", "sample", "evaluation", "checkpoint"]  # what a rank may be doing when its memory is full


class NotDeterministic(TrainingError):
    """An operation has no deterministic kernel. The next attempt accepts that."""

    retry = True


class OutOfMemory(TrainingError):
    """A rank ran out of memory. `retry`: whether the next attempt uses less."""

    def __init__(self, message: str, hint: str | None, retry: bool):
        super().__init__(message, hint)
        self.retry = retry
