"""The errors that a user's task raises. Imports no torch."""

from trainers.contract.errors import TrainingError, UserError

__all__ = ["TrainingError", "UserError"]
