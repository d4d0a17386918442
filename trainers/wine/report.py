"""What a finished search leaves: the table, the model, figures, and what the scores are worth."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.inspection import permutation_importance
from sklearn.model_selection import GroupKFold, KFold, cross_val_score

from trainers.contract import events
from trainers.contract.errors import UserError
from trainers.contract.files import replace_json, replace_text
from trainers.contract.paths import RunPaths
from trainers.forest import ForestSearchCV, save_forest
from trainers.wine.config import WineConfig
from trainers.wine.figures import draw_heat_map, draw_importance, draw_trees
from trainers.wine.table import Table

Row = dict[str, Any]


def failures(results: Iterable[Mapping[str, Any]]) -> str | None:
    """Which of a search's fits failed, and why most of them did."""
    results = list(results)
    reasons = Counter(last_line(result["fit_error"]) for result in results if result["fit_error"] is not None)
    if not reasons:
        return None
    return f"{reasons.total()} of {len(results)} fits failed: {reasons.most_common(1)[0][0]}"


def check_scores(config: WineConfig, table: Table, search: ForestSearchCV, failed: str | None) -> None:
    """Say it where the score that decides is no number, or a fit has `failed`. Raises: UserError if that is so at every grid
    point."""
    metric = search.refit if isinstance(search.refit, str) else "score"
    numbers = np.isfinite(search.cv_results_[f"mean_test_{metric}"])
    name = metric_name(config, search)
    if np.any(numbers):
        if failed:
            _say(failed, "warning")
        if not np.all(numbers):
            _say(f"{name} is no number at {np.sum(~numbers)} of {len(numbers)} grid points: a fold of each cannot be fitted or "
                 "scored", "warning")
        return
    if failed:
        raise UserError(f"no grid point can be fitted and scored on all folds: {failed}",
                        "mend `search.grid`, `model.params` or the table, or use other folds (`search.cv`, `search.split`)")
    scorer = search.scorer_[metric] if search.multimetric_ else search.scorer_
    why = "each grid point has a fold where it is undefined"
    try:  # scikit-learn has told why in a warning alone
        scorer(search.best_estimator_, table.X, table.y)
    except Exception as error:
        why = last_line(error)
    raise UserError(f"the score `{name}` is no number at any grid point: {why}",
                    f"use another `search.scoring`, one for a {config.model.name}, or other folds (`search.cv`, `search.split`)")


def metric_name(config: WineConfig, search: ForestSearchCV) -> str:
    """Of the score that decides."""
    if isinstance(search.refit, str):
        return search.refit
    return config.search.scores[0] if config.search.scores else "accuracy" if config.model.classifies else "r2"


def last_line(error: Exception | str) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def report(config: WineConfig, table: Table, search: ForestSearchCV, paths: RunPaths, cores: int
           ) -> tuple[dict[str, float], list[Row]]:
    """Write it, and say the most of it. Returns the metrics, and the table's rows.

    Raises:
        OSError: something cannot be written.
    """
    metric = search.refit if isinstance(search.refit, str) else "score"
    name = metric_name(config, search)
    rows = table_rows(search)
    replace_text(paths.results, _csv(rows))
    best = {"params": _plain(search.best_params_), "score": name, "mean": float(search.best_score_),
            "std": float(search.cv_results_[f"std_test_{metric}"][search.best_index_])}
    metrics = {name: best["mean"]}
    scorer = search.scorer_[metric] if search.multimetric_ else search.scorer_
    found: Row = {"data": table.what, "rows": len(table.X), "repeated_rows": table.repeats, "target": table.target,
                  "features": table.names, "best": best}
    _say(f"best {name} {best['mean']:.4f} (std {best['std']:.4f} over {search.n_splits_} folds): "
         + ", ".join(f"{key}={value}" for key, value in best["params"].items()))
    if config.search.compare_grouped:
        try:
            found["folds"] = _folds(config, table, search, scorer, name, cores)
        except ValueError as error:  # of a fold without some class, say: the search itself is none the worse
            found["folds"] = {"why": f"the best parameters cannot be scored under other folds: {last_line(error)}"}
        if grouped := found["folds"].get("grouped"):
            metrics[f"{name}_grouped"] = grouped["mean"]
        _say(found["folds"]["why"])
    paths.figures.mkdir(exist_ok=True)
    draw_heat_map(search, metric, name, paths.figures / "heat_map.png")
    draw_trees(search, metric, name, paths.figures / "n_estimators.png")
    if config.search.importance_repeats:
        try:
            found["importance"] = _importance(config, table, search, scorer, cores)
        except ValueError as error:
            _say(f"no importance of features: {last_line(error)}", "warning")
    if found.get("importance"):
        draw_importance(found["importance"], name, paths.figures / "importance.png")
        most = found["importance"][0]
        _say(f"most important: `{most['feature']}`, without which {name} of the training data falls by {most['mean']:.4f}")
    save_forest(search.best_estimator_, paths.model,
                {"features": table.names, "target": table.target, **best})
    replace_json(paths.root / "results.json", found)
    return metrics, rows


