"""Suggestions for a misspelled key."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def nearest_keys(key: str, known: Sequence[str]) -> list[str]:
    """Return the known keys that are most similar to `key`, at most three; an empty list if none is similar enough.

    Keys are compared as a whole and by their last part: for `lr`, the nearest key is `optim.lr`.
    """
    if "." in key:  # the key is in a section: do not suggest whole sections
        known = [other for other in known if not any(more.startswith(f"{other}.") for more in known)]

    def similarity(other: str) -> float:
        return max(difflib.SequenceMatcher(None, key, other).ratio(),
                   difflib.SequenceMatcher(None, key.rpartition(".")[2], other.rpartition(".")[2]).ratio())

    scores = {other: similarity(other) for other in known}
    best = max(scores.values(), default=0)
    return [other for other, score in scores.items() if score == best][:3] if best >= 0.7 else []
