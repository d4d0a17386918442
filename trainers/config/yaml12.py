"""YAML 1.2 as specs use it: read scalars and documents (with line numbers), and write YAML. Imports no torch.

ruamel.yaml parses. This module turns ruamel.yaml's events into plain values, and reads scalars itself, for three reasons: an
error in a spec names a line, a value means the same on the command line and in a file, and only the core schema is read
(ruamel.yaml also reads `1_000` as a number and `2024-01-01` as a date).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML, events
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError

from trainers.contract.errors import UserError

Key = tuple[str | int, ...]  # a place in nested values: keys of mappings and positions in lists

WORDS = {text: value
         for value, texts in ((None, ("", "~", "null", "Null", "NULL")),
                              (True, ("true", "True", "TRUE")),
                              (False, ("false", "False", "FALSE")))
         for text in texts}
DECIMAL = re.compile(r"[-+]?[0-9]{1,4000}")  # Python refuses to convert more than 4,300 digits
PREFIXED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

_PART = r"[\w./+%=~@$()-]+(:[\w./+%=~@$()-]+)*"
PLAIN = re.compile(rf"(?=[^\W\d]|[./]){_PART}( {_PART})*")  # text that never needs quotes


def scalar(text: str) -> None | bool | int | float | str:
    """Return the value of a plain scalar by YAML 1.2's core schema: `1e-3` is a number, `off` is text."""
    if text in WORDS:
        return WORDS[text]
    if DECIMAL.fullmatch(text):
        return int(text)
    if PREFIXED.fullmatch(text):
        return int(text, 0)
    if FLOAT.fullmatch(text):
        return float(text)
    if NOT_FINITE.fullmatch(text):
        return float(text.replace(".", "").lower())
    return text


def argument(text: str) -> Any:
    """Return the value of a text on the command line: flow syntax (`[1, 2]`, `{a: 1}`, quotes), or a scalar.

    A text that only starts like flow syntax is returned unchanged. So is `{x}`, which has a key without a value.
    """
    if text[:1] not in ("[", "{", '"', "'"):
        return scalar(text)
    try:
        return _Reader(text, "", flow=True).document().value
    except (YAMLError, UserError, RecursionError):
        return text


@dataclass(frozen=True)
class Document:
    """A YAML document as plain values."""

    value: Any             # dicts whose keys are text, lists, and scalars
    lines: dict[Key, int]  # place -> line number, from 1


def read(text: str, name: str) -> Document:
    """Read one YAML document. All keys are read as text, also keys that look like numbers.

    Raises:
        UserError: a syntax error, a duplicate key, or a tag other than `!!str`. The message gives `name` and the line.
    """
    try:
        return _Reader(text, name).document()
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{name}:{mark.line + 1}: this is not YAML: {problem}",
                        _hint(problem, (error.context_mark or mark).line + 1)) from error
    except ReaderError as error:
        raise UserError(f"{name}:{text.count(chr(10), 0, error.position) + 1}: YAML does not allow the character "
                        f"{error.character:#x}", 'write the character in quotes, as "\\x07"') from error
    except RecursionError as error:
        raise UserError(f"{name}: the document is nested too deeply") from error


# A part of ruamel.yaml's message of a syntax error -> how to fix the text. `{line}` is where the damaged part begins.
HINTS = {
    "flow mapping": "close the `{{` of line {line} with `}}`, and put text that contains `: `, ` #` or a bracket in quotes",
    "flow sequence": "close the `[` of line {line} with `]`, and put text that contains `: `, ` #` or a bracket in quotes",
    "flow node": "close the bracket, and write a value after each comma and colon",
    "quoted scalar, found unexpected end": "close the quote that opens in line {line}",
    "unknown escape": "use single quotes, or write two backslashes for one",
    r"character '\t'": "indent with spaces, not with tabs",
    "cannot start any token": "put text that starts with a special character in quotes",
    "expected alphabetic": "put text that starts with a special character in quotes",
    "found '}'": "remove the `}}`, which closes nothing",
    "found ']'": "remove the `]`, which closes nothing",
    "expected <block end>, but found '<scalar>'": "put the whole text in double quotes",
    "expected <block end>": "give all lines of one mapping or list the same indentation",
    "mapping values": "put text that contains `: ` in quotes, and give all lines of one mapping the same indentation",
    "expected ':'": "write `key: value`",
}


def _hint(problem: str, line: int) -> str:
    hint = next((hint for part, hint in HINTS.items() if part in problem), "put text that contains `: ` or ` #` in quotes")
    return hint.format(line=line)


