"""The work of a search: its pieces, and their results as the cores of this machine finish them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import joblib
import numpy as np
import sklearn
from sklearn.base import BaseEstimator
from sklearn.metrics._scorer import _BaseScorer, _MultimetricScorer, _PassthroughScorer

from trainers.forest.fitting import Result, fit_family, fit_plainly
from trainers.forest.folds import Folds
from trainers.forest.kept import Kept
from trainers.forest.pieces import Piece, identity, plain_piece
from trainers.forest.workers import guarded_workers


@dataclass(frozen=True)
class Done:
    """A finished piece."""

    piece: Piece
    key: str
    results: dict[int, Result]  # by candidate; empty if a fit of a family failed
    trees: int                  # fitted now
    seconds: float
    kept: bool                  # read from a file, not fitted now


@dataclass(frozen=True)
class Work:
    """All fits of a search, divided into pieces."""

    estimator: BaseEstimator
    candidates: Sequence[Mapping[str, Any]]
    X: Any
    y: Any
    splits: Sequence[tuple[np.ndarray, np.ndarray]]
    folds: Folds | None                # None: no shortcut applies, all candidates are fitted plainly
    pieces: Sequence[Piece]
    plain: Mapping[str, int]           # how many candidates are fitted plainly, by reason
    scorer: Any
    fit_params: Mapping[str, Any]
    score_params: Mapping[str, Any]
    return_train_score: bool
    error_score: Any
    verbose: int = 0                   # for plain fits, with scikit-learn's meaning
    _data: list[str] = field(default_factory=list)  # a hash of the data, once it is computed

    @property
    def fits(self) -> int:
        """The number of fits, as GridSearchCV counts them."""
        return len(self.candidates) * len(self.splits)

    @property
    def trees_asked(self) -> int:
        """The number of trees that GridSearchCV would grow."""
        defaults = self.estimator.get_params(deep=False)
        asked = [{**defaults, **candidate}.get("n_estimators", 1) for candidate in self.candidates]
        return len(self.splits) * sum(int(number) for number in asked if isinstance(number, Integral))

    def keys(self) -> dict[str, Piece]:
        """Return the pieces by the keys of their results. Other data, folds or versions of scikit-learn give other keys."""
        if not self._data:  # hashed only once: a table of 1 GB takes about two seconds
            self._data.append(joblib.hash([
                sklearn.__version__, self.X, self.y, self.splits, self.fit_params, self.score_params,
                _scorer_identity(self.scorer), self.return_train_score, repr(self.error_score)]))
        return {piece.key(self._data[0]): piece for piece in self.pieces}

    def results(self, *, n_jobs: int | None = None, pre_dispatch: Any = "2*n_jobs", kept: Kept | None = None,
                mine: Callable[[str], bool] | None = None, guarded: bool = False) -> Iterator[Done]:
        """Yield each piece when it is finished, kept pieces first. Closing the iterator stops the work at once.

        Args:
            n_jobs, pre_dispatch: as in joblib.Parallel.
            kept: where results are read and written; None keeps no results.
            mine: called with the key of a piece before the piece is started. If `mine` returns False, another process
                has the piece, and the piece is left out.
            guarded: whether to use `guarded_workers`.

        Raises:
            Exception: a plain fit failed and `error_score` is "raise".
            OSError: a result cannot be written.
        """
        keys = self.keys() if kept else {str(number): piece for number, piece in enumerate(self.pieces)}
        existing = kept.keys() & keys.keys() if kept else set()
        todo = {}
        for key, piece in keys.items():
            results = kept.read(key) if kept and key in existing else None
            if results is None:
                todo[key] = piece
            else:
                yield Done(piece, key, results, 0, 0.0, True)
        failed: list[Done] = []
        for done in self._run(todo, n_jobs, pre_dispatch, mine, guarded):
            if done.results:
                if kept:
                    kept.write(done.key, done.results, done.trees, done.seconds)
                yield done
            else:
                failed.append(done)
        if failed:  # fit each candidate plainly: GridSearchCV's own function handles fits that fail
            again = {f"{done.key}-{number}": plain_piece(done.piece.fold, number, self.estimator, self.candidates)
                     for done in failed for number in done.piece.candidates}
            by_key: dict[str, tuple[dict[int, Result], Done]] = {done.key: ({}, done) for done in failed}
            for plain in self._run(again, n_jobs, pre_dispatch, None, guarded):
                results, done = by_key[plain.key.rpartition("-")[0]]
                results.update(plain.results)
                if len(results) == len(done.piece.candidates):
                    whole = Done(done.piece, done.key, results, plain.trees, plain.seconds, False)
                    if kept:
                        kept.write(whole.key, whole.results, whole.trees, whole.seconds)
                    yield whole

    def _run(self, todo: Mapping[str, Piece], n_jobs: int | None, pre_dispatch: Any,
             mine: Callable[[str], bool] | None, guarded: bool) -> Iterator[Done]:
        if not todo:
            return
        left: dict[int, int] = {}  # pieces that still need the rows of a fold
        for piece in todo.values():
            left[piece.fold] = left.get(piece.fold, 0) + bool(piece.forests)
        # With fewer pieces than cores, each piece fits its trees in several threads.
        threads = max(1, joblib.effective_n_jobs(n_jobs) // len(todo))
        with guarded_workers() if guarded else nullcontext():
            parallel = joblib.Parallel(n_jobs=n_jobs, pre_dispatch="n_jobs" if mine else pre_dispatch,
                                       batch_size=1 if mine else "auto", return_as="generator_unordered")
            finished = parallel(joblib.delayed(_do)(*self._task(key, piece, threads)) for key, piece in todo.items()
                                if mine is None or mine(key))
            try:
                for done in finished:
                    yield done
                    left[done.piece.fold] -= bool(done.piece.forests)
                    if self.folds and not left[done.piece.fold]:
                        self.folds.forget(done.piece.fold)
            finally:
                finished.close()

    def _task(self, key: str, piece: Piece, threads: int) -> tuple[Any, ...]:
        parameters = {number: self.candidates[number] for number in piece.candidates}
        common = dict(scorer=self.scorer, return_train_score=self.return_train_score, error_score=self.error_score)
        if piece.forests:
            assert self.folds is not None  # a family of forests is a shortcut, and shortcuts need the folds
            return key, piece, dict(fold=self.folds[piece.fold], estimator=self.estimator, parameters=parameters,
                                    threads=threads, **common)
        train, test = self.splits[piece.fold]
        return key, piece, dict(estimator=self.estimator, X=self.X, y=self.y, train=train, test=test,
                                parameters=parameters[piece.plain[0]], fit_params=self.fit_params,
                                score_params=self.score_params, verbose=self.verbose, **common)


def _scorer_identity(scorer: Any) -> Any:
    """Return what distinguishes a scorer from any other, for a key.

    The repr of a scorer made by `make_scorer` is not enough, because it holds only the bare name of the function.
    """
    if isinstance(scorer, _MultimetricScorer):
        return sorted((name, _scorer_identity(single)) for name, single in scorer._scorers.items())
    if isinstance(scorer, _PassthroughScorer):  # calls estimator.score; the key of a piece holds the estimator's class
        return repr(scorer)
    if not isinstance(scorer, _BaseScorer):
        return identity(scorer)
    arguments = {name: identity(value) if callable(value) else value for name, value in scorer._kwargs.items()}
    try:
        hashed = joblib.hash(arguments)
    except Exception:  # an argument cannot be pickled
        hashed = identity(scorer)
    return [repr(scorer), identity(type(scorer)), identity(scorer._score_func), hashed]


def _do(key: str, piece: Piece, arguments: Mapping[str, Any]) -> Done:
    """Fit a piece, in a worker. The results are empty if a fit of a family fails."""
    started = time.perf_counter()
    trees = piece.trees
    if piece.forests:
        try:
            results, trees = fit_family(piece, **arguments)
        except Exception:
            results = {}
    else:
        results = {piece.plain[0]: fit_plainly(**arguments)}
    return Done(piece, key, results, trees, time.perf_counter() - started, False)
