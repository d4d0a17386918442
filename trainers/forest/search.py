"""A grid search with the results of scikit-learn's GridSearchCV, to the last bit, that fits each forest only once."""

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

from trainers.forest.equivalence import FORESTS, not_a_forest, reads_only_predictions
from trainers.forest.fitting import Result
from trainers.forest.folds import Folds
from trainers.forest.kept import Kept
from trainers.forest.pieces import make_pieces
from trainers.forest.work import Work


class ForestSearchCV(GridSearchCV):
    """GridSearchCV for random forests and extra trees: the same results, except times, with fewer trees.

    This class takes the arguments of GridSearchCV and has its methods and attributes. `cv_results_`, except its times, is
    the same to the last bit. A forest is not fitted again if it consists of the first trees of another forest, or if another
    set of parameters gives the same forest. The module trainers.forest.equivalence states the exact conditions. Candidates
    that meet no condition (for example other estimators, or forests without an integer `random_state`) are fitted one by
    one, as in GridSearchCV, and a warning gives the reason.

    Parameters in addition to GridSearchCV's
    ----------------------------------------
    keep_in : path of a folder, or None
        Where each finished piece of work is kept as a file. A later search with the same folder, data, grid, folds and
        scorers fits only the pieces that are missing there.

    Attributes in addition to GridSearchCV's
    ----------------------------------------
    n_trees_ : int
        Trees that this search grew, without the refit.
    n_trees_asked_ : int
        Trees that GridSearchCV would have grown.
    """

    _parameter_constraints: dict = {**GridSearchCV._parameter_constraints, "keep_in": [str, PathLike, None]}

    def __init__(self, estimator, param_grid, *, scoring=None, n_jobs=None, refit=True, cv=None, verbose=0,
                 pre_dispatch="2*n_jobs", error_score=float("nan"), return_train_score=False, keep_in=None):
        super().__init__(estimator, param_grid, scoring=scoring, n_jobs=n_jobs, refit=refit, cv=cv, verbose=verbose,
                         pre_dispatch=pre_dispatch, error_score=error_score, return_train_score=return_train_score)
        self.keep_in = keep_in

    @_fit_context(prefer_skip_nested_validation=False)  # each fit validates the estimator
    def fit(self, X: Any, y: Any = None, **params: Any) -> ForestSearchCV:
        """Run the search. If `refit` is set, fit the best parameters to all of X and y. See GridSearchCV.fit."""
        work = self.prepare(X, y, **params)
        for reason, count in work.plain.items():
            warnings.warn(f"{count} of {len(work.candidates)} candidates are fitted one by one, as in GridSearchCV: {reason}")
        if self.verbose > 0:
            print(f"Fitting {len(work.splits)} folds for each of {len(work.candidates)} candidates, totalling {work.fits} "
                  f"fits, in {len(work.pieces)} pieces of work")
        results: dict[tuple[int, int], Result] = {}
        trees = 0
        kept = Kept(Path(self.keep_in)) if self.keep_in is not None else None
        try:
            for done in work.results(n_jobs=self.n_jobs, pre_dispatch=self.pre_dispatch, kept=kept):
                trees += done.trees
                results.update({(number, done.piece.fold): result for number, result in done.results.items()})
        finally:
            if work.folds:
                work.folds.close()
        self.n_trees_, self.n_trees_asked_ = trees, work.trees_asked
        return self.reduce(work, results)

    def prepare(self, X: Any, y: Any = None, **params: Any) -> Work:
        """Return the work of a search, without doing any of it. `fit` is `prepare`, then `Work.results`, then `reduce`."""
        scorer, _ = self._get_scorers()
        X, y = indexable(X, y)
        params = _check_method_params(X, params=params)
        routed = self._get_routed_params_for_fit(params)
        splitter = check_cv(self.cv, y, classifier=is_classifier(self.estimator))
        # As arrays: ranges, lists and tuples do not index the rows of an array in the same way.
        splits = [(np.asarray(train), np.asarray(test)) for train, test in splitter.split(X, y, **routed.splitter.split)]
        expected = splitter.get_n_splits(X, y, **routed.splitter.split)
        if len(splits) != expected:
            raise ValueError(f"cv.split and cv.get_n_splits return inconsistent results. Expected {expected} splits, "
                             f"got {len(splits)}")
        candidates = list(ParameterGrid(self.param_grid))
        if not candidates or not splits:
            raise ValueError("No fits were performed. Was the CV iterator empty? Were there no candidates?")
        estimator = clone(self.estimator)
        folds, no_shortcut = None, None
        if type(estimator) not in FORESTS:
            no_shortcut = not_a_forest(estimator)
        elif not reads_only_predictions(scorer):
            no_shortcut = "the scorer is a function that may read more of a forest than its predictions"
        elif y is None:
            no_shortcut = "there is no target"
        else:
            try:
                folds = Folds(X, y, splits, routed.estimator.fit, routed.scorer.score)
            except (ValueError, TypeError) as error:
                no_shortcut = f"X is not a dense table of numbers ({str(error).splitlines()[0]})"
        rows = [len(_rows(train, X)) for train, _ in splits]
        pieces, plain = make_pieces(estimator, candidates, rows, folds.columns if folds else 0, no_shortcut)
        return Work(estimator, candidates, X, y, splits, folds, pieces, plain, scorer, routed.estimator.fit,
                    routed.scorer.score, self.return_train_score, self.error_score, self.verbose)

    def reduce(self, work: Work, results: Mapping[tuple[int, int], Result]) -> ForestSearchCV:
        """Set the attributes of a finished search from the results of its fits, refit if asked to, and return self.

        Args:
            results: the result of each (candidate, fold).

        Raises:
            KeyError: a result is missing.
            ValueError: all fits failed.
        """
        folds = len(work.splits)
        # Copies, because the calls below write into them.
        out = [dict(results[number, fold]) for number in range(len(work.candidates)) for fold in range(folds)]
        _warn_or_raise_about_fit_failures(out, self.error_score)
        if callable(self.scoring):
            _insert_error_scores(out, self.error_score)
        cv_results = self._format_results(list(work.candidates), folds, out)
        first = out[0]["test_scores"]
        self.n_splits_ = folds
        self.multimetric_ = isinstance(first, dict)
        _, metric = self._get_scorers()
        if callable(self.scoring) and self.multimetric_:
            self._check_refit_for_multimetric(first)
            metric = self.refit
        if self.refit or not self.multimetric_:
            self.best_index_ = self._select_best_index(self.refit, metric, cv_results)
            if not callable(self.refit):
                self.best_score_ = cv_results[f"mean_test_{metric}"][self.best_index_]
            self.best_params_ = cv_results["params"][self.best_index_]
        if self.refit:
            self._refit(work)
        self.scorer_ = work.scorer._scorers if isinstance(work.scorer, _MultimetricScorer) else work.scorer
        self.cv_results_ = cv_results
        return self

    def _refit(self, work: Work) -> None:
        best: BaseEstimator = clone(work.estimator).set_params(**clone(self.best_params_, safe=False))
        started = time.time()
        # Threads do not change the trees: the seeds of all trees are drawn before the first tree is grown.
        threaded = type(best) in FORESTS and best.n_jobs is None
        if threaded:
            best.set_params(n_jobs=joblib.effective_n_jobs(self.n_jobs))
        best.fit(work.X, *([] if work.y is None else [work.y]), **work.fit_params)
        if threaded:
            best.set_params(n_jobs=None)
        self.best_estimator_, self.refit_time_ = best, time.time() - started
        if hasattr(best, "feature_names_in_"):
            self.feature_names_in_ = best.feature_names_in_


def _rows(index: Any, X: Any) -> np.ndarray:
    """Return the row numbers of a split, which some splitters give as a mask."""
    return np.arange(_num_samples(X))[index]
