"""The typed schema of a run, and what is computed from it. Imports no torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainers.config.schema import RunConfig, SearchConfig, Section, TaskConfig

__all__ = ["RunConfig", "SearchConfig", "Section", "TaskConfig"]


def __getattr__(name: str) -> Any:
    # Imported on first use: pydantic takes longer to import than `launch --help` takes in all.
    if name in __all__:
        from trainers.config import schema

        return getattr(schema, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
