"""Run random small searches with ForestSearchCV and GridSearchCV. All their results except the times must be equal.

    python tests/forests/random_grids.py [COUNT [FIRST]]

Each of the COUNT problems (default 300) is made from its own seed. The seeds start at FIRST (default 0).
"""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import numpy as np
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor, RandomForestClassifier, RandomForestRegressor
from sklearn.metrics import make_scorer, mean_absolute_error
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, ShuffleSplit, StratifiedKFold

from trainers.forest import ForestSearchCV

REGRESSORS, CLASSIFIERS = (RandomForestRegressor, ExtraTreesRegressor), (RandomForestClassifier, ExtraTreesClassifier)
VALUES = {
    "n_estimators": [1, 2, 3, 5, 8, 12],
    "min_samples_leaf": [1, 2, 3, 7, 0.02, 0.1, 0.25, np.int64(4)],
    "min_samples_split": [2, 3, 4, 6, 11, 0.05, 0.2, 1.0],
    "max_features": [None, "sqrt", "log2", 1, 2, 3, 0.4, 0.5, 1.0],
    "max_depth": [None, 1, 2, 3, 4, 5, 6, 8, 30],
    "max_leaf_nodes": [None, 2, 5, 12],
    "max_samples": [None, 0.5, 9],
    "bootstrap": [True, False],
    "min_impurity_decrease": [0.0, 0.01],
    "min_weight_fraction_leaf": [0.0, 0.05],
    "ccp_alpha": [0.0, 0.01],
    "random_state": [0, 7],
}
REGRESSOR_VALUES = {"criterion": ["squared_error", "absolute_error", "friedman_mse", "poisson"]}
CLASSIFIER_VALUES = {"criterion": ["gini", "entropy", "log_loss"], "class_weight": [None, "balanced", "balanced_subsample"]}
INVALID_VALUES = {"min_samples_leaf": [0, 1, 2], "max_features": ["none", 1], "n_estimators": [-1, 3], "max_depth": [0, 2]}
REGRESSION_SCORES = ["r2", "neg_root_mean_squared_error", "neg_mean_absolute_error", "neg_max_error", "explained_variance"]
CLASS_SCORES = ["accuracy", "f1_macro", "neg_log_loss", "roc_auc_ovr", "balanced_accuracy"]


def own_score(forest: Any, X: Any, y: Any) -> float:
    """A score that reads more of the forest than its predictions."""
    return float(len(forest.estimators_) + forest.min_samples_split + forest.predict(X).shape[0])


