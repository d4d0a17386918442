"""Writes the results of a finished search: the table, the model and figures. Reports how far the scores can be trusted."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.model_selection import GroupKFold, KFold, cross_val_score

from trainers.contract import events
from trainers.contract.errors import UserError
from trainers.contract.files import replace_json, replace_text
from trainers.contract.paths import RunPaths
from trainers.forest import ForestSearchCV, save_forest
from trainers.forest.importance import permutation_falls
from trainers.wine.config import WineConfig
from trainers.wine.table import Table

Row = dict[str, Any]


def failures(results: Iterable[Mapping[str, Any]]) -> str | None:
    """Return how many fits of a search failed, and the most frequent reason, or None if none failed."""
    results = list(results)
    reasons = Counter(last_line(result["fit_error"]) for result in results if result["fit_error"] is not None)
    if not reasons:
        return None
    return f"{reasons.total()} of {len(results)} fits failed: {reasons.most_common(1)[0][0]}"


def check_scores(config: WineConfig, table: Table, search: ForestSearchCV, failed: str | None) -> None:
    """Warn about fits that failed, and about grid points whose deciding score is not a number.

    Args:
        failed: what `failures` returned.

    Raises:
        UserError: the deciding score is not a number at any grid point.
    """
    metric = search.refit if isinstance(search.refit, str) else "score"
    numbers = np.isfinite(search.cv_results_[f"mean_test_{metric}"])
    name = metric_name(config, search)
    if np.any(numbers):
        if failed:
            _say(failed, "warning")
        if not np.all(numbers):
            _say(f"{name} is not a number at {np.sum(~numbers)} of {len(numbers)} grid points: each has a fold that cannot be "
                 "fitted or scored", "warning")
        return
    if failed:
        raise UserError(f"no grid point can be fitted and scored on all folds: {failed}",
                        "fix `search.grid`, `model.params` or the table, or use other folds (`search.cv`, `search.split`)")
    scorer = search.scorer_[metric] if search.multimetric_ else search.scorer_
    why = "each grid point has a fold where it is undefined"
    try:  # scikit-learn gave the reason only in a warning: score again to get the error
        scorer(search.best_estimator_, table.X, table.y)
    except Exception as error:
        why = last_line(error)
    raise UserError(f"the score `{name}` is not a number at any grid point: {why}",
                    f"use a `search.scoring` that suits a {config.model.name}, or other folds (`search.cv`, `search.split`)")


def metric_name(config: WineConfig, search: ForestSearchCV) -> str:
    """Return the name of the score that selects the best grid point."""
    if isinstance(search.refit, str):
        return search.refit
    return config.search.scores[0] if config.search.scores else "accuracy" if config.model.classifies else "r2"


def last_line(error: Exception | str) -> str:
    """Return the last line of an error's text, which after a traceback is the error itself."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def report(config: WineConfig, table: Table, search: ForestSearchCV, paths: RunPaths, cores: int
           ) -> tuple[dict[str, float], list[Row]]:
    """Write all results, and print the main ones. Return (metrics, rows of the table).

    Raises:
        OSError: a file cannot be written.
    """
    metric = search.refit if isinstance(search.refit, str) else "score"
    name = metric_name(config, search)
    rows = table_rows(search)
    replace_text(paths.results, _csv(rows))
    best: Row = {"params": _plain(search.best_params_), "score": name, "mean": float(search.best_score_),
            "std": float(search.cv_results_[f"std_test_{metric}"][search.best_index_])}
    metrics: dict[str, float] = {name: best["mean"]}
    scorer = search.scorer_[metric] if search.multimetric_ else search.scorer_
    results: Row = {"data": table.what, "rows": len(table.X), "repeated_rows": table.repeats, "target": table.target,
                  "features": table.names, "best": best}
    _say(f"best {name} {best['mean']:.4f} (std {best['std']:.4f} over {search.n_splits_} folds): "
         + ", ".join(f"{key}={value}" for key, value in best["params"].items()))
    paths.figures.mkdir(exist_ok=True)
    with ThreadPoolExecutor(1) as beside:  # this process would only wait for the workers that fit the other folds
        drawn = beside.submit(_draw_search, search, metric, name, paths)
        if config.search.compare_grouped:
            try:
                results["folds"] = _folds(config, table, search, scorer, name, cores)
            except ValueError as error:  # for example a fold without one of the classes: the search itself is still valid
                results["folds"] = {"why": f"the best parameters cannot be scored under other folds: {last_line(error)}"}
            if grouped := results["folds"].get("grouped"):
                metrics[f"{name}_grouped"] = grouped["mean"]
            _say(results["folds"]["why"])
        drawn.result()
    if config.search.importance_repeats:
        try:
            results["importance"] = _importance(config, table, search, scorer, cores)
        except ValueError as error:
            _say(f"the importance of features cannot be computed: {last_line(error)}", "warning")
    if results.get("importance"):
        from trainers.wine.figures import draw_importance

        draw_importance(results["importance"], name, paths.figures / "importance.png")
        most = results["importance"][0]
        _say(f"most important feature: `{most['feature']}`; shuffling it lowers {name} on the training data by "
             f"{most['mean']:.4f}")
    save_forest(search.best_estimator_, paths.model,
                {"features": table.names, "target": table.target, **best})
    replace_json(paths.root / "results.json", results)
    return metrics, rows


