"""The typed schema of a run, and what is computed from it. Imports no torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainers.config.schema import Group, RunConfig, SearchConfig, Section, TaskConfig

__all__ = ["Group", "RunConfig", "SearchConfig", "Section", "TaskConfig"]


def __getattr__(name: str) -> Any:
    # Import the schema on first use: importing pydantic takes longer than all of `launch --help`.
    if name in __all__:
        from trainers.config import schema

        return getattr(schema, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
