"""Draws the confusion matrix as a PNG file."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from matplotlib import font_manager, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MOST_NUMBERED = 30  # classes; with more, counts would be too small to read
# The first is Matplotlib's own font, which has no Chinese characters. The first of the others that is installed has them.
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
         "Microsoft YaHei", "SimHei", "PingFang SC", "Arial Unicode MS")


def draw_confusion(counts: np.ndarray, classes: list[str], path: Path) -> None:
    """Write a confusion matrix as a PNG file. An existing file is replaced in one step.

    Args:
        counts: int [C, C], the number of images by true class (row) and predicted class (column). The colour of a cell is
            its share of the row.
        classes: the names of the C classes.
    """
    installed = set(font_manager.get_font_names())
    with rc_context({"font.family": [font for font in FONTS if font in installed]}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        _draw(counts, classes, path)


def _draw(counts: np.ndarray, classes: list[str], path: Path) -> None:
    n = len(classes)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(14.0, 3.5 + 0.42 * n)  # inches
    figure = Figure((side + 0.8, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = min(10.0, 72 * (side - 2.5) / n * 0.8)  # points: one line of text fits a row
    # Matplotlib reads `$` as the start of a formula.
    names = [_short(name).replace("$", r"\$") for name in classes]
    axes.set_xticks(range(n), names, rotation=90, fontsize=size)
    axes.set_yticks(range(n), names, fontsize=size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    total = counts.sum()
    axes.set_title(f"{np.trace(counts):,} of {total:,} correct ({np.trace(counts) / max(total, 1):.1%})", fontsize=11)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    if n <= MOST_NUMBERED:
        for row, column in np.ndindex(n, n):
            if counts[row, column]:
                axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=min(size, 9.0),
                          color="white" if shares[row, column] > 0.6 else "black")
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)


def _short(name: str, most: int = 20) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
