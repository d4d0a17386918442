"""Keys that somebody may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def nearest_keys(key: str, known: Sequence[str]) -> list[str]:
    """The known keys that are most like this one, as a whole or in their last part: `lr` is `optim.lr`."""
    if "." in key:  # of a section, so no section itself
        known = [other for other in known if not any(more.startswith(f"{other}.") for more in known)]

    def likeness(other: str) -> float:
        return max(difflib.SequenceMatcher(None, key, other).ratio(),
                   difflib.SequenceMatcher(None, key.rpartition(".")[2], other.rpartition(".")[2]).ratio())

    scores = {other: likeness(other) for other in known}
    best = max(scores.values(), default=0)
    return [other for other, score in scores.items() if score == best][:3] if best >= 0.7 else []
