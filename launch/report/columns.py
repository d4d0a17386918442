"""Aligned columns of text, cut to the width of a terminal."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import datetime
from unicodedata import combining, east_asian_width


def columns(cells: Sequence[tuple[str, ...]], width: int | None = None) -> str:
    """Lines of cells, aligned and cut at `width` columns (None: the terminal's)."""
    width = width or shutil.get_terminal_size().columns
    widths = [max(map(cells_wide, column)) for column in zip(*cells)]
    return "\n".join(cut("  ".join(map(_pad, line, widths)).rstrip(), width) for line in cells)


def local(time: str | None) -> str:
    return datetime.fromisoformat(time).astimezone().strftime("%Y-%m-%d %H:%M:%S") if time else "?"


def cells_wide(text: str) -> int:
    """Columns on a terminal: Chinese characters take two."""
    if text.isascii():
        return len(text)
    return sum(0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in text)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - cells_wide(text))


def cut(text: str, width: int) -> str:
    if cells_wide(text) <= width:
        return text
    while cells_wide(text) >= width:
        text = text[:-1]
    return text + "…"