class _Reader:
    """Turns ruamel.yaml's events into plain values. `flow`: the text must be exactly one flow collection or quoted scalar."""

    def __init__(self, text: str, name: str, flow: bool = False):
        self.text, self.name, self.flow = text, name, flow
        self.events = iter(YAML(typ="safe", pure=True).parse(text))
        self.lines: dict[Key, int] = {}
        self.anchors: dict[str, tuple[Any, Key]] = {}  # the value of each anchor, and its place
        self.end = 0  # where the last value ends, in characters

    def document(self) -> Document:
        next(self.events)  # the stream's start
        if isinstance(next(self.events), events.StreamEndEvent):
            return Document(None, {})
        first = next(self.events)
        if self.flow and not (getattr(first, "flow_style", None) or getattr(first, "style", None)):
            raise YAMLError("a block collection")
        value = self.node(first, ())
        end = next(self.events)
        if not isinstance(next(self.events), events.StreamEndEvent):
            raise self.error(end, "a second document starts here", "put each document into its own file")
        if self.flow and self.text[self.end:]:
            raise YAMLError("more after the value")
        return Document(value, self.lines)

    def node(self, event: Any, place: Key) -> Any:
        self.lines.setdefault(place, event.start_mark.line + 1)
        if isinstance(event, events.AliasEvent):
            if event.anchor not in self.anchors:
                raise self.error(event, f"`*{event.anchor}` refers to no anchor", "put text that starts with `*` in quotes")
            anchored, source = self.anchors[event.anchor]
            for key in [key for key in self.lines if key[:len(source)] == source]:
                self.lines.setdefault((*place, *key[len(source):]), event.start_mark.line + 1)
            return anchored
        tag = str(event.tag or "")
        if tag and not (tag in ("!", "tag:yaml.org,2002:str") and isinstance(event, events.ScalarEvent)):
            raise self.error(event, f"the tag `{tag}` is not supported", "put text that starts with `!` in quotes")
        value: Any
        if isinstance(event, events.MappingStartEvent):
            value = self.mapping(place)
        elif isinstance(event, events.SequenceStartEvent):
            value = self.sequence(place)
        else:
            value = event.value if tag or event.style else scalar(event.value)
            self.end = event.end_mark.index
        if event.anchor:
            self.anchors[event.anchor] = value, place
        return value

    def sequence(self, place: Key) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), events.SequenceEndEvent):
            items.append(self.node(event, (*place, len(items))))
        self.end = event.end_mark.index
        return items

    def mapping(self, place: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(key := next(self.events), events.MappingEndEvent):
            if not isinstance(key, events.ScalarEvent):
                raise self.error(key, "a key is a list, a mapping or an alias", "use text as the key")
            if key.value == "<<" and not key.style:
                raise self.error(key, "merge keys (`<<`) are not part of YAML 1.2", "write the keys out")
            inside = (*place, key.value)
            if key.value in values:
                raise self.error(key, f"duplicate key `{key.value}`, first given in line {self.lines[inside]}",
                                 "keep one of the two")
            self.lines[inside] = key.start_mark.line + 1
            event = next(self.events)
            if self.flow and event.start_mark.index == event.end_mark.index:
                raise YAMLError("a key without a value")
            values[key.value] = self.node(event, inside)
        self.end = key.end_mark.index
        return values

    def error(self, event: Any, message: str, hint: str) -> UserError:
        return UserError(f"{self.name}:{event.start_mark.line + 1}: {message}", hint)


def lines(values: Mapping[str, Any], place: Key = ()) -> Iterator[tuple[Key, str]]:
    """Yield block YAML as (place of a key, its line), one line for each key. A list is on the line of its key."""
    indent = "  " * len(place)
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield (*place, key), f"{indent}{_text(key)}:"
            yield from lines(value, (*place, key))
        else:
            yield (*place, key), f"{indent}{_text(key)}: {inline(value)}"


def dump(values: Mapping[str, Any]) -> str:
    """Return block YAML that `read`, like any other reader of YAML 1.2, reads back as the same values."""
    return "".join(line + "\n" for _, line in lines(values))


def inline(value: Any) -> str:
    """Return a value as YAML on one line."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case float() if not math.isfinite(value):
            return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
        case int() | float():
            return repr(value)
        case Mapping():
            return "{" + ", ".join(f"{_text(key)}: {inline(item)}" for key, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(inline, value)) + "]"
        case _:
            return _text(str(value))


def _text(text: str) -> str:
    """Return a text as a plain scalar where that is safe, otherwise in double quotes by JSON's rules: YAML 1.2 contains JSON."""
    if PLAIN.fullmatch(text) and isinstance(scalar(text), str):
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(char if char.isprintable() else _escape(ord(char)) for char in quoted)


def _escape(code: int) -> str:
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
