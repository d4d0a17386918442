"""Tables as text."""

from __future__ import annotations

import sys

import pytest

from launch.report.columns import columns, cut

ROWS = [("RUN", "METRICS"), ("a", "x" * 300), ("语料", "y")]


def test_columns_are_aligned_by_cells_and_cut():
    lines = columns(ROWS, width=20).splitlines()
    assert lines == ["RUN   METRICS", "a     " + "x" * 13 + "…", "语料  y"]
    assert cut("语料", 3) == "语…" and cut("语料", 4) == "语料"


@pytest.mark.parametrize("terminal, variable, width", [(False, None, 306), (True, "40", 40), (False, "40", 40)])
def test_a_table_is_cut_for_a_terminal_but_not_for_a_file(monkeypatch, terminal, variable, width):
    monkeypatch.delenv("COLUMNS", raising=False)
    if variable:
        monkeypatch.setenv("COLUMNS", variable)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert max(map(len, columns(ROWS).splitlines())) == width
