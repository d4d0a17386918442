"""The work of a search: which pieces there are, and their results as they come, over the cores of this machine."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import joblib
import numpy as np
import sklearn
from joblib.externals.loky import get_reusable_executor, reusable_executor
from sklearn.base import BaseEstimator
from sklearn.exceptions import FitFailedWarning
from sklearn.metrics._scorer import _BaseScorer, _MultimetricScorer, _PassthroughScorer

from trainers.forest.fitting import Result, fit_family, fit_plainly
from trainers.forest.folds import Folds
from trainers.forest.kept import Kept
from trainers.forest.pieces import Piece, identity, plain_piece

PARENT_EVERY_S = 1.0


@dataclass(frozen=True)
class Done:
    """A piece that is through."""

    piece: Piece
    key: str
    results: dict[int, Result]
    trees: int        # fitted for it
    seconds: float
    kept: bool        # whether it was there already


@dataclass(frozen=True)
class Work:
    """All fits of a search."""

    estimator: BaseEstimator
    candidates: Sequence[Mapping[str, Any]]
    X: Any
    y: Any
    splits: Sequence[tuple[np.ndarray, np.ndarray]]
    folds: Folds | None                # None: no shortcut applies
    pieces: Sequence[Piece]
    plain: Mapping[str, int]           # why how many candidates are fitted plainly
    scorer: Any
    fit_params: Mapping[str, Any]
    score_params: Mapping[str, Any]
    return_train_score: bool
    error_score: Any
    verbose: int = 0                   # of plain fits, as scikit-learn has it
    _data: list[str] = field(default_factory=list)

    @property
    def fits(self) -> int:
        """As GridSearchCV counts them."""
        return len(self.candidates) * len(self.splits)

    @property
    def trees_asked(self) -> int:
        """What GridSearchCV would grow."""
        asked = [{**self.estimator.get_params(deep=False), **one}.get("n_estimators", 1) for one in self.candidates]
        return len(self.splits) * sum(int(number) for number in asked if isinstance(number, Integral))

    def keys(self) -> dict[str, Piece]:
        """The pieces by the names of their results, which tell them from those of any other data, folds or library."""
        if not self._data:  # a table of 1 GB takes some two seconds
            self._data.append(joblib.hash([
                sklearn.__version__, self.X, self.y, self.splits, self.fit_params, self.score_params,
                _known(self.scorer), self.return_train_score, repr(self.error_score)]))
        return {piece.key(self._data[0]): piece for piece in self.pieces}

    def results(self, *, n_jobs: int | None = None, pre_dispatch: Any = "2*n_jobs", kept: Kept | None = None,
                mine: Callable[[str], bool] | None = None, guarded: bool = False) -> Iterator[Done]:
        """Each piece when it is through, first those that are kept; closing the iterator ends the work at once.

        Args:
            mine: asked before a piece is begun whether this process may have it; where another has it, the piece is
                left out.
            guarded: by `guarded_workers`.

        Raises:
            whatever a plain fit raises where `error_score` is "raise"; OSError if a result cannot be written.
        """
        keys = self.keys() if kept else {str(number): piece for number, piece in enumerate(self.pieces)}
        there = kept.keys() & keys.keys() if kept else set()
        todo = {}
        for key, piece in keys.items():
            results = kept.read(key) if key in there else None
            if results is None:
                todo[key] = piece
            else:
                yield Done(piece, key, results, 0, 0.0, True)
        failed: list[Piece] = []
        for done in self._run(todo, n_jobs, pre_dispatch, mine, guarded):
            if done.results:
                if kept:
                    kept.write(done.key, done.results, done.trees, done.seconds)
                yield done
            else:
                failed.append(done)
        if failed:  # GridSearchCV knows what to do with fits that fail
            again = {f"{done.key}-{number}": plain_piece(done.piece.fold, number, self.estimator, self.candidates)
                     for done in failed for number in done.piece.candidates}
            by_piece = {done.key: ({}, done) for done in failed}
            for one in self._run(again, n_jobs, pre_dispatch, None, guarded):
                results, done = by_piece[one.key.rpartition("-")[0]]
                results.update(one.results)
                if len(results) == len(done.piece.candidates):
                    whole = Done(done.piece, done.key, results, one.trees, one.seconds, False)
                    if kept:
                        kept.write(whole.key, whole.results, whole.trees, whole.seconds)
                    yield whole

    def _run(self, todo: Mapping[str, Piece], n_jobs: int | None, pre_dispatch: Any,
             mine: Callable[[str], bool] | None, guarded: bool) -> Iterator[Done]:
        if not todo:
            return
        left = {}
        for piece in todo.values():
            left[piece.fold] = left.get(piece.fold, 0) + bool(piece.forests)
        # With fewer pieces than cores each piece fits its trees in as many threads as there are cores for it.
        threads = max(1, joblib.effective_n_jobs(n_jobs) // len(todo))
        with guarded_workers() if guarded else nullcontext():
            parallel = joblib.Parallel(n_jobs=n_jobs, pre_dispatch="n_jobs" if mine else pre_dispatch,
                                       batch_size=1 if mine else "auto", return_as="generator_unordered")
            done_ones = parallel(joblib.delayed(_do)(*self._task(key, piece, threads)) for key, piece in todo.items()
                                 if mine is None or mine(key))
            try:
                for done in done_ones:
                    yield done
                    left[done.piece.fold] -= bool(done.piece.forests)
                    if self.folds and not left[done.piece.fold]:
                        self.folds.forget(done.piece.fold)
            finally:
                done_ones.close()

    def _task(self, key: str, piece: Piece, threads: int) -> tuple[Any, ...]:
        parameters = {number: self.candidates[number] for number in piece.candidates}
        common = dict(scorer=self.scorer, return_train_score=self.return_train_score, error_score=self.error_score)
        if piece.forests:
            return key, piece, dict(fold=self.folds[piece.fold], estimator=self.estimator, parameters=parameters,
                                    threads=threads, **common)
        train, test = self.splits[piece.fold]
        return key, piece, dict(estimator=self.estimator, X=self.X, y=self.y, train=train, test=test,
                                parameters=parameters[piece.plain[0]], fit_params=self.fit_params,
                                score_params=self.score_params, verbose=self.verbose, **common)


def _known(scorer: Any) -> Any:
    """What tells a scorer from others, in a key. The repr of what `make_scorer` makes has the function's bare name."""
    if isinstance(scorer, _MultimetricScorer):
        return sorted((name, _known(one)) for name, one in scorer._scorers.items())
    if isinstance(scorer, _PassthroughScorer):  # the estimator's own score: its class is in the piece's key
        return repr(scorer)
    if not isinstance(scorer, _BaseScorer):
        return identity(scorer)
    given = {name: identity(value) if callable(value) else value for name, value in scorer._kwargs.items()}
    try:
        given = joblib.hash(given)
    except Exception:  # it cannot be pickled
        given = identity(scorer)
    return [repr(scorer), identity(type(scorer)), identity(scorer._score_func), given]