def table_rows(search: ForestSearchCV) -> list[Row]:
    """`cv_results_`, a row a candidate, in its columns and order."""
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
    """Numbers as Python writes them: they are read back as the same ones."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _folds(config: WineConfig, table: Table, search: ForestSearchCV, scorer: Any, name: str, cores: int) -> Row:
    """The best parameters' score under other folds: rows at random, and rows with identical features kept together.

    Beside the search's own score, because what it shares out (UCI's rows, in their order) differs in more than the
    repeats: only the other two, both at random, differ in those alone.
    """
    groups, folds, seed = table.alike, config.search.cv, config.search.seed
    distinct = len(np.unique(groups))
    found: Row = {"plain": {"mean": float(search.best_score_)}}
    if distinct == len(groups):
        return {**found, "why": "no two rows have the same features: grouped folds would be plain ones at random"}
    if distinct < folds:
        return {**found, "why": f"{distinct} rows are distinct, too few for {folds} grouped folds"}
    X, y = table.X, table.y
    for key, split in (("random", KFold(folds, shuffle=True, random_state=seed)),
                       ("grouped", GroupKFold(folds, shuffle=True, random_state=seed))):
        of = groups if key == "grouped" else None
        scores = cross_val_score(clone(search.best_estimator_), X, y, groups=of, cv=split, scoring=scorer, n_jobs=cores)
        found[key] = {"mean": float(scores.mean()), "std": float(scores.std()), "scores": scores.tolist()}
    plain, random, grouped = (found[key]["mean"] for key in ("plain", "random", "grouped"))
    found["why"] = (
        f"{name} of the best parameters: {plain:.4f} under the search's folds, {random:.4f} under random ones, {grouped:.4f} "
        f"with identical rows kept together: {len(groups) - distinct:,} of {len(groups):,} rows repeat the features of another "
        f"({table.repeats:,} the target too), and where a copy is in training, the forest has seen the answer: "
        f"random less grouped, {random - grouped:+.4f}, is what that is worth here")
    return found


def _importance(config: WineConfig, table: Table, search: ForestSearchCV, scorer: Any, cores: int) -> list[Row]:
    """By how much the score falls when a column is shuffled, the most first: of the refitted model, on the data that it
    was fitted to."""
    found = permutation_importance(search.best_estimator_, table.X, table.y, scoring=scorer, n_jobs=cores,
                                   n_repeats=config.search.importance_repeats, random_state=config.search.seed)
    order = np.argsort(-found.importances_mean, kind="stable")
    return [{"feature": table.names[place], "mean": float(found.importances_mean[place]),
             "std": float(found.importances_std[place])} for place in order]


def _say(message: str, level: str = "info") -> None:
    events.emit({"event": "note", "level": level, "message": message})
