"""`train.deterministic`: errors where an operation has no deterministic kernel, and warnings once that has happened.

With warnings instead of errors, torch chooses kernels that are not deterministic even where deterministic ones exist: in the
backward pass of attention. Therefore a run starts with errors. A rank that meets an operation without a deterministic kernel
cannot repeat its step with warnings by itself, because the other ranks wait for it in a collective. It records the operation,
and fails. The next attempt continues from the newest checkpoint with warnings, and so do all later attempts. Such an end does not
count as a failure (`retries.changes_settings`). Imports no torch.
"""

from __future__ import annotations

from typing import Any

from trainers.config.schema import RunConfig
from trainers.contract.errors import NotDeterministic
from trainers.contract.files import read_json, replace_json
from trainers.contract.paths import RunPaths


def found(paths: RunPaths) -> dict[str, Any] | None:
    """Return {"attempt": number of the attempt (None if started without `launch`), "operation": the operation without a
    deterministic kernel}; None if the run has met no such operation."""
    try:
        return read_json(paths.not_deterministic)
    except FileNotFoundError:
        return None


def with_warnings(config: RunConfig) -> RunConfig:
    """Return the config with `train.deterministic=warn`."""
    return config.model_copy(update={"train": config.train.model_copy(update={"deterministic": "warn"})})


def note(paths: RunPaths) -> str:
    """Return a line that tells the user why the run continues with warnings."""
    operation = (found(paths) or {}).get("operation", "an operation")
    return (f"`{operation}` has no deterministic kernel, so operations without one only give warnings: a resumed run gives "
            "almost the same losses, but not to the last bit")


def without_kernel(paths: RunPaths, attempt: int | None, rank: int, operation: str) -> NotDeterministic:
    """Record the operation for the next attempt, and return the error of the rank that met it."""
    if found(paths) is None:  # another rank may have met it first
        replace_json(paths.not_deterministic, {"attempt": attempt, "operation": operation})
    return NotDeterministic(f"rank {rank}: `{operation}` has no deterministic kernel",
                            "the next attempt gives warnings instead; train.deterministic=warn does so from the start")