def _do(key: str, piece: Piece, given: Mapping[str, Any]) -> Done:
    """In a worker: a piece, with no results if one of its fits fails."""
    began = time.perf_counter()
    trees = piece.trees
    if piece.forests:
        try:
            results, trees = fit_family(piece, **given)
        except Exception:
            results = {}
    else:
        results = {piece.plain[0]: fit_plainly(**given)}
    return Done(piece, key, results, trees, time.perf_counter() - began, False)


def guarded_workers() -> AbstractContextManager:
    """In it joblib's workers leave signals to this process, do not warn of each score that fails (`quiet`), and go
    when this process has gone, even by kill -9. They are others than joblib starts outside of it, where these have to go
    for those."""
    return joblib.parallel_config(backend="loky", initializer=_worker, initargs=(os.getpid(),))


def quiet() -> None:
    """For a task that says itself which fits fail and which scores are no numbers: scikit-learn warns with tracebacks."""
    warnings.filterwarnings("ignore", "Scoring failed", UserWarning)
    warnings.filterwarnings("ignore", "One or more of the (test|train) scores are non-finite", UserWarning)
    warnings.filterwarnings("ignore", category=FitFailedWarning)


def end_workers() -> None:
    """Of this process, all there are: what ends by os._exit must see to them itself."""
    if reusable_executor._executor is not None:
        get_reusable_executor().shutdown(wait=True, kill_workers=True)


def _worker(parent: int) -> None:
    """A worker leaves signals to the process that has it, and goes when that has gone, even by kill -9."""
    quiet()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_EVERY_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
