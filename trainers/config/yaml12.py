"""YAML 1.2 as specs use it: scalars, documents with line numbers, and writing. Imports no torch.

ruamel.yaml parses. Its events are made plain values here, and scalars read, for three reasons: an error
in a spec names a line, a value on the command line means what it means in a file, and nothing but the
core schema is read (ruamel.yaml takes `1_000` for a number and `2024-01-01` for a date besides).
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

Key = tuple[str | int, ...]  # a place in nested values: keys, and positions in lists

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
PLAIN = re.compile(rf"(?=[^\W\d]|[./]){_PART}( {_PART})*")  # text that surely needs no quotes


def scalar(text: str) -> None | bool | int | float | str:
    """A plain scalar by YAML 1.2's core schema: `1e-3` is a number, `off` a word."""
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
    """A value on the command line: flow syntax (`[1, 2]`, `{a: 1}`, quotes) if all of it is, else a scalar.

    What only begins like flow syntax is text, unchanged; so is `{x}`, a mapping to nothing.
    """
    if text[:1] not in ("[", "{", '"', "'"):
        return scalar(text)
    try:
        return _Reader(text, "", flow=True).document().value
    except (YAMLError, UserError, RecursionError):
        return text


@dataclass(frozen=True)
class Document:
    value: Any             # of dicts with text for keys, lists and scalars
    lines: dict[Key, int]  # from 1, by place


def read(text: str, name: str) -> Document:
    """One YAML document; keys are text, whatever they look like.

    Raises:
        UserError: a syntax error, a key that stands twice, a tag other than `!!str`. It gives `name` and the line.
    """
    try:
        return _Reader(text, name).document()
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{name}:{mark.line + 1}: this is no YAML: {said}",
                        "a text that holds `: ` or ` #` needs quotes") from error
    except ReaderError as error:
        raise UserError(f"{name}:{text.count(chr(10), 0, error.position) + 1}: a character that YAML does not allow, "
                        f"number {error.character:#x}", 'write it in quotes, as "\\x07"') from error
    except RecursionError as error:
        raise UserError(f"{name}: it is nested too deeply") from error


class _Reader:
    """Events to values. `flow`: the text must be one flow collection or one quoted scalar, and no more."""

    def __init__(self, text: str, name: str, flow: bool = False):
        self.text, self.name, self.flow = text, name, flow
        self.events = iter(YAML(typ="safe", pure=True).parse(text))
        self.lines: dict[Key, int] = {}
        self.anchors: dict[str, Any] = {}
        self.end = 0  # of the last value, in characters

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
            raise self.error(end, "the document ends and another begins", "put that one into a file of its own")
        if self.flow and self.text[self.end:]:
            raise YAMLError("more after the value")
        return Document(value, self.lines)

    def node(self, event: Any, place: Key) -> Any:
        self.lines.setdefault(place, event.start_mark.line + 1)
        if isinstance(event, events.AliasEvent):
            if event.anchor not in self.anchors:
                raise self.error(event, f"`*{event.anchor}` names no anchor", "text that begins with `*` needs quotes")
            return self.anchors[event.anchor]
        tag = str(event.tag or "")
        if tag and not (tag in ("!", "tag:yaml.org,2002:str") and isinstance(event, events.ScalarEvent)):
            raise self.error(event, f"the tag `{tag}` is not read", "text that begins with `!` needs quotes")
        if isinstance(event, events.MappingStartEvent):
            value = self.mapping(place)
        elif isinstance(event, events.SequenceStartEvent):
            value = self.sequence(place)
        else:
            value = event.value if tag or event.style else scalar(event.value)
            self.end = event.end_mark.index
        if event.anchor:
            self.anchors[event.anchor] = value
        return value

    def sequence(self, place: Key) -> list[Any]:
        found: list[Any] = []
        while not isinstance(event := next(self.events), events.SequenceEndEvent):
            found.append(self.node(event, (*place, len(found))))
        self.end = event.end_mark.index
        return found

    def mapping(self, place: Key) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(key := next(self.events), events.MappingEndEvent):
            if not isinstance(key, events.ScalarEvent):
                raise self.error(key, "a key is a list, a mapping or an alias", "a key must be a word")
            inside = (*place, key.value)
            if key.value in found:
                raise self.error(key, f"`{key.value}` stands here for the second time, "
                                      f"first in line {self.lines[inside]}", "keep one of them")
            self.lines[inside] = key.start_mark.line + 1
            event = next(self.events)
            if self.flow and event.start_mark.index == event.end_mark.index:
                raise YAMLError("a key without a value")
            found[key.value] = self.node(event, inside)
        self.end = key.end_mark.index
        return found

    def error(self, event: Any, message: str, hint: str) -> UserError:
        return UserError(f"{self.name}:{event.start_mark.line + 1}: {message}", hint)


def lines(values: Mapping[str, Any], place: Key = ()) -> Iterator[tuple[Key, str]]:
    """Block YAML, a line for each key, with the key's place; lists are written on their key's line."""
    indent = "  " * len(place)
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield (*place, key), f"{indent}{_text(key)}:"
            yield from lines(value, (*place, key))
        else:
            yield (*place, key), f"{indent}{_text(key)}: {inline(value)}"


def dump(values: Mapping[str, Any]) -> str:
    """Block YAML that `read` reads back as the same values, and any reader of YAML 1.2 too."""
    return "".join(line + "\n" for _, line in lines(values))


def inline(value: Any) -> str:
    """A value on one line."""
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
    """Plain where that is safe, else in double quotes, by JSON's rules: YAML 1.2 contains JSON."""
    if PLAIN.fullmatch(text) and isinstance(scalar(text), str):
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(char if char.isprintable() else _escape(ord(char)) for char in quoted)


def _escape(code: int) -> str:
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