def problem(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of a random search, and the arguments of its `fit`."""
    rng = np.random.default_rng(seed)

    def pick(values: list) -> Any:
        return values[rng.integers(len(values))]

    def some(values: list, limit: int) -> list:
        return [values[i] for i in sorted(rng.permutation(len(values))[:rng.integers(1, limit + 1)])]

    rows, columns = int(rng.integers(16, 70)), int(rng.integers(1, 7))
    X = rng.normal(size=(rows, columns))
    if rng.random() < 0.6:
        X = np.round(X * pick([1, 2, 4]))  # makes equal values likely
    if rng.random() < 0.3:
        X[rng.integers(rows, size=rows // 3)] = X[rng.integers(rows, size=rows // 3)]  # makes equal rows
    classify = rng.random() < 0.5
    y: Any = X.sum(1) + rng.normal(size=rows)
    y = np.digitize(y, np.quantile(y, pick([[0.5], [0.3, 0.7]]))) if classify else np.round(np.abs(y), pick([0, 1, 5]))
    if classify and rng.random() < 0.5:
        y = np.array(["a", "b", "c"])[y]
    kind = pick(list(CLASSIFIERS if classify else REGRESSORS))
    values = {**VALUES, **(CLASSIFIER_VALUES if classify else REGRESSOR_VALUES)}
    if rng.random() < 0.2 and "ExtraTrees" not in kind.__name__:
        X[rng.random(size=X.shape) < 0.05] = np.nan
    fixed = {"random_state": pick([0, 1, 42, np.int64(3)]), "n_estimators": pick([2, 5])}
    if rng.random() < 0.1:
        fixed["random_state"] = np.random.RandomState(5)
    if rng.random() < 0.08:
        fixed["oob_score"] = True
    if "ExtraTrees" in kind.__name__:
        fixed["bootstrap"] = pick([False, True])

    def grid() -> dict[str, list]:
        names = ["n_estimators", *some([name for name in values if name != "n_estimators"], 4)]
        values_by_name = {name: some(values[name], 3) for name in names}
        if rng.random() < 0.1:
            values_by_name["min_samples_leaf"] = [2, 2]  # the same value twice
        if rng.random() < 0.1:
            name = pick(list(INVALID_VALUES))
            values_by_name[name] = INVALID_VALUES[name]
        return values_by_name

    given: dict[str, Any] = {}
    folds: Any = pick([2, 3, None, KFold(3, shuffle=True, random_state=1), ShuffleSplit(2, random_state=0), GroupKFold(3),
                       StratifiedKFold(2) if classify else KFold(2), "pairs"])
    if isinstance(folds, GroupKFold):
        given["groups"] = rng.integers(0, 5, size=rows)
    if isinstance(folds, str):
        folds = [(np.arange(rows) % 2 == 0, np.arange(rows) % 2 == 1), (np.arange(5, rows), np.arange(5))]
    if rng.random() < 0.2:
        given["sample_weight"] = rng.integers(1, 4, size=rows).astype(float)
    names = CLASS_SCORES if classify else REGRESSION_SCORES
    scoring = pick([None, pick(names), some(names, 3), "own", "made"])
    if scoring == "own":
        scoring = own_score
    elif scoring == "made":
        scoring = {"a": names[0], "b": own_score} if rng.random() < 0.3 else make_scorer(
            mean_absolute_error, greater_is_better=False) if not classify else {"x": "accuracy"}
    refit: Any = True
    if isinstance(scoring, (list, dict)):
        refit = pick([False, list(scoring)[0]])
    elif rng.random() < 0.2:
        refit = False
    search = dict(estimator=kind(**fixed), param_grid=grid() if rng.random() < 0.85 else [grid(), grid()], scoring=scoring,
                  cv=folds, refit=refit, return_train_score=bool(rng.random() < 0.4))
    return search, {"X": X, "y": y, **given}


def differences(ours: GridSearchCV, theirs: GridSearchCV) -> list[str]:
    """Return the names of the results in which two fitted searches differ."""
    a, b = ours.cv_results_, theirs.cv_results_
    different = [] if list(a) == list(b) else [f"keys {list(a)} {list(b)}"]
    for key in b:
        if key == "params":
            equal = a[key] == b[key]
        elif "time" in key:
            continue
        elif key.startswith("param_"):
            equal = list(a[key]) == list(b[key]) and a[key].dtype == b[key].dtype
        else:
            equal = a[key].dtype == b[key].dtype and np.array_equal(a[key], b[key], equal_nan=a[key].dtype.kind == "f")
        if not equal:
            different.append(key)
    for name in ("best_index_", "best_score_", "best_params_", "n_splits_", "multimetric_"):
        our_value, their_value = getattr(ours, name, None), getattr(theirs, name, None)
        both_nan = our_value != our_value and their_value != their_value
        if our_value != their_value and not both_nan:
            different.append(name)
    return different


def compare(seed: int, **more: Any) -> tuple[str, int, int]:
    """Run both searches on the problem of a seed and compare them.

    Returns:
        "same", or the name of the exception that both searches raised; the number of trees that ForestSearchCV grew; the
        number of trees that the grid asks for.
    Raises:
        AssertionError: the two searches differ.
    """
    search, given = problem(seed)
    outcomes = []
    for cls in (GridSearchCV, ForestSearchCV):
        cv_search = cls(**search, **(more if cls is ForestSearchCV else {}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                outcomes.append(cv_search.fit(**given))
            except Exception as error:
                outcomes.append(error)
    theirs, ours = outcomes
    if isinstance(theirs, Exception) or isinstance(ours, Exception):
        # Compare only the last line of the messages: the lines before it are a traceback, with source lines of scikit-learn.
        messages = [str(error).replace(cls.__name__, "").strip().splitlines()[-1:] for error, cls in
                    ((theirs, GridSearchCV), (ours, ForestSearchCV))]
        assert type(theirs) is type(ours) and messages[0] == messages[1], f"seed {seed}: {theirs!r} against {ours!r}"
        return type(theirs).__name__, 0, 0
    different = differences(ours, theirs)
    assert not different, f"seed {seed}: {different}\n{search}"
    if search["refit"]:
        X = given["X"]
        assert np.array_equal(ours.predict(X), theirs.predict(X)), f"seed {seed}: predictions differ"
        assert ours.best_estimator_.get_params() == theirs.best_estimator_.get_params() or "random_state" in str(search)
    return "same", ours.n_trees_, ours.n_trees_asked_


if __name__ == "__main__":
    count, first = int([*sys.argv, 300][1]), int([*sys.argv, 300, 0][2]) if len(sys.argv) > 2 else 0
    began, outcomes, with_fewer_trees = time.time(), {}, 0
    for seed in range(first, first + count):
        outcome, grown, asked = compare(seed)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        with_fewer_trees += grown < asked
    print(f"{count} problems in {time.time() - began:.0f} s: {outcomes}; {with_fewer_trees} problems needed fewer trees")
