"""Attempts that ended so that the next attempt can do better with other settings. Imports no torch."""

from __future__ import annotations

from trainers.config import determinism, micro_batch
from trainers.contract.paths import RunPaths


def changes_settings(paths: RunPaths, attempt: int) -> bool:
    """Return whether this attempt ended so that the next attempt uses a smaller micro-batch, or warnings instead of errors
    for operations without a deterministic kernel. Such an end does not count as a failure."""
    try:
        met = determinism.found(paths)
        return (any(entry["attempt"] == attempt for entry in micro_batch.tried_sizes(paths))
                or met is not None and met["attempt"] == attempt)
    except (OSError, ValueError):
        return False
