"""The grid of a sweep: the points that the `key=value` words of a command line make."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, product

from trainers.contract.errors import UserError

MAX_POINTS = 1000  # SLURM's own default for an array

# A quote opens only where a value can start: the apostrophe in `it's` is text.
TOKEN = re.compile(r"""(?<![^\s,:\[{])(?:"(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|(?P<open>["']))|.""", re.DOTALL)


@dataclass(frozen=True)
class Point:
    """One run of a sweep: one value for each key."""

    words: tuple[str, ...]      # key=value, for every key that was given
    overrides: tuple[str, ...]  # key=value, only for the keys that have several values in the grid


@dataclass(frozen=True)
class Seeds:
    """The seeds of `--seeds`: each grid point runs once with each of them."""

    keys: tuple[str, ...]    # the keys that get the seed; the first one stands for the seed in tables
    values: tuple[int, ...]


def read_seeds(text: str, keys: Sequence[str]) -> Seeds:
    """Return the seeds that `--seeds TEXT` asks for: `3` means 0, 1 and 2; `1,5` means these two.

    Args:
        keys: the keys of the task that get the seed.

    Raises:
        UserError: the text is neither, or means fewer than two seeds.
    """
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(f"`--seeds` is `{text}`", "give a number of seeds, as in --seeds 3, or the seeds: --seeds 1,5,7")
    numbers = [int(number) for number in text.split(",")]
    count = numbers[0] if len(numbers) == 1 else len(numbers)
    if count < 2:
        raise UserError(f"`--seeds {text}` means {count} run{'s' * (count != 1)}, but a deviation needs at least two",
                        f"use --seeds 3, or {keys[0]}=SEED for a single run")
    _check_count(count)
    return Seeds(tuple(keys), tuple(range(count) if len(numbers) == 1 else numbers))


def grid(words: Sequence[str], seeds: Seeds | None = None) -> list[Point]:
    """Return the points of `key=value` words, where `value` may be a list: `a,b,c`.

    The points are every combination of values; the last key with several values changes fastest, seeds faster still.

    Raises:
        UserError: no key has several values, a key is given twice, there are too many points, or a list cannot be read.
    """
    choices: list[list[tuple[str, ...]]] = []  # for each key, the words of each of its values
    seen = set()
    for word in words:
        key, equals, text = word.partition("=")
        if equals and key in seen:
            raise UserError(f"`{key}` is given twice", f"give all of its values at once: {key}=a,b,c")
        seen.add(key)
        choices.append([(f"{key}={value}",) for value in values(text, word)] if equals else [(word,)])
    if seeds:
        choices.append([tuple(f"{key}={seed}" for key in seeds.keys) for seed in seeds.values])
    varied = [position for position, choice in enumerate(choices) if len(choice) > 1]
    if not varied:
        raise UserError("no key has several values: there is nothing to sweep",
                        "write, for instance, optim.lr=0.1,0.01; put quotes around a value that contains a comma")
    _check_count(math.prod(map(len, choices)))
    return [Point(tuple(chain(*combination)), tuple(combination[position][0] for position in varied))
            for combination in product(*choices)]


def _check_count(points: int) -> None:
    if points > MAX_POINTS:
        raise UserError(f"these lists make {points:,} points; a sweep can have at most {MAX_POINTS:,}",
                        "give fewer values, or split the grid into several sweeps")


def values(text: str, word: str) -> list[str]:
    """Split a list at its commas, except at commas inside brackets or quotes. The values stay text.

    Args:
        text: the list.
        word: the whole `key=value` word, for error messages.

    Raises:
        UserError: a value is empty, or a bracket or quote is not closed.
    """
    if "," not in text:
        return [text]
    parts, depth = [""], 0
    for token in TOKEN.finditer(text):
        depth = max(0, depth + (token[0] in ("[", "{")) - (token[0] in ("]", "}")))
        if token["open"]:
            raise UserError(f"`{word}`: a quote is not closed",
                            "put a value that contains a quote inside the other kind of quotes")
        if token[0] == "," and not depth:
            parts.append("")
        else:
            parts[-1] += token[0]
    if depth:
        raise UserError(f"`{word}`: a bracket is not closed", "put quotes around a value that contains a bracket")
    if len(parts) == 1:
        return parts
    if not all(part.strip() for part in parts):
        raise UserError(f"`{word}` has an empty value", 'write null or "" for an empty value, or remove the comma')
    return [part.strip() for part in parts]
