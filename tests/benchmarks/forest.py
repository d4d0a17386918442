"""The forest search against GridSearchCV, by turns, on UCI's red Wine Quality: times, and every score for equality.

    python tests/benchmarks/forest.py small FILE [ROUNDS]   # the task's 27 points, both whole
    python tests/benchmarks/forest.py large FILE [SAMPLE]   # 1,008 points; GridSearchCV on every SAMPLEth
    python tests/benchmarks/forest.py memory [GIB] [grid]   # what workers hold of such a table; GridSearchCV's with `grid`
"""

from __future__ import annotations

import os
import sys
import threading
import time
from statistics import median

import numpy as np
import psutil
from sklearn.ensemble import RandomForestRegressor
from sklearn.model_selection import GridSearchCV, ParameterGrid

from trainers.forest import ForestSearchCV

SMALL = {"n_estimators": [10, 50, 100], "min_samples_leaf": [2, 4, 8], "min_samples_split": [2, 4, 8]}
LARGE = {"n_estimators": [10, 25, 50, 75, 100, 150, 200], "min_samples_leaf": [1, 2, 4, 8], "min_samples_split": [2, 4, 8],
         "max_depth": [None, 10, 20], "max_features": ["sqrt", "log2", 0.5, 1.0]}


def read(path: str) -> tuple[np.ndarray, np.ndarray]:
    table = np.loadtxt(path, delimiter=";", skiprows=1)
    return table[:, :-1], table[:, -1]


def timed(search, X, y) -> float:
    began = time.perf_counter()
    search.fit(X, y)
    return time.perf_counter() - began


def equal(ours: dict, theirs: dict, rows=slice(None)) -> bool:
    return all(np.array_equal(np.asarray(ours[key])[rows], theirs[key]) for key in theirs
               if key.startswith(("split", "mean_test", "std_test")))


def small(path: str, rounds: int = 5) -> None:
    X, y = read(path)
    cores = len(os.sched_getaffinity(0))
    ours, theirs = (cls(RandomForestRegressor(random_state=0), SMALL, cv=5, n_jobs=cores)
                    for cls in (ForestSearchCV, GridSearchCV))
    for search in (ours, theirs):  # warm both
        search.fit(X, y)
    ratios = []
    for number in range(rounds):
        first = number % 2
        seconds = {search: timed(search, X, y) for search in ((ours, theirs), (theirs, ours))[first]}
        ratios.append(seconds[theirs] / seconds[ours])
        a, b = ours.cv_results_, theirs.cv_results_
        same = list(a) == list(b) and equal(a, b) and np.array_equal(a["rank_test_score"], b["rank_test_score"])
        print(f"GridSearchCV {seconds[theirs]:.1f} s, forest search {seconds[ours]:.1f} s: {ratios[-1]:.2f} times; all equal: "
              f"{same and ours.best_params_ == theirs.best_params_}; trees {ours.n_trees_} of {ours.n_trees_asked_}", flush=True)
    print(f"median {median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})")


def large(path: str, step: int = 36) -> None:
    X, y = read(path)
    cores = len(os.sched_getaffinity(0))
    points = list(ParameterGrid(LARGE))
    rows = np.random.default_rng(0).permutation(len(points))[:len(points) // step]
    sample = [{key: [value] for key, value in points[row].items()} for row in rows]
    trees = sum(points[row]["n_estimators"] for row in rows) / sum(point["n_estimators"] for point in points)
    theirs = GridSearchCV(RandomForestRegressor(random_state=0), sample, cv=5, n_jobs=cores, refit=False)
    before = timed(theirs, X, y)
    ours = ForestSearchCV(RandomForestRegressor(random_state=0), LARGE, cv=5, n_jobs=cores, refit=False)
    seconds = timed(ours, X, y)
    after = timed(theirs, X, y)
    whole = (before + after) / 2 / trees
    print(f"{len(points)} points, {cores} cores: forest search {seconds:.0f} s ({ours.n_trees_:,} of {ours.n_trees_asked_:,} "
          f"trees); GridSearchCV on {len(sample)} of them, {trees:.1%} of its trees, {before:.0f} s before and {after:.0f} s "
          f"after, so {whole:.0f} s for all: {whole / seconds:.1f} times; the sample's scores equal: "
          f"{equal(ours.cv_results_, theirs.cv_results_, rows)}")


def memory(gib: float = 1.0, cls: type = ForestSearchCV) -> None:
    """Columns enough that trees are quick, rows enough that the table is large."""
    columns = 1000
    X = np.random.default_rng(0).normal(size=(int(gib * 2**30 / 8 / columns), columns))
    y = X[:, 0] + X[:, 1]
    fixed = dict(random_state=0, max_depth=4, max_features=4, max_samples=0.1)
    grid = {"n_estimators": [4, 8], "min_samples_leaf": [1, 2, 4, 8], "min_samples_split": [2, 4]}
    search = cls(RandomForestRegressor(**fixed), grid, cv=3, n_jobs=2, refit=False)
    seen: dict[str, float] = {}

    def watch() -> None:
        me = psutil.Process()
        while not done.wait(0.1):
            each = [rollup(child.pid) for child in me.children(recursive=True)]
            for name in ("Anonymous", "Pss", "Rss"):
                seen[name] = max(seen.get(name, 0), sum(one.get(name, 0) for one in each))
            seen["one"] = max([seen.get("one", 0), *(one.get("Anonymous", 0) for one in each)])

    done = threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    seconds = timed(search, X, y)
    done.set()
    thread.join()
    said = {name: f"{kib / 2**10:,.0f} MiB" for name, kib in seen.items()}
    print(f"{cls.__name__}, a table of {X.nbytes / 2**30:.2f} GiB, 2 workers, {seconds:.0f} s: at most, workers' own memory "
          f"{said['Anonymous']} (of one {said['one']}), with their shares of mapped files {said['Pss']}, resident {said['Rss']}")


def rollup(pid: int) -> dict[str, int]:
    """What Linux says of a process's memory, in KiB. Mapped files are no part of `Anonymous`."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return {line.split(":")[0]: int(line.split()[1]) for line in file.readlines()[1:]}
    except OSError:
        return {}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["small", path, *rest]:
            small(path, *map(int, rest))
        case ["large", path, *rest]:
            large(path, *map(int, rest))
        case ["memory", *rest]:
            memory(float([*rest, 1][0]), GridSearchCV if "grid" in rest else ForestSearchCV)
        case _:
            sys.exit(__doc__)
