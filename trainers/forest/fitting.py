"""Does one piece of work: fits its forests, and scores each candidate by its part of one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from sklearn.base import BaseEstimator, clone
from sklearn.model_selection._validation import _fit_and_score, _score

from trainers.forest.equivalence import prefix, unlimited
from trainers.forest.folds import Fold
from trainers.forest.pieces import Piece

Result = dict[str, Any]  # as `_fit_and_score` gives it: test_scores, train_scores, n_test_samples, fit_time, ...


def fit_family(piece: Piece, fold: Fold, estimator: BaseEstimator, parameters: Mapping[int, Mapping[str, Any]],
               scorer: Any, return_train_score: bool, error_score: Any, threads: int) -> tuple[dict[int, Result], int]:
    """(each candidate's result, trees fitted). Raises what a fit raises: then each is to be fitted plainly.

    Args:
        parameters: of each candidate of the piece.
        threads: for fitting, which is the same with any number of them; prediction takes one.
    """
    results: dict[int, Result] = {}
    fitted = None
    trees = 0
    for asked in piece.forests:
        began = time.perf_counter()
        if fitted is None or len(fitted.estimators_) < asked.trees or not unlimited(fitted, asked.trees, asked.max_depth):
            fitted = clone(estimator).set_params(**clone(dict(parameters[asked.as_asked]), safe=False))
            fitted.set_params(n_jobs=threads).fit(fold.X_train, fold.y_train, **fold.fit_params)
            fitted.set_params(n_jobs=1)
            trees += asked.trees
            fit_s = time.perf_counter() - began
        for size, same in sorted(asked.sizes.items()):
            began = time.perf_counter()
            forest = prefix(fitted, size)
            test = _score(forest, fold.X_test, fold.y_test, scorer, fold.score_params_test, error_score)
            # A forest's time is shared out by trees: what a smaller one alone would have taken.
            result = {"fit_error": None, "test_scores": test, "n_test_samples": len(fold.X_test),
                      "fit_time": fit_s * size / len(fitted.estimators_), "score_time": time.perf_counter() - began}
            if return_train_score:
                result["train_scores"] = _score(forest, fold.X_train, fold.y_train, scorer, fold.score_params_train,
                                                error_score)
            results.update(dict.fromkeys(same, result))
    return results, trees


def fit_plainly(estimator: BaseEstimator, X: Any, y: Any, train: Sequence[int], test: Sequence[int],
                parameters: Mapping[str, Any], **given: Any) -> Result:
    """One candidate on one fold, by GridSearchCV's own function."""
    return _fit_and_score(clone(estimator), X, y, train=train, test=test, parameters=parameters, return_n_test_samples=True,
                          return_times=True, return_parameters=False, **given)
