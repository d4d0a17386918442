"""A grid search like scikit-learn's GridSearchCV, with the same numbers to the last bit, that fits each forest once."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from sklearn.base import BaseEstimator, _fit_context, clone, is_classifier
from sklearn.metrics._scorer import _MultimetricScorer
from sklearn.model_selection import GridSearchCV, ParameterGrid, check_cv
from sklearn.model_selection._search import _insert_error_scores, _warn_or_raise_about_fit_failures
from sklearn.utils import indexable
from sklearn.utils.validation import _check_method_params, _num_samples

from trainers.forest.equivalence import FORESTS, reads_predictions_alone
from trainers.forest.fitting import Result
from trainers.forest.folds import Folds
from trainers.forest.kept import Kept
from trainers.forest.pieces import make_pieces
from trainers.forest.work import Work


class ForestSearchCV(GridSearchCV):
    """GridSearchCV for random forests and extra trees: the same results, times excepted, for fewer trees.

    It takes what GridSearchCV takes, and gives what that gives, `cv_results_` to the last bit. Forests that are the
    first trees of another, or that another set of parameters gives too, are not fitted again: equivalence.py says
    which those are. What none of that is known of, another estimator or a forest without an integer `random_state`,
    is fitted plainly, with a warning that says why.

    Parameters beside GridSearchCV's
    ----------
    keep_in : path of a folder, or None
        Where each finished piece of work is kept as a file. A search of the same data, grid, folds and scorers with
        the same folder fits what is missing there and nothing else.

    Attributes beside GridSearchCV's
    ----------
    n_trees_, n_trees_asked_ : int
        Trees that were grown for the search now, and those that GridSearchCV would have grown.
    """

    _parameter_constraints: dict = {**GridSearchCV._parameter_constraints, "keep_in": [str, PathLike, None]}

    def __init__(self, estimator, param_grid, *, scoring=None, n_jobs=None, refit=True, cv=None, verbose=0,
                 pre_dispatch="2*n_jobs", error_score=float("nan"), return_train_score=False, keep_in=None):
        super().__init__(estimator, param_grid, scoring=scoring, n_jobs=n_jobs, refit=refit, cv=cv, verbose=verbose,
                         pre_dispatch=pre_dispatch, error_score=error_score, return_train_score=return_train_score)
        self.keep_in = keep_in

    @_fit_context(prefer_skip_nested_validation=False)  # the estimator is validated by its own fits
    def fit(self, X, y=None, **params):
        """Search, and fit the best parameters to all of X and y if `refit` says so. See GridSearchCV.fit."""
        work = self.prepare(X, y, **params)
        for reason, count in work.plain.items():
            warnings.warn(f"{count} of {len(work.candidates)} candidates are fitted plainly, as GridSearchCV does: {reason}")
        if self.verbose > 0:
            print(f"Fitting {len(work.splits)} folds for each of {len(work.candidates)} candidates, totalling {work.fits} "
                  f"fits, by {len(work.pieces)} pieces of work")
        found: dict[tuple[int, int], Result] = {}
        trees = 0
        kept = Kept(Path(self.keep_in)) if self.keep_in is not None else None
        try:
            for done in work.results(n_jobs=self.n_jobs, pre_dispatch=self.pre_dispatch, kept=kept):
                trees += done.trees
                found.update({(number, done.piece.fold): result for number, result in done.results.items()})
        finally:
            if work.folds:
                work.folds.close()
        self.n_trees_, self.n_trees_asked_ = trees, work.trees_asked
        return self.reduce(work, found)

    def prepare(self, X, y=None, **params) -> Work:
        """What there is to do, and nothing of it done. `fit` is this, `Work.results` and `reduce`."""
        scorer, _ = self._get_scorers()
        X, y = indexable(X, y)
        params = _check_method_params(X, params=params)
        routed = self._get_routed_params_for_fit(params)
        folds = check_cv(self.cv, y, classifier=is_classifier(self.estimator))
        # A split given as ranges, lists or tuples is no index of an array.
        splits = [(np.asarray(train), np.asarray(test)) for train, test in folds.split(X, y, **routed.splitter.split)]
        expected = folds.get_n_splits(X, y, **routed.splitter.split)
        if len(splits) != expected:
            raise ValueError(f"cv.split and cv.get_n_splits return inconsistent results. Expected {expected} splits, "
                             f"got {len(splits)}")
        candidates = list(ParameterGrid(self.param_grid))
        if not candidates or not splits:
            raise ValueError("No fits were performed. Was the CV iterator empty? Were there no candidates?")
        estimator = clone(self.estimator)
        made, why = None, None
        if type(estimator) not in FORESTS:
            why = f"{type(estimator).__name__} is none of {', '.join(cls.__name__ for cls in FORESTS)}"
        elif not reads_predictions_alone(scorer):
            why = "the scorer is a function that may read more of a forest than its predictions"
        elif y is None:
            why = "there is no target"
        else:
            try:
                made = Folds(X, y, splits, routed.estimator.fit, routed.scorer.score)
            except (ValueError, TypeError) as error:
                why = f"the table is no dense one of numbers ({str(error).splitlines()[0]})"
        rows = [len(_rows(train, X)) for train, _ in splits]
        pieces, plain = make_pieces(estimator, candidates, rows, made.columns if made else 0, why)
        return Work(estimator, candidates, X, y, splits, made, pieces, plain, scorer, routed.estimator.fit,
                    routed.scorer.score, self.return_train_score, self.error_score, self.verbose)

    def reduce(self, work: Work, found: Mapping[tuple[int, int], Result]) -> ForestSearchCV:
        """Become a search that has been done.

        Args:
            found: what was found for each (candidate, fold).

        Raises:
            KeyError: some are missing.
        """
        folds = len(work.splits)
        # A copy each: what comes next writes into them.
        out = [dict(found[number, fold]) for number in range(len(work.candidates)) for fold in range(folds)]
        _warn_or_raise_about_fit_failures(out, self.error_score)
        if callable(self.scoring):
            _insert_error_scores(out, self.error_score)
        results = self._format_results(list(work.candidates), folds, out)
        first = out[0]["test_scores"]
        self.n_splits_ = folds
        self.multimetric_ = isinstance(first, dict)
        _, metric = self._get_scorers()
        if callable(self.scoring) and self.multimetric_:
            self._check_refit_for_multimetric(first)
            metric = self.refit
        if self.refit or not self.multimetric_:
            self.best_index_ = self._select_best_index(self.refit, metric, results)
            if not callable(self.refit):
                self.best_score_ = results[f"mean_test_{metric}"][self.best_index_]
            self.best_params_ = results["params"][self.best_index_]
        if self.refit:
            self._refit(work)
        self.scorer_ = work.scorer._scorers if isinstance(work.scorer, _MultimetricScorer) else work.scorer
        self.cv_results_ = results
        return self

    def _refit(self, work: Work) -> None:
        best: BaseEstimator = clone(work.estimator).set_params(**clone(self.best_params_, safe=False))
        began = time.time()
        # Threads change no tree: each has its seed before the first is grown.
        alone = type(best) in FORESTS and best.n_jobs is None
        if alone:
            best.set_params(n_jobs=joblib.effective_n_jobs(self.n_jobs))
        best.fit(work.X, *([] if work.y is None else [work.y]), **work.fit_params)
        if alone:
            best.set_params(n_jobs=None)
        self.best_estimator_, self.refit_time_ = best, time.time() - began
        if hasattr(best, "feature_names_in_"):
            self.feature_names_in_ = best.feature_names_in_


def _rows(index: Any, X: Any) -> np.ndarray:
    """A split's rows: some splitters give masks."""
    return np.arange(_num_samples(X))[index]
