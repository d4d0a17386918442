"""A grid's fits, put together into pieces of work that know nothing of each other."""

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
    """One forest to fit, and the candidates that it answers for, by their number of trees."""

    max_depth: int | None
    sizes: Mapping[int, tuple[int, ...]]

    @property
    def trees(self) -> int:
        return max(self.sizes)

    @property
    def as_asked(self) -> int:
        """The candidate whose parameters the whole forest has."""
        return self.sizes[self.trees][0]


@dataclass(frozen=True)
class Piece:
    """Fits of one fold: a family of forests, the deepest first, or one candidate that is fitted plainly."""

    fold: int
    forests: tuple[Forest, ...]
    plain: tuple[int, ...]      # candidates
    what: str                   # a hash of what is fitted to the fold
    trees: int                  # at most, for progress

    @property
    def candidates(self) -> tuple[int, ...]:
        return (*self.plain, *(one for forest in self.forests for same in forest.sizes.values() for one in same))

    def key(self, data: str) -> str:
        """A name by which its results are found again, for the same `data` alone."""
        return f"{self.fold}-{joblib.hash([self.what, data])[:16]}"


def make_pieces(estimator: BaseEstimator, candidates: Sequence[Mapping[str, Any]], rows: Sequence[int], columns: int,
                no_shortcut: str | None) -> tuple[list[Piece], dict[str, int]]:
    """The pieces of all folds, a fold after the other, the costliest of each first; and why how many candidates are
    fitted plainly.

    Args:
        rows: of each fold's training set.
        no_shortcut: why no shortcut applies, if none does.
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
    for fold, training in enumerate(rows):
        families: dict[str, list[int]] = {}
        for number, forest in forests.items():
            families.setdefault(family(forest, training, columns), []).append(number)
        found = [_of_family(fold, name, {number: forests[number] for number in members})
                 for name, members in families.items()]
        pieces += sorted(found, key=lambda piece: -piece.trees)
        pieces += [plain_piece(fold, number, estimator, candidates) for number in plain]
    return pieces, reasons


def plain_piece(fold: int, number: int, estimator: BaseEstimator, candidates: Sequence[Mapping[str, Any]]) -> Piece:
    """One fit as GridSearchCV makes it."""
    asked = {**estimator.get_params(deep=False), **candidates[number]}
    trees = asked.get("n_estimators", 1)
    parts = {**estimator.get_params(), **candidates[number]}  # a pipeline's steps are of classes too
    kinds = [(name, identity(type(part) if hasattr(part, "get_params") else part)) for name, part in sorted(parts.items())
             if hasattr(part, "get_params") or callable(part)]
    what = ["plain", number, identity(type(estimator)), kinds, sorted(asked.items(), key=lambda item: item[0])]
    try:
        what = joblib.hash(what)
    except Exception:  # a lambda in a pipeline
        what = repr(what)
    return Piece(fold, (), (number,), what, int(trees) if isinstance(trees, Integral) else 1)


_OWN: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def identity(thing: Any) -> str:
    """What tells a class or function from any other, in a piece's key.

    scikit-learn's own are known by their names, as its version is in the key. Another one of the same name may do
    something else by now, also in the same process (a cell of a notebook that is run again): so it is this very object,
    and what is kept of it is found by this process alone.
    """
    name = f"{getattr(thing, '__module__', None)}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"
    if name.startswith("sklearn."):
        return name
    try:
        return f"{name} {_OWN.setdefault(thing, uuid4().hex)}"
    except TypeError:  # no weak reference or no hash
        return f"{name} {uuid4().hex}"


def _of_family(fold: int, name: str, members: Mapping[int, BaseEstimator]) -> Piece:
    by_depth: dict[int | None, dict[int, tuple[int, ...]]] = {}
    for number, forest in members.items():
        # As Python's integers, which a file can have: those of np.arange are none.
        depth, trees = None if forest.max_depth is None else int(forest.max_depth), int(forest.n_estimators)
        sizes = by_depth.setdefault(depth, {})
        sizes[trees] = (*sizes.get(trees, ()), number)
    deepest_first = sorted(by_depth, key=lambda depth: -(inf if depth is None else depth))
    forests = tuple(Forest(depth, by_depth[depth]) for depth in deepest_first)
    what = joblib.hash([name, [(forest.max_depth, sorted(forest.sizes.items())) for forest in forests]])
    return Piece(fold, forests, (), what, sum(forest.trees for forest in forests))
