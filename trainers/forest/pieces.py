"""Divides the fits of a grid into pieces of work that do not depend on each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from numbers import Integral
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

import joblib
from sklearn.base import BaseEstimator, clone

from trainers.forest.equivalence import family, why_plain


@dataclass(frozen=True)
class Forest:
    """One forest to fit, and the candidates whose scores come from its first trees."""

    max_depth: int | None
    sizes: Mapping[int, tuple[int, ...]]  # number of trees -> numbers of the candidates

    @property
    def trees(self) -> int:
        return max(self.sizes)

    @property
    def largest_candidate(self) -> int:
        """The number of a candidate that asks for all trees of this forest."""
        return self.sizes[self.trees][0]


@dataclass(frozen=True)
class Piece:
    """Fits on one fold: a family of forests, the deepest first, or one candidate that is fitted plainly."""

    fold: int
    forests: tuple[Forest, ...]
    plain: tuple[int, ...]      # numbers of the candidates that are fitted plainly
    content: str                # a hash of what is fitted to the fold
    trees: int                  # an upper bound, for the progress

    @property
    def candidates(self) -> tuple[int, ...]:
        of_forests = (number for forest in self.forests for numbers in forest.sizes.values() for number in numbers)
        return (*self.plain, *of_forests)

    def key(self, data: str) -> str:
        """Return the name under which the results of this piece are kept. Another hash of the `data` gives another name."""
        return f"{self.fold}-{joblib.hash([self.content, data])[:16]}"


def make_pieces(estimator: BaseEstimator, candidates: Sequence[Mapping[str, Any]], rows: Sequence[int], columns: int,
                no_shortcut: str | None) -> tuple[list[Piece], dict[str, int]]:
    """Return (the pieces of all folds, how many candidates are fitted plainly for each reason).

    The pieces are in the order of the folds. Within a fold, families come first, those with the most trees in front.

    Args:
        rows: the number of rows in the training set of each fold.
        columns: the number of columns of the table.
        no_shortcut: why the whole search is fitted plainly, or None.
    """
    reasons: dict[str, int] = {}
    forests: dict[int, BaseEstimator] = {}
    for number, candidate in enumerate(candidates):
        reason = no_shortcut
        if reason is None:
            forest = clone(estimator).set_params(**clone(dict(candidate), safe=False))
            reason = why_plain(forest)
        if reason is None:
            forests[number] = forest
        else:
            reasons[reason] = reasons.get(reason, 0) + 1
    plain = [number for number in range(len(candidates)) if number not in forests]
    pieces = []
    for fold, training_rows in enumerate(rows):
        families: dict[str, list[int]] = {}
        for number, forest in forests.items():
            families.setdefault(family(forest, training_rows, columns), []).append(number)
        family_pieces = [_family_piece(fold, name, {number: forests[number] for number in members})
                         for name, members in families.items()]
        pieces += sorted(family_pieces, key=lambda piece: -piece.trees)
        pieces += [plain_piece(fold, number, estimator, candidates) for number in plain]
    return pieces, reasons


def plain_piece(fold: int, number: int, estimator: BaseEstimator, candidates: Sequence[Mapping[str, Any]]) -> Piece:
    """Return the piece of one plain fit: one candidate on one fold."""
    own = {**estimator.get_params(deep=False), **candidates[number]}
    trees = own.get("n_estimators", 1)
    parts = {**estimator.get_params(), **candidates[number]}  # includes the steps of a pipeline, which have classes too
    kinds = [(name, identity(type(part) if hasattr(part, "get_params") else part)) for name, part in sorted(parts.items())
             if hasattr(part, "get_params") or callable(part)]
    fitted = ["plain", number, identity(type(estimator)), kinds, sorted(own.items(), key=lambda item: item[0])]
    try:
        content = joblib.hash(fitted)
    except Exception:  # a lambda in a pipeline cannot be pickled
        content = repr(fitted)
    return Piece(fold, (), (number,), content, int(trees) if isinstance(trees, Integral) else 1)


_OBJECT_IDS: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def identity(thing: Any) -> str:
    """Return a text that distinguishes a class or function from any other, for the key of a piece.

    A class or function of scikit-learn is identified by its name, because the key also holds scikit-learn's version. Any other
    class or function may have changed under the same name, even in the same process (a notebook cell that is run again).
    It is identified by the object itself, so only the same process finds the results that were kept for it.
    """
    name = f"{getattr(thing, '__module__', None)}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"
    if name.startswith("sklearn."):
        return name
    try:
        return f"{name} {_OBJECT_IDS.setdefault(thing, uuid4().hex)}"
    except TypeError:  # the object takes no weak reference, or has no hash
        return f"{name} {uuid4().hex}"


def _family_piece(fold: int, name: str, members: Mapping[int, BaseEstimator]) -> Piece:
    by_depth: dict[int | None, dict[int, tuple[int, ...]]] = {}
    for number, forest in members.items():
        # Python's integers: JSON cannot hold the integers of np.arange.
        depth, trees = None if forest.max_depth is None else int(forest.max_depth), int(forest.n_estimators)
        sizes = by_depth.setdefault(depth, {})
        sizes[trees] = (*sizes.get(trees, ()), number)
    deepest_first = sorted(by_depth, key=lambda depth: -(inf if depth is None else depth))
    forests = tuple(Forest(depth, by_depth[depth]) for depth in deepest_first)
    content = joblib.hash([name, [(forest.max_depth, sorted(forest.sizes.items())) for forest in forests]])
    return Piece(fold, forests, (), content, sum(forest.trees for forest in forests))
