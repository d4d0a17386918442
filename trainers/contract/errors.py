"""The errors that a user reads. Imports no torch."""

from __future__ import annotations

from trainers.contract import exit_codes


class UserError(Exception):
    """An error that the user can fix. `message` says what is wrong and where, `hint` says how to fix it.

    It ends a command, or a rank, with exit code 2 and without a traceback.
    """

    exit_code = exit_codes.USER_ERROR
    retry = False  # whether a new attempt may succeed

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"error: {self.message}" + (f"\nhint: {self.hint}" if self.hint else "")


class TrainingError(UserError):
    """A failure that a new attempt would repeat: a loss that is not a number, or a full disk at the last checkpoint.

    It ends a rank with exit code 1 and without a traceback. No new attempt starts automatically.
    """

    exit_code = exit_codes.FAILED


class OutOfMemory(TrainingError):
    """A rank ran out of memory. `retry`: whether the next attempt uses less."""

    def __init__(self, message: str, hint: str | None, retry: bool):
        super().__init__(message, hint)
        self.retry = retry
