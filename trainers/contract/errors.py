"""The errors a user reads. Imports no torch."""

from __future__ import annotations

from trainers.contract import exit_codes


class UserError(Exception):
    """Something the user can mend: what is wrong and where (`message`), how to mend it (`hint`).

    It ends a command, or a rank, with exit code 2 and without a traceback.
    """

    exit_code = exit_codes.USER_ERROR
    retry = False  # whether another attempt may fare better

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"error: {self.message}" + (f"\nhint: {self.hint}" if self.hint else "")


class TrainingError(UserError):
    """The run failed in a way that would repeat (a loss that is not a number, a disk that is full at
    the last checkpoint): exit code 1, no traceback, no new attempt by itself."""

    exit_code = exit_codes.FAILED


class OutOfMemory(TrainingError):
    """A rank's device was full."""

    def __init__(self, message: str, hint: str | None, retry: bool):
        super().__init__(message, hint)
        self.retry = retry
