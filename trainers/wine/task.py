"""The search as a run: its pieces over ranks and cores, each kept, then one reduction, which anyone may repeat."""

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
from trainers.engine.tracking.wandb_run import WandbRun
from trainers.runner import Place, Runner
from trainers.wine.config import WineConfig
from trainers.wine.table import Table, fetch, load_table

if TYPE_CHECKING:
    from trainers.forest import ForestSearchCV
    from trainers.forest.kept import Kept
    from trainers.forest.work import Work

LOOK_EVERY_S = 0.5     # for what other ranks have finished
SAY_EVERY_S = 1.0      # and record


class Wine(Runner):
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
                self._progress.say()
                events.emit({"event": "end", "state": "preempted", "step": self._progress.fits, "total": self._progress.total,
                             "unit": "fits", "metrics": {}, "checkpoint": None})
            return exit_codes.PREEMPTED

    def _run(self, place: Place, paths: RunPaths, attempt: int | None) -> int:
        from trainers.forest.work import end_workers, quiet  # scikit-learn takes a second: a stop during it is heeded
        from trainers.wine.searching import make_search

        quiet()
        self.config.check()
        table = load_table(self.config.data, self.config.model.classifies, self.config.search.group)
        search, given = make_search(self.config, table, place.cores)
        work = search.prepare(table.X, table.y, **given)
        try:
            kept = self._fit(work, table, place, paths, attempt)
            return exit_codes.FINISHED if kept is None else self._reduce(work, kept, table, search, place, paths, attempt)
        finally:
            end_workers()
            if work.folds:
                work.folds.close()

    def _fit(self, work: Work, table: Table, place: Place, paths: RunPaths, attempt: int | None) -> Kept | None:
        """Until all pieces are kept, of whichever rank; ranks other than 0 leave when none is left for them: None."""
        from trainers.forest.kept import Kept

        try:
            kept = Kept(paths.pieces)
            self._progress = progress = Progress(work, kept, paths, attempt, place)
            if place.rank == 0:
                self._say_what(table, work)
                progress.start()
            mine = Claims(paths, attempt, place, work.keys()) if place.size > 1 else None
            for done in work.results(n_jobs=place.cores, kept=kept, mine=mine, guarded=True):
                if place.rank == 0 and not done.kept:
                    progress.look()
            while place.rank == 0 and not progress.look():
                time.sleep(LOOK_EVERY_S)
        except OSError as error:
            raise TrainingError(f"a finished piece cannot be kept: {error.strerror or error}",
                                f"mend that, then `launch resume {paths.id}`") from error
        if place.rank != 0:
            return None
        progress.say()
        return kept

    def _reduce(self, work: Work, kept: Kept, table: Table, search: ForestSearchCV, place: Place, paths: RunPaths,
                attempt: int | None) -> int:
        """The same whoever does it, and however often."""
        from trainers.forest.work import guarded_workers
        from trainers.wine.report import check_scores, failures, last_line, report

        found = {(number, piece.fold): result for key, piece in work.keys().items()
                 for number, result in (kept.read(key) or {}).items()}
        try:
            search.reduce(work, found)
        except ValueError as error:  # scikit-learn's, of fits that failed, with the tracebacks of all of them
            raise UserError(f"the forests cannot be fitted: {last_line(error)}",
                            "mend `search.grid`, `model.params` or the table") from error
        check_scores(self.config, table, search, failures(found.values()))
        try:
            with guarded_workers():
                metrics, rows = report(self.config, table, search, paths, place.cores)
        except OSError as error:
            raise TrainingError(f"what was found cannot be written: {error.strerror or error}",
                                f"mend that, then `launch resume {paths.id}`") from error
        hold()
        record(paths, attempt, step=work.fits, metrics=metrics)
        self._track(paths, metrics, rows)
        events.emit({"event": "end", "state": "finished", "step": work.fits, "total": work.fits, "unit": "fits",
                     "metrics": metrics, "checkpoint": None})
        return exit_codes.FINISHED

    def _say_what(self, table: Table, work: Work) -> None:
        if missing := table.missing:
            columns = ", ".join(f"`{name}` {count:,}" for name, count in missing.items())
            drawn = self.config.model.name.startswith("extra_trees")
            side = "a side drawn at random" if drawn else "the side that is better for it"
            _note("info", f"missing values ({columns}): at each split the trees send them to {side}, and where training had "
                          "none, to the side with more rows")
        for reason, count in work.plain.items():
            _note("warning", f"{count} of {len(work.candidates)} grid points are fitted plainly, as GridSearchCV does: {reason}")

    def _track(self, paths: RunPaths, metrics: Mapping[str, float], rows: list[dict[str, Any]]) -> None:
        """The table, the metrics and the figures in W&B."""
        if self.config.wandb.mode == "off":
            return
        try:
            tracked = WandbRun(self.config, paths, 0, [], _note)
            tracked.table("cv_results", rows)
            tracked.log({"step": 1, "split": "eval", **metrics})
            tracked.finish(1, paths.figures, finished=True)
        except Exception as error:
            _note("warning", f"W&B cannot track this run ({' '.join(str(error).split())}); cv_results.csv has everything")