def _draw_search(search: ForestSearchCV, metric: str, name: str, paths: RunPaths) -> None:
    from trainers.wine.figures import draw_heat_map, draw_trees  # matplotlib takes half a second to import

    draw_heat_map(search, metric, name, paths.figures / "heat_map.png")
    draw_trees(search, metric, name, paths.figures / "n_estimators.png")


def table_rows(search: ForestSearchCV) -> list[Row]:
    """Return `cv_results_` as rows, one for each candidate, with the same columns in the same order."""
    columns = {key: values for key, values in search.cv_results_.items()}
    return [{key: _cell(values[number]) for key, values in columns.items()}
            for number in range(len(columns["params"]))]


def _cell(value: Any) -> Any:
    if value is np.ma.masked:
        return ""
    if isinstance(value, dict):
        return str(_plain(value))
    return value.item() if isinstance(value, np.generic) else "None" if value is None else value


def _plain(params: dict[str, Any]) -> dict[str, Any]:
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in params.items()}


def _csv(rows: list[Row]) -> str:
    """Return a table as CSV. Numbers are written as Python prints them, so reading gives exactly the same numbers."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _folds(config: WineConfig, table: Table, search: ForestSearchCV, scorer: Any, name: str, cores: int) -> Row:
    """Score the best parameters under other folds: random folds, and random folds that keep identical rows together.

    Both scores are needed to measure the effect of repeated rows. The search's own folds take the rows in the order of UCI's
    file, so they differ from grouped folds in this order too. The two kinds of random folds differ only in repeated rows.
    """
    groups, folds, seed = table.feature_groups, config.search.cv, config.search.seed
    distinct = len(np.unique(groups))
    scored: Row = {"plain": {"mean": float(search.best_score_)}}
    if distinct == len(groups):
        return {**scored, "why": "no two rows have the same features: grouped folds would be no different from random folds"}
    if distinct < folds:
        return {**scored, "why": f"only {distinct} rows are distinct, too few for {folds} grouped folds"}
    X, y = table.X, table.y
    splits = [*KFold(folds, shuffle=True, random_state=seed).split(X),
              *GroupKFold(folds, shuffle=True, random_state=seed).split(X, groups=groups)]
    both = cross_val_score(clone(search.best_estimator_), X, y, cv=splits, scoring=scorer, n_jobs=cores)  # no core waits between
    for key, scores in (("random", both[:folds]), ("grouped", both[folds:])):
        if np.isnan(scores).all():  # cross_val_score raises an error only if the fits of both kinds fail
            raise ValueError(f"none of the {key} folds can be scored")
        scored[key] = {"mean": float(scores.mean()), "std": float(scores.std()), "scores": scores.tolist()}
    plain, random, grouped = (scored[key]["mean"] for key in ("plain", "random", "grouped"))
    scored["why"] = (
        f"{name} of the best parameters: {plain:.4f} with the search's folds, {random:.4f} with random folds, {grouped:.4f} "
        f"with random folds that keep identical rows together; {len(groups) - distinct:,} of {len(groups):,} rows repeat the "
        f"features of another row ({table.repeats:,} repeat the target too); a forest that was trained on a copy of a row "
        f"knows the row's target: this changes the score by {random - grouped:+.4f} here (random minus grouped)")
    return scored


def _importance(config: WineConfig, table: Table, search: ForestSearchCV, scorer: Any, cores: int) -> list[Row]:
    """Return how much the score falls when a column is shuffled, for each feature, the largest fall first.

    Measured with the refitted model, on the rows to which this model was fitted.
    """
    falls = permutation_falls(search.best_estimator_, table.X, table.y, scorer, config.search.importance_repeats,
                              config.search.seed, cores)
    mean, std = falls.mean(axis=1), falls.std(axis=1)
    return [{"feature": table.names[place], "mean": float(mean[place]), "std": float(std[place])}
            for place in np.argsort(-mean, kind="stable")]


def _say(message: str, level: str = "info") -> None:
    events.emit({"event": "note", "level": level, "message": message})
