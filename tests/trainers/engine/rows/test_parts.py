"""Rows of several ranks become one file, in the order of the samples."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from trainers.contract.errors import TrainingError, UserError
from trainers.engine.rows.parts import Part, merge, row_line


@pytest.mark.parametrize("row, text, as_json", [
    ("a b", "a b", '"a b"'), ("", "", '""'), ("a\nb\r", "a\\nb\\r", '"a\\nb\\r"'),
    ("\u4e2d\u2028", "\u4e2d\u2028", '"\u4e2d\u2028"'),
    (None, "null", "null"), ({"x": [1, 0.5]}, '{"x": [1, 0.5]}', '{"x": [1, 0.5]}'),
    (float("nan"), "null", "null"), ([1.5, float("-inf")], "[1.5, null]", "[1.5, null]"),
    (np.float32(0.5), "0.5", "0.5"), ({"x": torch.tensor([1, 2])}, '{"x": [1, 2]}', '{"x": [1, 2]}'),
    (np.array([np.nan, 1.0]), "[null, 1.0]", "[null, 1.0]"),
])
def test_a_row_is_one_line(row, text, as_json):
    assert (row_line(row, "text"), row_line(row, "json")) == (text, as_json)


def write(folder, ranks, format="text"):
    """Write parts. `ranks` holds the batches of each rank: (numbers of samples, rows)."""
    for rank, batches in enumerate(ranks):
        with Part(folder, rank, format) as part:
            for numbers, rows in batches:
                part.write(np.array(numbers, np.int64), rows)


def test_parts_are_merged_in_the_order_of_the_samples(tmp_path):
    # The ranks have uneven counts, an empty rank comes first, and the samples are in no order. Rows end with characters that
    # would belong to a line end or to the start of a file.
    write(tmp_path / "rows", [[], [([4, 1], ["four\r", ""]), ([], []), ([0], ["\ufeffzero"])], [([3], ["\udcff"]), ([2], [[2]])]])
    (tmp_path / "out").write_text("an older file")
    merge(tmp_path / "rows", 3, 5, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == "\ufeffzero\n\n[2]\n\\udcff\nfour\\r\n".encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows"]
    write(tmp_path / "json", [[([1], torch.tensor([7])), ([0], ["\udcff"])]], "json")
    merge(tmp_path / "json", 1, 2, tmp_path / "out")
    assert list(map(json.loads, (tmp_path / "out").read_text().splitlines())) == ["\udcff", 7]


@pytest.mark.parametrize("numbers", [[0, 1], [0, 1, 1], [0, 1, 2, 3], [0, 1, 3]])
def test_rows_that_are_not_those_of_the_samples_are_refused(tmp_path, numbers):
    write(tmp_path / "rows", [[(numbers, ["x"] * len(numbers))]])
    with pytest.raises(TrainingError, match=f"the ranks have {len(numbers)} rows, of {len(set(numbers))} samples, but the input"):
        merge(tmp_path / "rows", 1, 3, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_named(tmp_path):
    write(tmp_path / "rows", [[([0], ["a"])]])
    with pytest.raises(UserError, match="rows cannot be written to .*gone/out: No such file or directory"):
        merge(tmp_path / "rows", 1, 1, tmp_path / "gone/out")
    (tmp_path / "rows/1.txt").symlink_to("/dev/full")
    with pytest.raises(UserError, match="rows cannot be written to .*rows/1.txt: No space left on device") as caught:
        write(tmp_path / "rows", [[], [([1], ["b"])]])
    assert caught.value.hint == "the disk is full: free some space"


@pytest.mark.parametrize("rows, message", [
    (["a"], "returns 1 rows for a batch of 2 samples"), (["a", "b", "c"], "returns 3 rows for a batch of 2 samples"),
    ("ab", "returns a str, but must return a list"), ({"a": 1, "b": 2}, "returns a dict, but must"), (None, "returns a NoneType"),
    (["a", {1, 2}], "row for sample 8 cannot be written as JSON: a set is not JSON"),
    ([{(1, 2): 3}, "b"], "row for sample 6 cannot be written as JSON: keys must be"),
    ([(loop := []).append(loop) or loop, "b"], "row for sample 6 cannot be written as JSON: "),
])
def test_wrong_rows_are_refused_and_named(tmp_path, rows, message):
    with Part(tmp_path / "rows", 0, "text") as part, pytest.raises(UserError, match=message):
        part.write(np.array([5, 7]), rows)
