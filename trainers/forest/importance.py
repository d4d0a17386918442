"""The permutation importance of a forest's features: scikit-learn's numbers, from fewer and larger predictions."""

from __future__ import annotations

from typing import Any

import joblib
import numpy as np
from sklearn.base import BaseEstimator
from sklearn.metrics._scorer import _MultimetricScorer

from trainers.forest.equivalence import reads_only_predictions, why_plain
from trainers.forest.predictions import answering, predictions

MOST_BYTES = 2**25  # of the shuffled copies of the table that one thread predicts at once


def permutation_falls(forest: BaseEstimator, X: np.ndarray, y: np.ndarray, scorer: Any, repeats: int, seed: int,
                      n_jobs: int | None = None) -> np.ndarray:
    """Return how much the score falls when a column is shuffled: [columns, repeats].

    The numbers are `permutation_importance(...).importances` to the last bit. scikit-learn shuffles all columns in the same
    `repeats` orders (`_calculate_permutation_scores`). A prediction of a row does not depend on the other rows, so the
    copies of the table with one column in these orders are predicted together.

    Args:
        X: float [rows, columns].
        n_jobs: threads; columns are divided among them.

    Raises:
        ValueError: the score cannot be computed.
    """
    if (why_plain(forest) or forest.n_outputs_ != 1 or not reads_only_predictions(scorer)
            or isinstance(scorer, _MultimetricScorer)):
        from sklearn.inspection import permutation_importance

        return permutation_importance(forest, X, y, scoring=scorer, n_jobs=n_jobs, n_repeats=repeats, random_state=seed
                                      ).importances
    column_seed = np.random.RandomState(seed).randint(np.iinfo(np.int32).max + 1)
    source, order, orders = np.random.RandomState(column_seed), np.arange(len(X)), [np.arange(len(X))]
    for _ in range(repeats):
        source.shuffle(order)
        orders.append(orders[-1][order])  # each repeat shuffles the column as the repeat before has left it
    unshuffled = scorer(forest, X, y)
    rows = forest._validate_X_predict(X)
    scores = joblib.Parallel(n_jobs=n_jobs, require="sharedmem")(
        joblib.delayed(_shuffled_scores)(forest, rows, y, scorer, column, orders[1:]) for column in range(X.shape[1]))
    return unshuffled - np.array(scores)


def _shuffled_scores(forest: BaseEstimator, rows: np.ndarray, y: np.ndarray, scorer: Any, column: int,
                     orders: list[np.ndarray]) -> list[float]:
    """Return the score for each order of the rows in one column."""
    trees = len(forest.estimators_)
    at_once = max(1, MOST_BYTES // max(1, rows.nbytes))
    scores: list[float] = []
    shuffled = None
    for start in range(0, len(orders), at_once):
        some = orders[start:start + at_once]
        if shuffled is None or len(shuffled) != len(some) * len(rows):
            shuffled = np.tile(rows, (len(some), 1))
        for number, order in enumerate(some):
            shuffled[number * len(rows):(number + 1) * len(rows), column] = rows[order, column]
        predicted = predictions(forest, shuffled, [trees])[trees]
        scores += [scorer(answering(forest, answer), rows, y) for answer in np.split(predicted, len(some))]
    return scores