class Claims:
    """Who begins a piece first has it. The claims of another attempt, whose ranks have gone, count for nothing.

    Ranks started by hand have nothing to tell attempts apart by: they take the pieces in turn, by their places among all
    of the search, as what was kept already when a rank looked may differ from rank to rank.
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
    """What of all ranks' work is done: read off the kept pieces; rank 0 says and records it."""

    def __init__(self, work: Work, kept: Kept, paths: RunPaths, attempt: int | None, place: Place):
        self._work, self._kept, self._paths, self._attempt, self._place = work, kept, paths, attempt, place
        self._pieces: Mapping[str, Any] = work.keys()
        self._whole: set[str] = set()  # keys of files that have been read once: a file is replaced as a whole or not at all
        self._began = self._said = time.monotonic()
        self._at_start = self._done()

    @property
    def fits(self) -> int:
        return self._done()[0]

    @property
    def total(self) -> int:
        return self._work.fits

    def _done(self) -> tuple[int, int, bool]:
        """(fits, trees at most, whether that is all)"""
        there = self._kept.keys() & self._pieces.keys()
        # A broken file is none: some rank fits that piece again.
        self._whole |= {key for key in there - self._whole if self._kept.read(key) is not None}
        done = there & self._whole
        return (sum(len(self._pieces[key].candidates) for key in done), sum(self._pieces[key].trees for key in done),
                len(done) == len(self._pieces))

    def start(self) -> None:
        fits, _, _ = self._at_start
        work = self._work
        trees = sum(piece.trees for piece in work.pieces)
        events.emit({"event": "start", "step": fits, "total": work.fits, "resumed": fits > 0,
                     "about": f"{len(work.candidates)} grid points x {len(work.splits)} folds of {len(work.X):,} rows in "
                              f"{len(work.pieces)} pieces, {trees:,} trees for {work.trees_asked:,}; "
                              f"{self._place.size} rank(s) x {self._place.cores} core(s)"})
        record(self._paths, self._attempt, step=fits, total=work.fits)

    def look(self) -> bool:
        """Say, now and then, how far all ranks are. Whether all is done."""
        if time.monotonic() - self._said > SAY_EVERY_S:
            self.say()
        return self._done()[2]

    def say(self) -> None:
        self._said = time.monotonic()
        took = self._said - self._began
        fits, trees, _ = self._done()
        rate, grown = (fits - self._at_start[0]) / took, trees - self._at_start[1]
        left = sum(piece.trees for piece in self._pieces.values()) - trees
        events.emit({"event": "step", "step": fits, "total": self._work.fits, "rate": rate, "unit": "fits",
                     "eta_s": took * left / grown if grown else None})
        record(self._paths, self._attempt, step=fits)


def record(paths: RunPaths, attempt: int | None, **changes: Any) -> None:
    """run.json, if this run has one. Raises: TrainingError if a newer attempt has the run."""
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

