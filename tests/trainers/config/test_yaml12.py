"""YAML 1.2: reading, writing, and the errors of texts that cannot be read."""

from __future__ import annotations

import math
import random

import pytest

from trainers.config.yaml12 import argument, dump, inline, read
from trainers.contract.errors import UserError

SCALARS = {
    "1e-3": 0.001, "1E5": 1e5, ".5": 0.5, "1.": 1.0, "-1": -1, "+2": 2, "007": 7, "0o17": 15, "0x1F": 31,
    "off": "off", "yes": "yes", "no": "no", "on": "on", "true": True, "False": False,
    "null": None, "~": None, "": None, "1_000": "1_000", "2024-01-01": "2024-01-01", "12:30": "12:30",
    "-.inf": -math.inf, "[1, 2]": [1, 2], "{a: 1, b: [off]}": {"a": 1, "b": ["off"]},
    "'1'": "1", '"a\\n"': "a\n", "'it''s'": "it's", "[]": [], "{}": {}, "中文": "中文",
}

TEXTS = [
    "a b", "a # b", "a: b", "{a", "{run}", "[x", "[1] [2]", "[a]: b", '"a" b', "'", "$(touch x)", "`id`", "%j", "%",
    "@x", "*a", "&b", "!c", "-", "- a", "--x", "|", ">", "a,b", ",", "?", " 1", "a\nb", "[1] # no", "[*a]", "[!x 1]",
    "{a: 1, a: 2}", "日本 語", "C:\\x", "#",
]


@pytest.mark.parametrize("text", SCALARS)
def test_the_command_line_and_a_file_give_the_same_value(text: str) -> None:
    expected = SCALARS[text]
    for value in (argument(text), read(f"x: {text}\n", "f.yaml").value["x"]):
        assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("text", TEXTS)
def test_plain_text_on_the_command_line_is_unchanged(text: str) -> None:
    assert argument(text) == text


def test_not_a_number() -> None:
    assert math.isnan(argument(".nan"))


def test_everything_written_is_read_back() -> None:
    pieces = [*"aZ_09 .:/#-+[]{},'\"\\\n\t%=~@$()*&!|>?中é\x00\x7f\x85\u2028\ufeff\u3000\U0001f600\udc80",
              "null", "true", "1e3", ": ", " #", "off", ".inf", "0x1f"]
    rng = random.Random(0)

    def text() -> str:
        return "".join(rng.choice(pieces) for _ in range(rng.randint(0, 6)))

    def value(depth: int):
        match rng.randint(0, 9):
            case 0 | 1:
                return [value(depth + 1) for _ in range(rng.randint(0, 3))] if depth < 3 else []
            case 2 | 3:
                return {text(): value(depth + 1) for _ in range(rng.randint(0, 3))} if depth < 3 else {}
            case 4:
                return rng.choice([None, True, False, 0, -5, 10**30, 1e-5, 1.5, 1e22, math.inf, -math.inf])
            case _:
                return text()

    for _ in range(500):
        values = {text(): value(0) for _ in range(3)}
        assert read(dump(values), "f.yaml").value == values
        assert argument(inline(list(values.values()))) == list(values.values())


def test_lines_are_recorded_and_anchors_resolved() -> None:
    document = read("# first\na: &x {b: 1,\n  c: !!str 5}\nd:\n  - *x\n", "f.yaml")
    assert document.value == {"a": {"b": 1, "c": "5"}, "d": [{"b": 1, "c": "5"}]}
    assert document.lines["a", "b"] == 2
    assert document.lines["a", "c"] == 3
    assert document.lines["d", 0] == document.lines["d", 0, "b"] == document.lines["d", 0, "c"] == 5


@pytest.mark.parametrize("text, hint", {
    "a: 1\nb: {c: 1\n": "close the `{` of line 2 with `}`, and",
    "a: [1,\n  2\nb: 1\n": "close the `[` of line 1 with `]`, and",
    "a: [\n": "close the bracket, and write a value",
    "a: {b: 1}}\n": "remove the `}`, which closes nothing",
    "a: [1]]\n": "remove the `]`, which closes nothing",
    "a:\n\tb: 1\n": "indent with spaces, not with tabs",
    "a: 1\nb: 'x\nc: 1\n": "close the quote that opens in line 2",
    "a: 'it's'\n": "put the whole text in double quotes",
    "a: \"\\q\"\n": "use single quotes, or write two backslashes for one",
    "a:\n  b: 1\n c: 2\n": "give all lines of one mapping or list the same indentation",
    "a: b: c\n": "put text that contains `: ` in quotes, and give all lines of one mapping the same indentation",
    "a: 1\nb\n": "write `key: value`",
    "a: @x\n": "put text that starts with a special character in quotes",
    "a: *\n": "put text that starts with a special character in quotes",
    "a: |x\n b\n": "put text that contains `: ` or ` #` in quotes",
}.items())
def test_the_hint_fits_the_syntax_error(text: str, hint: str) -> None:
    with pytest.raises(UserError, match="this is not YAML") as caught:
        read(text, "f.yaml")
    assert caught.value.hint is not None and caught.value.hint.startswith(hint)


@pytest.mark.parametrize("text, message", {
    "a: 1\n b: 2": "f.yaml:2: this is not YAML: mapping values are not allowed here",
    "a: 1\nb: [1, 2": "f.yaml:2: this is not YAML: while parsing a flow sequence",
    "a: 1\nb: 2\na: 3": "f.yaml:3: duplicate key `a`, first given in line 1",
    "a: 1\nb: {c: 1, c: 2}": "f.yaml:2: duplicate key `c`",
    "a: 1\nb: *c": "f.yaml:2: `*c` refers to no anchor",
    "a: &x {b: 1}\nc:\n  <<: *x": "f.yaml:3: merge keys (`<<`) are not part of YAML 1.2",
    "a: &x [*x]": "f.yaml:1: `*x` refers to no anchor",
    "a: !!python/object:os.system x": "f.yaml:1: the tag `tag:yaml.org,2002:python/object:os.system` is not supported",
    "a: 1\nb: \x07": "f.yaml:2: YAML does not allow the character 0x7",
    "a: 1\n---\nb: 1": "f.yaml:2: a second document starts here",
    "? [a]\n: 1": "f.yaml:1: a key is a list",
    "[" * 5000: "f.yaml: the document is nested too deeply",
}.items())
def test_errors_name_the_line_and_the_problem(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(text, "f.yaml")
    assert caught.value.message.startswith(message)
    assert len(str(caught.value).splitlines()) <= 2
