"""Aligned columns of text, cut to the width of a terminal. Widths are in cells: a Chinese character takes two cells."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size


def columns(rows: Sequence[tuple[str, ...]], width: int | None = None) -> str:
    """The rows as lines with aligned columns, each line cut at `width` cells.

    Without `width`, lines are cut at $COLUMNS or at the width of the terminal. Output to a file or a pipe is not cut.
    """
    width = terminal_width() if width is None else width
    widths = [max(map(cell_len, column)) for column in zip(*rows)]
    return "\n".join(cut("  ".join(map(set_cell_size, row, widths)).rstrip(), width) for row in rows)


def terminal_width() -> int:
    """$COLUMNS, or the width of the terminal; without a limit if the output goes to a file or a pipe."""
    if "COLUMNS" not in os.environ and not sys.stdout.isatty():
        return sys.maxsize
    return shutil.get_terminal_size().columns


def too_wide(rows: Sequence[tuple[str, ...]], width: int) -> bool:
    """Whether `columns` would cut a line."""
    return sum(max(map(cell_len, column)) + 2 for column in zip(*rows)) - 2 > width


def cut(text: str, width: int) -> str:
    """The text, cut with an ellipsis at the end if it is wider than `width` cells."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"
