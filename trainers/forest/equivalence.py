"""When two forests of a grid are one and the same, or one a part of the other.

Each shortcut is a small function that states its condition and the place in scikit-learn (1.9) that makes it true.
What meets no condition is fitted plainly. tests/trainers/forest/test_forest.py compares with GridSearchCV, score by score.
"""

from __future__ import annotations

from copy import copy
from math import ceil
from numbers import Integral
from typing import Any

import joblib
import numpy as np
from sklearn.base import BaseEstimator
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor, RandomForestClassifier, RandomForestRegressor
from sklearn.metrics._scorer import _BaseScorer, _MultimetricScorer, _PassthroughScorer

# These classes themselves: what a subclass does differently is not known.
FORESTS = (RandomForestRegressor, RandomForestClassifier, ExtraTreesRegressor, ExtraTreesClassifier)


def why_plain(forest: BaseEstimator) -> str | None:
    """Why nothing is known of this forest, all parameters set, beyond itself; None if the shortcuts below hold.

    - `random_state`: with an integer each fit draws the same numbers. With None it does not; a RandomState is copied
      by each fit's `clone` today, but that is no promise.
    - `n_jobs`: a forest with several threads sums its trees' predictions in the order in which they end
      (`_accumulate_prediction` under a lock), so that there is no last bit to agree on.
    - `oob_score`, `warm_start`: they give a forest attributes, or warnings, that depend on its number of trees.
    - a value that is not allowed: the error must be the plain fit's own.
    """
    if type(forest) not in FORESTS:
        return f"{type(forest).__name__} is none of {', '.join(cls.__name__ for cls in FORESTS)}"
    if not isinstance(forest.random_state, Integral):
        return "random_state is no integer"
    if forest.n_jobs not in (None, 1):
        return f"n_jobs of the forest is {forest.n_jobs}, so it sums its trees in no fixed order"
    for name in ("oob_score", "warm_start"):
        if getattr(forest, name):
            return f"{name} is set"
    try:
        forest._validate_params()
    except Exception:
        return "a value is not allowed"
    return None


def reads_predictions_alone(scorer: Any) -> bool:
    """Whether scores of forests that predict alike are alike: scikit-learn's own scorers ask for predictions only,
    those made by `make_scorer` and `estimator.score` (r2, accuracy) too. A bare function gets the forest itself and may
    read anything of it."""
    if isinstance(scorer, _MultimetricScorer):
        return all(map(reads_predictions_alone, scorer._scorers.values()))
    return isinstance(scorer, (_BaseScorer, _PassthroughScorer))


def family(forest: BaseEstimator, rows: int, columns: int) -> str:
    """What two forests share that differ in no more than their number of trees and `max_depth`, fitted to the same
    `rows` x `columns`."""
    same = forest.get_params(deep=False)
    leaf, split = least_rows(forest.min_samples_leaf, forest.min_samples_split, rows)
    same.update(min_samples_leaf=leaf, min_samples_split=split, max_features=features(forest.max_features, columns))
    for name in ("n_estimators", "max_depth", "n_jobs"):
        del same[name]
    # 1, 1.0 and True are not the same to scikit-learn, and neither to this hash, which takes arrays too.
    return joblib.hash([type(forest).__name__, sorted(same.items())])


def least_rows(leaf: int | float, split: int | float, rows: int) -> tuple[int, int]:
    """(rows of the smallest leaf, rows of the smallest node that is split) in a tree fitted to `rows`.

    `BaseDecisionTree._fit`: a fraction is of the rows of the training fold (a bootstrap sample is weights on those, so
    it has as many), and min_samples_split = max(min_samples_split, 2 * min_samples_leaf).
    """
    least_leaf = leaf if isinstance(leaf, Integral) else ceil(leaf * rows)
    least_split = split if isinstance(split, Integral) else max(2, ceil(split * rows))
    return int(least_leaf), int(max(least_split, 2 * least_leaf))


def features(asked: str | int | float | None, columns: int) -> int:
    """How many features a split looks at. `BaseDecisionTree._fit` turns what was asked for into this number, and hands
    on the number alone."""
    match asked:
        case None:
            return columns
        case "sqrt":
            return max(1, int(np.sqrt(columns)))
        case "log2":
            return max(1, int(np.log2(columns)))
        case Integral():
            return int(asked)
    return max(1, int(asked * columns)) if asked > 0.0 else 0


def prefix(forest: BaseEstimator, trees: int) -> BaseEstimator:
    """The first trees of a fitted forest, as a forest: it shares them.

    `BaseForest.fit` draws one seed a tree, in order, from the forest's `random_state` before it fits any, and a tree
    depends on its own seed alone (`_parallel_build_trees`; the number of trees is for its messages). Prediction adds
    the trees' in order and divides by their number. So with an integer seed these trees are the smaller forest.
    """
    smaller = copy(forest)
    smaller.n_estimators, smaller.estimators_ = trees, forest.estimators_[:trees]
    return smaller


def unlimited(forest: BaseEstimator, trees: int, max_depth: int) -> bool:
    """Whether the first trees of a fitted forest, grown with a higher limit or none, are those that `max_depth` gives.

    Only if the limit is greater than the depth of each: both tree builders make a node at that depth a leaf without
    looking for a split. At a limit equal to the depth no split is lost, but the search for one has drawn numbers, on
    which later nodes depend. A tree pruned by `ccp_alpha` was deeper than it shows.
    """
    if forest.ccp_alpha > 0:
        return False
    return max(tree.tree_.max_depth for tree in forest.estimators_[:trees]) < max_depth
