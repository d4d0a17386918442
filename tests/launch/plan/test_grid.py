"""Grids: how lists of values are read, and which points they make."""

from __future__ import annotations

import pytest

from launch.plan.grid import grid, values
from trainers.config import yaml12
from trainers.contract.errors import UserError


@pytest.mark.parametrize("text, expected", [
    ("0.1,0.01", ["0.1", "0.01"]),
    ("0.1, 1e-2", ["0.1", "1e-2"]),
    ("0.1", ["0.1"]),
    ("[0.9,0.99],[0.8,0.9]", ["[0.9,0.99]", "[0.8,0.9]"]),
    ("[1,2]", ["[1,2]"]),
    ("{a: [1,2], b: 3},{a: [], b: 4}", ["{a: [1,2], b: 3}", "{a: [], b: 4}"]),
    ('"a,b",c', ['"a,b"', "c"]),
    ("'a,b'", ["'a,b'"]),
    ("'it''s, so',b", ["'it''s, so'", "b"]),
    (r'"a\",b",c', [r'"a\",b"', "c"]),
    ('["a],b", c],d', ['["a],b", c]', "d"]),
    ("it's,that's", ["it's", "that's"]),
    ("a],b", ["a]", "b"]),
    ("null,off", ["null", "off"]),
    ("中文,a b", ["中文", "a b"]),
])
def test_a_comma_outside_brackets_and_quotes_separates(text, expected):
    found = values(text, f"key={text}")
    assert found == expected
    if len(found) > 1 and text[0] in "[{\"'":  # the list is also YAML
        assert [yaml12.argument(part) for part in found] == yaml12.argument(f"[{text}]")


@pytest.mark.parametrize("words, message", [
    (["optim.lr=0.1", "train.seed=1"], "no key has several values"),
    (["optim.lr=0.1,"], "`optim.lr=0.1,` has an empty value"),
    (["optim.lr=0.1,,0.2"], "has an empty value"),
    (["optim.betas=[0.9,0.99"], "a bracket is not closed"),
    (["name='a,b"], "a quote is not closed"),
    (["optim.lr=0.1,0.2", "optim.lr=0.3"], "`optim.lr` is given twice"),
    (["train.seed=" + ",".join(map(str, range(34))), "data.x=" + ",".join(map(str, range(34)))], "make 1,156 points"),
])
def test_words_that_make_no_grid_are_refused(words, message):
    with pytest.raises(UserError, match=message) as raised:
        grid(words)
    assert raised.value.hint


def test_the_grid_is_the_product_and_the_last_key_changes_fastest():
    points = grid(["optim.lr=0.1,0.01", "log.every=1", "train.seed=1,2"])
    assert [point.overrides for point in points] == [
        ("optim.lr=0.1", "train.seed=1"), ("optim.lr=0.1", "train.seed=2"),
        ("optim.lr=0.01", "train.seed=1"), ("optim.lr=0.01", "train.seed=2")]
    assert points[0].words == ("optim.lr=0.1", "log.every=1", "train.seed=1")
