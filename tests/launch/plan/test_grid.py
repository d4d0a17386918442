"""Grids: how lists of values are read, and which points they make."""

from __future__ import annotations

import pytest

from launch.plan.grid import Seeds, grid, read_seeds, values
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


def test_seeds_repeat_each_point():
    keys = ("search.seed", "model.params.random_state")
    assert read_seeds("3", keys) == Seeds(keys, (0, 1, 2))
    points = grid(["data=sample", "search.cv=3,5"], read_seeds("7,1", keys))
    assert [point.overrides for point in points] == [
        ("search.cv=3", "search.seed=7"), ("search.cv=3", "search.seed=1"),
        ("search.cv=5", "search.seed=7"), ("search.cv=5", "search.seed=1")]
    assert points[0].words == ("data=sample", "search.cv=3", "search.seed=7", "model.params.random_state=7")


@pytest.mark.parametrize("text, message", [
    ("three", "`--seeds` is `three`"), ("1,", "`--seeds` is `1,`"), ("-1", "`--seeds` is `-1`"),
    ("1", "`--seeds 1` means 1 run, but"), ("0", "means 0 runs"), ("1" + "0" * 30, "points; a sweep can have at most 1,000"),
])
def test_text_that_means_no_seeds_is_refused(text, message):
    with pytest.raises(UserError, match=message) as raised:
        read_seeds(text, ("train.seed",))
    assert raised.value.hint
