"""The errors that a user's task may raise. Imports no torch."""

from trainers.contract.errors import TrainingError, UserError

__all__ = ["TrainingError", "UserError"]
