"""The task `wine`. Ranks and cores share the pieces of a search, and each finished piece is kept as a file.

Then rank 0 computes the results from these files. This step can be repeated.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from trainers.contract import events, exit_codes
from trainers.contract.clock import utc_now
from trainers.contract.errors import TrainingError, UserError
from trainers.contract.files import update_json
from trainers.contract.paths import RunPaths
from trainers.contract.signals import Stopped, hold
from trainers.contract.text import first_few
from trainers.engine.tracking.wandb_run import WandbRun
from trainers.runner import Place, Runner
from trainers.wine.config import WineConfig
from trainers.wine.table import Table, fetch, load_table

if TYPE_CHECKING:
    from trainers.forest import ForestSearchCV
    from trainers.forest.kept import Kept
    from trainers.forest.work import Work

LOOK_EVERY_S = 0.5     # rank 0 looks for pieces that other ranks have finished
REPORT_EVERY_S = 1.0   # rank 0 prints and records the progress


class Wine(Runner):
    """A grid search over forests, as a task."""

    config: WineConfig
    _progress: Progress | None = None

    def prefetch(self) -> list[str]:
        if self.config.data.download() is None:
            return []
        was_missing = self.config.missing()
        return [f"{self.config.data.source}: {'fetched into' if was_missing else 'already in'} {fetch(self.config.data)}"]

    def run(self, place: Place, paths: RunPaths, attempt: int | None) -> int:
        try:
            return self._run(place, paths, attempt)
        except Stopped:
            hold()
            if self._progress and place.rank == 0:
                self._progress.report()
                events.emit({"event": "end", "state": "preempted", "step": self._progress.fits, "total": self._progress.total,
                             "unit": "fits", "metrics": {}, "checkpoint": None})
            return exit_codes.PREEMPTED

    def _run(self, place: Place, paths: RunPaths, attempt: int | None) -> int:
        self.config.check()
        # Imported here, where a signal to stop is handled.
        from trainers.forest.workers import end_workers, quiet, start_workers

        work = None
        try:
            start_workers(place.cores)
            # Importing scikit-learn takes a second, here and in the workers at the same time.
            from trainers.wine.searching import make_search

            quiet()
            table = load_table(self.config.data, self.config.model.classifies, self.config.search.group)
            search, given = make_search(self.config, table, place.cores)
            work = search.prepare(table.X, table.y, **given)
            kept = self._fit(work, table, place, paths, attempt)
            return exit_codes.FINISHED if kept is None else self._reduce(work, kept, table, search, place, paths, attempt)
        finally:
            end_workers()
            if work and work.folds:
                work.folds.close()

    def _fit(self, work: Work, table: Table, place: Place, paths: RunPaths, attempt: int | None) -> Kept | None:
        """Fit pieces until the pieces of all ranks are kept. Return the kept pieces.

        Ranks other than 0 return None as soon as no piece is left for them.
        """
        from trainers.forest.kept import Kept

        try:
            kept = Kept(paths.pieces)
            if (finished := kept.keys()) and paths.changes.exists() and not finished & work.keys().keys():
                raise UserError(f"none of the {len(finished):,} finished pieces of this search belongs to this table: the data "
                                "or the version of scikit-learn has changed since",
                                f"give the table that it began with: `launch resume {paths.id} data=PATH`; or start a new search")
            self._progress = progress = Progress(work, kept, paths, attempt, place)
            if place.rank == 0:
                self._describe(table, work)
                progress.start()
            mine = Claims(paths, attempt, place, work.keys()) if place.size > 1 else None
            for done in work.results(n_jobs=place.cores, kept=kept, mine=mine, guarded=True):
                if place.rank == 0 and not done.kept:
                    progress.update()
            while place.rank == 0 and not progress.update():
                time.sleep(LOOK_EVERY_S)
        except OSError as error:
            raise TrainingError(f"a piece of the search cannot be read or written: {error.strerror or error}",
                                f"fix that, then run `launch resume {paths.id}`") from error
        if place.rank != 0:
            return None
        progress.report()
        return kept

    def _reduce(self, work: Work, kept: Kept, table: Table, search: ForestSearchCV, place: Place, paths: RunPaths,
                attempt: int | None) -> int:
        """Compute and write the results. Any process may do this, any number of times, with the same results."""
        from trainers.forest.workers import guarded_workers
        from trainers.wine.report import check_scores, failures, last_line, report

        results = {(number, piece.fold): result for key, piece in work.keys().items()
                   for number, result in (kept.read(key) or {}).items()}
        try:
            search.reduce(work, results)
        except ValueError as error:  # scikit-learn raises it if all fits failed, with all their tracebacks
            raise UserError(f"the forests cannot be fitted: {last_line(error)}",
                            "fix `search.grid`, `model.params` or the table") from error
        check_scores(self.config, table, search, failures(results.values()))
        try:
            with guarded_workers():
                metrics, rows = report(self.config, table, search, paths, place.cores)
        except OSError as error:
            raise TrainingError(f"the results cannot be written: {error.strerror or error}",
                                f"fix that, then run `launch resume {paths.id}`") from error
        hold()
        record(paths, attempt, step=work.fits, metrics=metrics)
        self._track(paths, metrics, rows)
        events.emit({"event": "end", "state": "finished", "step": work.fits, "total": work.fits, "unit": "fits",
                     "metrics": metrics, "checkpoint": None})
        return exit_codes.FINISHED

    def _describe(self, table: Table, work: Work) -> None:
        for note in table.notes:
            _note("info", note)
        last = " (the last column)" if self.config.data.target is None else ""
        kind = f"{len(set(table.y.tolist())):,} classes" if self.config.model.classifies else "a number"
        _note("info", f"target: `{table.target}`{last}, {kind}; {len(table.names):,} features: "
              f"{first_few([f'`{name}`' for name in table.names], 12)}")
        if missing := table.missing:
            columns = ", ".join(f"`{name}` {count:,}" for name, count in missing.items())
            random = self.config.model.name.startswith("extra_trees")
            side = "a random side" if random else "the side that gives the better split"
            _note("info", f"missing values ({columns}): each split sends rows without a value to {side}, or to the side with "
                          "more rows if no value was missing in training")
        for reason, count in work.plain.items():
            _note("warning", f"{count} of {len(work.candidates)} grid points are fitted one by one, as in GridSearchCV: {reason}")

    def _track(self, paths: RunPaths, metrics: Mapping[str, float], rows: list[dict[str, Any]]) -> None:
        """Send the table, the metrics and the figures to W&B."""
        if self.config.wandb.mode == "off":
            return
        try:
            tracked = WandbRun(self.config, paths, [], _note)
            tracked.table("cv_results", rows)
            tracked.log({"step": 1, "split": "eval", **metrics})
            tracked.finish(1, paths.figures, finished=True)
        except Exception as error:
            _note("warning", f"W&B cannot track this run ({' '.join(str(error).split())}); cv_results.csv holds all results")


class Claims:
    """Decides whether this rank may start a piece: a piece belongs to the first rank that claims it.

    Claims of an earlier attempt do not count, because its ranks are gone. Ranks that were started by hand have no attempt
    number, so they cannot claim. Instead, they divide all pieces of the search in advance: of `size` ranks, each takes every
    `size`-th piece. They cannot divide only the missing pieces: ranks that look at different times may see different pieces
    missing.
    """

    def __init__(self, paths: RunPaths, attempt: int | None, place: Place, keys: Iterable[str]):
        self._paths, self._attempt, self._place = paths, attempt, place
        self._in_turn = {key: number % place.size for number, key in enumerate(keys)}

    def __call__(self, key: str) -> bool:
        if self._attempt is None:
            return self._in_turn[key] == self._place.rank
        try:
            self._paths.claim(self._attempt, key).mkdir(parents=True)
        except FileExistsError:
            return False
        return True


class Progress:
    """The progress of all ranks together, counted from the kept pieces. Rank 0 prints and records it."""

    def __init__(self, work: Work, kept: Kept, paths: RunPaths, attempt: int | None, place: Place):
        self._work, self._kept, self._paths, self._attempt, self._place = work, kept, paths, attempt, place
        self._pieces: Mapping[str, Any] = work.keys()
        self._whole: set[str] = set()  # keys of files found whole; a file is only ever replaced whole
        self._started = self._reported = time.monotonic()
        self._at_start = self._done()

    @property
    def fits(self) -> int:
        return self._done()[0]

    @property
    def total(self) -> int:
        return self._work.fits

    def _done(self) -> tuple[int, int, bool]:
        """Return (finished fits, the most trees they can have, whether all fits are finished)."""
        existing = self._kept.keys() & self._pieces.keys()
        # A broken file does not count: a rank fits that piece again.
        self._whole |= {key for key in existing - self._whole if self._kept.read(key) is not None}
        done = existing & self._whole
        return (sum(len(self._pieces[key].candidates) for key in done), sum(self._pieces[key].trees for key in done),
                len(done) == len(self._pieces))

    def start(self) -> None:
        fits, _, _ = self._at_start
        work = self._work
        trees = sum(piece.trees for piece in work.pieces)
        events.emit({"event": "start", "step": fits, "total": work.fits, "resumed": fits > 0,
                     "about": f"{len(work.candidates)} grid points x {len(work.splits)} folds of {len(work.X):,} rows in "
                              f"{len(work.pieces)} pieces, {trees:,} trees instead of {work.trees_asked:,}; "
                              f"{self._place.size} rank(s) x {self._place.cores} core(s)"})
        record(self._paths, self._attempt, step=fits, total=work.fits)

    def update(self) -> bool:
        """Report the progress if that is due. Return whether all fits are finished."""
        if time.monotonic() - self._reported > REPORT_EVERY_S:
            self.report()
        return self._done()[2]

    def report(self) -> None:
        """Print and record the progress."""
        self._reported = time.monotonic()
        elapsed = self._reported - self._started
        fits, trees, _ = self._done()
        rate, grown = (fits - self._at_start[0]) / elapsed, trees - self._at_start[1]
        left = sum(piece.trees for piece in self._pieces.values()) - trees
        events.emit({"event": "step", "step": fits, "total": self._work.fits, "rate": rate, "unit": "fits",
                     "eta_s": elapsed * left / grown if grown else None})
        record(self._paths, self._attempt, step=fits)


def record(paths: RunPaths, attempt: int | None, **changes: Any) -> None:
    """Update run.json, if this run has one. Raises: TrainingError if a newer attempt has taken over the run."""
    if attempt is not None and max(paths.attempt_numbers(), default=0) > attempt:
        raise TrainingError(f"a newer attempt has taken the run over from attempt {attempt}")
    try:
        update_json(paths.record, **changes, updated=utc_now())
    except FileNotFoundError:
        pass
    except OSError as error:
        _note("warning", f"{paths.record} cannot be written: {error.strerror}")


def _note(level: str, message: str) -> None:
    events.emit({"event": "note", "level": level, "message": message})

