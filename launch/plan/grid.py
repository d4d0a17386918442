"""The grid of a sweep: words of the command line, of which some give several values, and the points that they make."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from trainers.contract.errors import UserError

MAX_POINTS = 1000  # SLURM's own default for an array

# A quote opens only where a value can begin: not in `it's`.
TOKEN = re.compile(r"""(?<![^\s,:\[{])(?:"(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|(?P<open>["']))|.""", re.DOTALL)


@dataclass(frozen=True)
class Point:
    words: tuple[str, ...]      # key=value, of all keys that were given
    overrides: tuple[str, ...]  # those by which it differs from other points


def grid(words: Sequence[str]) -> list[Point]:
    """The points of `key=value` words, of which some give several values: the last such key changes fastest.

    Raises:
        UserError: no key has several values, one is given twice, the points are too many, or a list is no list.
    """
    choices, seen = [], set()
    for word in words:
        key, equals, text = word.partition("=")
        if equals and key in seen:
            raise UserError(f"`{key}` is given twice", f"give all of its values at once: {key}=a,b,c")
        seen.add(key)
        choices.append([f"{key}={value}" for value in values(text, word)] if equals else [word])
    varied = [place for place, choice in enumerate(choices) if len(choice) > 1]
    if not varied:
        raise UserError("no key has several values: there is nothing to sweep",
                        "write, for instance, optim.lr=0.1,0.01; a value that holds a comma itself needs quotes")
    if (count := math.prod(map(len, choices))) > MAX_POINTS:
        raise UserError(f"these lists make {count:,} points; a sweep has {MAX_POINTS:,} at most", "sweep a part of them")
    return [Point(words, tuple(words[place] for place in varied)) for words in product(*choices)]


def values(text: str, word: str) -> list[str]:
    """The values of a list: what commas outside brackets and quotes separate, as text.

    Raises:
        UserError: an empty value; a bracket or quote that is not closed.
    """
    if "," not in text:
        return [text]
    parts, depth = [""], 0
    for token in TOKEN.finditer(text):
        depth = max(0, depth + (token[0] in ("[", "{")) - (token[0] in ("]", "}")))
        if token["open"]:
            raise UserError(f"`{word}`: a quote is not closed", "a value that holds a quote itself goes into the other quotes")
        if token[0] == "," and not depth:
            parts.append("")
        else:
            parts[-1] += token[0]
    if depth:
        raise UserError(f"`{word}`: a bracket is not closed", "a value that holds one itself needs quotes")
    if len(parts) == 1:
        return parts
    if not all(part.strip() for part in parts):
        raise UserError(f"`{word}` has an empty value", 'write null or "" for one, or leave the comma out')
    return [part.strip() for part in parts]
