"""Fits the forests of one piece of work, and scores each candidate on its part of a forest."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from sklearn.base import BaseEstimator, clone
from sklearn.model_selection._validation import _fit_and_score, _score

from trainers.forest.equivalence import prefix, same_under_limit
from trainers.forest.folds import Fold
from trainers.forest.pieces import Piece
from trainers.forest.predictions import answering, predictions

Result = dict[str, Any]  # what `_fit_and_score` returns: test_scores, train_scores, n_test_samples, fit_time, ...


def fit_family(piece: Piece, fold: Fold, estimator: BaseEstimator, parameters: Mapping[int, Mapping[str, Any]],
               scorer: Any, return_train_score: bool, error_score: Any, threads: int) -> tuple[dict[int, Result], int]:
    """Fit the forests of a piece. Return (the result of each candidate by its number, trees fitted).

    Args:
        parameters: the parameters of each candidate of the piece, by its number.
        threads: threads that fit a forest; any number of threads gives the same trees. Prediction uses one thread.

    Raises:
        Exception: a fit failed; each candidate of the piece must be fitted plainly.
    """
    results: dict[int, Result] = {}
    fitted = None
    trees = 0
    for planned in piece.forests:  # the deepest first, so a fitted forest may hold the trees of the next one
        started = time.perf_counter()
        if (fitted is None or planned.max_depth is None or len(fitted.estimators_) < planned.trees
                or not same_under_limit(fitted, planned.trees, planned.max_depth)):
            fitted = clone(estimator).set_params(**clone(dict(parameters[planned.largest_candidate]), safe=False))
            fitted.set_params(n_jobs=threads).fit(fold.X_train, fold.y_train, **fold.fit_params)
            fitted.set_params(n_jobs=1)
            trees += planned.trees
            fit_s = time.perf_counter() - started
        started = time.perf_counter()
        test_answers = predictions(fitted, fold.X_test, planned.sizes)
        predict_s = time.perf_counter() - started
        train_answers = predictions(fitted, fold.X_train, planned.sizes) if return_train_score else {}
        for size, candidates in sorted(planned.sizes.items()):
            started = time.perf_counter()
            forest = prefix(fitted, size)
            test = _score(answering(forest, test_answers[size]), fold.X_test, fold.y_test, scorer, fold.score_params_test,
                          error_score)
            score_s = time.perf_counter() - started
            # A smaller forest counts its share of the times by trees, about the times of a forest of its own.
            result = {"fit_error": None, "test_scores": test, "n_test_samples": len(fold.X_test),
                      "fit_time": fit_s * size / len(fitted.estimators_),
                      "score_time": score_s + predict_s * size / planned.trees}
            if return_train_score:
                result["train_scores"] = _score(answering(forest, train_answers[size]), fold.X_train, fold.y_train, scorer,
                                                fold.score_params_train, error_score)
            results.update(dict.fromkeys(candidates, result))
    return results, trees


def fit_plainly(estimator: BaseEstimator, X: Any, y: Any, train: Sequence[int], test: Sequence[int],
                parameters: Mapping[str, Any], **options: Any) -> Result:
    """Fit and score one candidate on one fold with GridSearchCV's own function, `_fit_and_score`."""
    return _fit_and_score(clone(estimator), X, y, train=train, test=test, parameters=parameters, return_n_test_samples=True,
                          return_times=True, return_parameters=False, **options)
