"""Compare the forest search with GridSearchCV on UCI's red Wine Quality: their times in alternating turns, and whether all
scores are equal.

    python tests/benchmarks/forest.py small FILE [ROUNDS]   # the 27 grid points of the task, all points with both
    python tests/benchmarks/forest.py command FILE [ROUNDS] # `launch wine data=FILE` with all it reports, and GridSearchCV.fit
    python tests/benchmarks/forest.py large FILE [SAMPLE]   # 1,008 points; GridSearchCV on 1/SAMPLE of them
    python tests/benchmarks/forest.py memory [GIB] [grid]   # memory of the workers for a table of GIB GiB

FILE is winequality-red.csv. `memory` measures the forest search, or GridSearchCV with the word `grid`.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np
import psutil
from sklearn.ensemble import RandomForestRegressor
from sklearn.model_selection import GridSearchCV, ParameterGrid

from trainers.forest import ForestSearchCV

SMALL = {"n_estimators": [10, 50, 100], "min_samples_leaf": [2, 4, 8], "min_samples_split": [2, 4, 8]}
LARGE = {"n_estimators": [10, 25, 50, 75, 100, 150, 200], "min_samples_leaf": [1, 2, 4, 8], "min_samples_split": [2, 4, 8],
         "max_depth": [None, 10, 20], "max_features": ["sqrt", "log2", 0.5, 1.0]}


def read_table(path: str) -> tuple[np.ndarray, np.ndarray]:
    table = np.loadtxt(path, delimiter=";", skiprows=1)
    return table[:, :-1], table[:, -1]


def fit_seconds(search, X, y) -> float:
    began = time.perf_counter()
    search.fit(X, y)
    return time.perf_counter() - began


def equal_scores(ours: dict, theirs: dict, rows=slice(None)) -> bool:
    """Return whether these rows of our results have the scores of `theirs`."""
    return all(np.array_equal(np.asarray(ours[key])[rows], theirs[key]) for key in theirs
               if key.startswith(("split", "mean_test", "std_test")))


def small(path: str, rounds: int = 5) -> None:
    """Print the ratio of the times on the small grid, for each round and as the median."""
    X, y = read_table(path)
    cores = len(os.sched_getaffinity(0))
    ours, theirs = (cls(RandomForestRegressor(random_state=0), SMALL, cv=5, n_jobs=cores)
                    for cls in (ForestSearchCV, GridSearchCV))
    for search in (ours, theirs):  # warm-up
        search.fit(X, y)
    ratios = []
    for number in range(rounds):
        first = number % 2
        seconds = {search: fit_seconds(search, X, y) for search in ((ours, theirs), (theirs, ours))[first]}
        ratios.append(seconds[theirs] / seconds[ours])
        a, b = ours.cv_results_, theirs.cv_results_
        same = list(a) == list(b) and equal_scores(a, b) and np.array_equal(a["rank_test_score"], b["rank_test_score"])
        print(f"GridSearchCV {seconds[theirs]:.1f} s, forest search {seconds[ours]:.1f} s, {ratios[-1]:.2f} times as fast; "
              f"all results equal: {same and ours.best_params_ == theirs.best_params_}; "
              f"{ours.n_trees_} of {ours.n_trees_asked_} trees grown", flush=True)
    print(f"median: {median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")


def command(path: str, rounds: int = 5) -> None:
    """Print the ratio of the times of GridSearchCV.fit and of the whole command, for each round and as the median."""
    X, y = read_table(path)
    cores = len(os.sched_getaffinity(0))
    grid = GridSearchCV(RandomForestRegressor(random_state=0), SMALL, cv=5, n_jobs=cores)
    GridSearchCV(RandomForestRegressor(2, random_state=0), {"max_depth": [1, 2]}, n_jobs=cores).fit(X, y)  # starts the workers
    ratios = []
    for number in range(rounds):
        seconds = {}
        for kind in (("command", "grid"), ("grid", "command"))[number % 2]:
            began = time.perf_counter()
            if kind == "grid":
                grid.fit(X, y)
                seconds[kind] = time.perf_counter() - began
                continue
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run(["launch", "wine", f"data={os.path.abspath(path)}"], cwd=folder, check=True, capture_output=True)
                seconds[kind] = time.perf_counter() - began
                with open(next(Path(folder).glob("runs/*/cv_results.csv")), newline="") as file:
                    rows = list(csv.DictReader(file))
        ratios.append(seconds["grid"] / seconds["command"])
        same = all([float(row[key]) for row in rows] == list(values) for key, values in grid.cv_results_.items()
                   if key.startswith(("split", "mean_test", "std_test")))
        print(f"GridSearchCV.fit {seconds['grid']:.1f} s, `launch wine` {seconds['command']:.1f} s, {ratios[-1]:.2f} times as "
              f"fast; all scores equal: {same}", flush=True)
    print(f"median: {median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")


def large(path: str, step: int = 36) -> None:
    """Print the time on the large grid, and an estimate for GridSearchCV from a random sample of the points."""
    X, y = read_table(path)
    cores = len(os.sched_getaffinity(0))
    points = list(ParameterGrid(LARGE))
    rows = np.random.default_rng(0).permutation(len(points))[:len(points) // step]
    sample = [{key: [value] for key, value in points[row].items()} for row in rows]
    tree_share = sum(points[row]["n_estimators"] for row in rows) / sum(point["n_estimators"] for point in points)
    theirs = GridSearchCV(RandomForestRegressor(random_state=0), sample, cv=5, n_jobs=cores, refit=False)
    before = fit_seconds(theirs, X, y)
    ours = ForestSearchCV(RandomForestRegressor(random_state=0), LARGE, cv=5, n_jobs=cores, refit=False)
    seconds = fit_seconds(ours, X, y)
    after = fit_seconds(theirs, X, y)
    whole = (before + after) / 2 / tree_share
    print(f"{len(points)} points, {cores} cores: forest search {seconds:.0f} s ({ours.n_trees_:,} of {ours.n_trees_asked_:,} "
          f"trees grown); GridSearchCV on {len(sample)} of the points ({tree_share:.1%} of its trees) {before:.0f} s before and "
          f"{after:.0f} s after our search, so about {whole:.0f} s for all points; forest search {whole / seconds:.1f} times as "
          f"fast; scores of the sample equal: {equal_scores(ours.cv_results_, theirs.cv_results_, rows)}")


def memory(gib: float = 1.0, cls: type = ForestSearchCV) -> None:
    """Print the most memory that two workers used. The table is large, but its trees are shallow and therefore quick."""
    columns = 1000
    X = np.random.default_rng(0).normal(size=(int(gib * 2**30 / 8 / columns), columns))
    y = X[:, 0] + X[:, 1]
    fixed = dict(random_state=0, max_depth=4, max_features=4, max_samples=0.1)
    grid = {"n_estimators": [4, 8], "min_samples_leaf": [1, 2, 4, 8], "min_samples_split": [2, 4]}
    search = cls(RandomForestRegressor(**fixed), grid, cv=3, n_jobs=2, refit=False)
    highest: dict[str, float] = {}

    def watch() -> None:
        this_process = psutil.Process()
        while not done.wait(0.1):
            workers = [memory_of(child.pid) for child in this_process.children(recursive=True)]
            for name in ("Anonymous", "Pss", "Rss"):
                highest[name] = max(highest.get(name, 0), sum(worker.get(name, 0) for worker in workers))
            highest["one worker"] = max([highest.get("one worker", 0), *(worker.get("Anonymous", 0) for worker in workers)])

    done = threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    seconds = fit_seconds(search, X, y)
    done.set()
    thread.join()
    text = {name: f"{kib / 2**10:,.0f} MiB" for name, kib in highest.items()}
    print(f"{cls.__name__}, a table of {X.nbytes / 2**30:.2f} GiB, 2 workers, {seconds:.0f} s; highest memory of the workers: "
          f"private {text['Anonymous']} (of one worker {text['one worker']}), "
          f"private and a share of mapped files {text['Pss']}, resident {text['Rss']}")


def memory_of(pid: int) -> dict[str, int]:
    """Return the memory of a process in KiB, by the names in /proc/PID/smaps_rollup. `Anonymous` excludes mapped files."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return {line.split(":")[0]: int(line.split()[1]) for line in file.readlines()[1:]}
    except OSError:
        return {}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["small", path, *rest]:
            small(path, *map(int, rest))
        case ["command", path, *rest]:
            command(path, *map(int, rest))
        case ["large", path, *rest]:
            large(path, *map(int, rest))
        case ["memory", *rest]:
            memory(float([*rest, 1][0]), GridSearchCV if "grid" in rest else ForestSearchCV)
        case _:
            sys.exit(__doc__)
