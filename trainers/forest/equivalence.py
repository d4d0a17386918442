"""When two forests of a grid are the same forest, or when one forest is a part of another.

Each shortcut is a small function. Its docstring states the condition, and the place in scikit-learn (1.9) that makes
the shortcut exact. A candidate that meets no condition is fitted plainly: one fit on each fold, as GridSearchCV makes it.
tests/trainers/forest/test_forest.py compares with GridSearchCV, score by score.
"""

from __future__ import annotations

from copy import copy
from math import ceil
from numbers import Integral
from typing import Any, Literal

import joblib
import numpy as np
from sklearn.base import BaseEstimator
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor, RandomForestClassifier, RandomForestRegressor
from sklearn.metrics._scorer import _BaseScorer, _MultimetricScorer, _PassthroughScorer

# Exactly these classes: a subclass may behave differently.
FORESTS = (RandomForestRegressor, RandomForestClassifier, ExtraTreesRegressor, ExtraTreesClassifier)


def why_plain(forest: BaseEstimator) -> str | None:
    """Return why a forest must be fitted plainly, or None if the shortcuts below hold for it.

    All parameters of the forest must be set. Each condition has a reason:

    - `random_state`: with an integer, every fit draws the same numbers. With None, fits draw different numbers. A
      RandomState is copied by the `clone` of each fit today, but scikit-learn does not promise that.
    - `n_jobs`: a forest with several threads adds up the predictions of its trees in the order in which the trees finish
      (`_accumulate_prediction` under a lock). The last bit of the sum may then differ from run to run.
    - `oob_score`, `warm_start`: they give a forest attributes, or warnings, that depend on its number of trees.
    - a value that is not allowed: the error must come from the plain fit.
    """
    if type(forest) not in FORESTS:
        return not_a_forest(forest)
    if not isinstance(forest.random_state, Integral):
        return "random_state is not an integer"
    if forest.n_jobs not in (None, 1):
        return f"n_jobs of the forest is {forest.n_jobs}, so its trees are added up in no fixed order"
    for name in ("oob_score", "warm_start"):
        if getattr(forest, name):
            return f"{name} is set"
    try:
        forest._validate_params()
    except Exception:
        return "a parameter has a value that is not allowed"
    return None


def reads_only_predictions(scorer: Any) -> bool:
    """Return whether a scorer gives equal scores to forests with equal predictions.

    scikit-learn's own scorers ask a forest only for predictions. So do scorers made by `make_scorer`, and
    `estimator.score` (r2, accuracy). A bare function gets the forest itself, and may read anything of the forest.
    """
    if isinstance(scorer, _MultimetricScorer):
        return all(map(reads_only_predictions, scorer._scorers.values()))
    return isinstance(scorer, (_BaseScorer, _PassthroughScorer))


def family(forest: BaseEstimator, rows: int, columns: int) -> str:
    """Return a hash that is equal for forests that differ only in their number of trees and `max_depth`.

    Parameters that mean the same for a training set of `rows` x `columns` count as equal. `n_jobs` does not count.
    """
    same = forest.get_params(deep=False)
    leaf, split = least_rows(forest.min_samples_leaf, forest.min_samples_split, rows)
    same.update(min_samples_leaf=leaf, min_samples_split=split, max_features=features(forest.max_features, columns))
    for name in ("n_estimators", "max_depth", "n_jobs"):
        del same[name]
    # joblib's hash tells 1, 1.0 and True apart, as scikit-learn does, and it takes arrays.
    return joblib.hash([type(forest).__name__, sorted(same.items())])


def least_rows(leaf: int | float, split: int | float, rows: int) -> tuple[int, int]:
    """Return (fewest rows of a leaf, fewest rows of a node that is split) in a tree fitted to `rows` rows.

    `BaseDecisionTree._fit`: a fraction is a fraction of the rows of the training fold. (A bootstrap sample is a set of
    weights on these rows, so it has as many rows.) And min_samples_split = max(min_samples_split, 2 * min_samples_leaf).
    """
    least_leaf = leaf if isinstance(leaf, Integral) else ceil(leaf * rows)
    least_split = split if isinstance(split, Integral) else max(2, ceil(split * rows))
    return int(least_leaf), int(max(least_split, 2 * least_leaf))


def features(max_features: Literal["sqrt", "log2"] | int | float | None, columns: int) -> int:
    """Return how many features a split looks at.

    `BaseDecisionTree._fit` turns `max_features` into this number, and passes on nothing but the number.
    """
    match max_features:
        case None:
            return columns
        case "sqrt":
            return max(1, int(np.sqrt(columns)))
        case "log2":
            return max(1, int(np.log2(columns)))
        case Integral():
            return int(max_features)
    return max(1, int(max_features * columns)) if max_features > 0.0 else 0


def prefix(forest: BaseEstimator, trees: int) -> BaseEstimator:
    """Return a forest of the first `trees` trees of a fitted forest. Both forests share these trees.

    `BaseForest.fit` draws one seed for each tree, in order, from the forest's `random_state`, before it fits any tree. A
    tree depends only on its own seed (`_parallel_build_trees` uses the number of trees only for its messages).
    Prediction adds up the predictions of the trees in order, and divides by the number of trees. So with an integer seed
    these trees are the smaller forest.
    """
    smaller = copy(forest)
    smaller.n_estimators, smaller.estimators_ = trees, forest.estimators_[:trees]
    return smaller


def same_under_limit(forest: BaseEstimator, trees: int, max_depth: int) -> bool:
    """Return whether `max_depth` gives the same trees as the first `trees` trees of a fitted forest.

    The fitted forest must have a higher limit, or none. The trees are the same if `max_depth` is greater than the depth of
    each tree. An equal depth is not enough. Both tree builders make a node at depth `max_depth` a leaf without looking for
    a split. Without the limit, they look for a split there, find none, and draw random numbers on the way, which change
    later nodes. The answer is False with `ccp_alpha`: pruning removes nodes, so a tree may have been deeper.
    """
    if forest.ccp_alpha > 0:
        return False
    return max(tree.tree_.max_depth for tree in forest.estimators_[:trees]) < max_depth


def not_a_forest(estimator: BaseEstimator) -> str:
    return f"{type(estimator).__name__} is not one of {', '.join(cls.__name__ for cls in FORESTS)}"
