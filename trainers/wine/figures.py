"""Figures of a finished search, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trainers.forest import ForestSearchCV

MOST_LINES = 12
MOST_NUMBERED = 120  # cells


def draw_heat_map(search: ForestSearchCV, metric: str, name: str, path: Path) -> None:
    """Draw the best score at each pair of values of the two parameters that change the score most.

    `n_estimators` is one of the two only if fewer than two other parameters vary.
    """
    varied = _varied(search)
    ranked = sorted(varied, key=lambda parameter: (parameter == "n_estimators", -_spread(search, metric, varied, parameter)))
    rows, columns = (ranked + [None, None])[:2]
    row_values, column_values = (varied[parameter] if parameter is not None else [None] for parameter in (rows, columns))
    best = np.full((len(row_values), len(column_values)), np.nan)
    for params, score in zip(search.cv_results_["params"], search.cv_results_[f"mean_test_{metric}"]):
        at = row_values.index(params.get(rows)), column_values.index(params.get(columns))
        best[at] = score if np.isnan(best[at]) else max(best[at], score)
    figure, axes = _figure(2.5 + 0.8 * len(column_values), 1.8 + 0.5 * len(row_values))
    image = axes.imshow(best, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(column_values)), [_label(value) for value in column_values])
    axes.set_yticks(range(len(row_values)), [_label(value) for value in row_values])
    axes.set_xlabel(columns or "")
    axes.set_ylabel(rows or "")
    axes.set_title(f"best mean {name}", fontsize=10)
    figure.colorbar(image)
    if best.size <= MOST_NUMBERED:
        middle = (np.nanmin(best) + np.nanmax(best)) / 2 if not np.all(np.isnan(best)) else 0
        for at in np.ndindex(best.shape):
            axes.text(at[1], at[0], f"{best[at]:.3f}", ha="center", va="center", fontsize=8,
                      color="black" if best[at] > middle else "white")
    _write(figure, path)


def draw_trees(search: ForestSearchCV, metric: str, name: str, path: Path) -> None:
    """Draw the score against the number of trees, with a line for each of the best values of the other parameters."""
    lines: dict[str, list[tuple[int, float, float]]] = {}
    results, fixed = search.cv_results_, search.estimator.n_estimators
    for number, params in enumerate(results["params"]):
        rest = ", ".join(f"{key}={_label(value)}" for key, value in params.items() if key != "n_estimators")
        lines.setdefault(rest, []).append((params.get("n_estimators", fixed), results[f"mean_test_{metric}"][number],
                                           results[f"std_test_{metric}"][number]))
    best_first = sorted(lines, key=lambda rest: -max((point[1] for point in lines[rest]), default=0))[:MOST_LINES]
    figure, axes = _figure(7.5, 4.5)
    for rest in best_first:
        trees, mean, _ = np.array(sorted(lines[rest])).T
        axes.plot(trees, mean, marker="o", markersize=3, linewidth=1, label=rest or "the grid")
    trees, mean, std = np.array(sorted(lines[best_first[0]])).T
    axes.fill_between(trees, mean - std, mean + std, alpha=0.12)
    axes.set_xlabel("n_estimators")
    axes.set_ylabel(f"mean {name} (band: std over folds, of the best line)", fontsize=8)
    axes.legend(fontsize=6, loc="best", title=None if len(lines) <= MOST_LINES else f"the best {MOST_LINES} of {len(lines)}",
                title_fontsize=6)
    _write(figure, path)


def draw_importance(importance: list[dict[str, Any]], name: str, path: Path, most: int = 30) -> None:
    """Draw a bar for each of the `most` most important features."""
    shown = importance[:most][::-1]
    figure, axes = _figure(6.5, 1.2 + 0.28 * len(shown))
    axes.barh([row["feature"].replace("$", r"\$") for row in shown], [row["mean"] for row in shown],
              xerr=[row["std"] for row in shown], color="tab:blue", height=0.7)
    axes.tick_params(labelsize=8)
    axes.set_xlabel(f"decrease of {name} when the column is shuffled (model and data of the refit)", fontsize=8)
    _write(figure, path)


def _varied(search: ForestSearchCV) -> dict[str, list[Any]]:
    """Return the values of each parameter with several values, in the grid's order; if there is none, of the first two."""
    by_name: dict[str, list[Any]] = {}
    for params in search.cv_results_["params"]:
        for name in {**params, **by_name}:
            values = by_name.setdefault(name, [])
            if params.get(name) not in values:
                values.append(params.get(name))
    several = {name: values for name, values in by_name.items() if len(values) > 1}
    return several or dict(list(by_name.items())[:2])


def _spread(search: ForestSearchCV, metric: str, varied: dict[str, list[Any]], parameter: str) -> float:
    """Return the difference between the mean scores of the parameter's best and worst value."""
    scores = search.cv_results_[f"mean_test_{metric}"]
    candidates = search.cv_results_["params"]
    means = [np.mean([score for params, score in zip(candidates, scores) if params.get(parameter) == value])
             for value in varied[parameter]]
    return float(np.nan_to_num(max(means) - min(means)))


def _label(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure((min(width, 14), min(height, 14)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _write(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)
