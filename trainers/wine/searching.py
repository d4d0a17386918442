"""Makes a search from a spec and a table: the estimator, the folds, the scores. Checks that the spec suits the table."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from sklearn.dummy import DummyRegressor
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor, RandomForestClassifier, RandomForestRegressor
from sklearn.metrics import get_scorer, get_scorer_names
from sklearn.model_selection import GroupKFold, KFold, ParameterGrid, StratifiedKFold

from trainers.config.nearest import nearest_keys
from trainers.contract.errors import UserError
from trainers.contract.text import either
from trainers.forest import ForestSearchCV
from trainers.wine.config import WineConfig
from trainers.wine.table import Table

ESTIMATORS = {
    "random_forest_regressor": RandomForestRegressor,
    "random_forest_classifier": RandomForestClassifier,
    "extra_trees_regressor": ExtraTreesRegressor,
    "extra_trees_classifier": ExtraTreesClassifier,
}


def make_search(config: WineConfig, table: Table, cores: int) -> tuple[ForestSearchCV, dict[str, Any]]:
    """Return (the search, the arguments of its `prepare` besides X and y).

    Raises:
        UserError: the spec does not suit the table.
    """
    search = config.search
    check(config, table)
    estimator = ESTIMATORS[config.model.name](**config.model.params)
    grids = search.grids
    given: dict[str, Any] = {}
    folds: Any = search.cv
    match search.split:
        case "shuffled":
            folds = KFold(search.cv, shuffle=True, random_state=search.seed)
        case "stratified":
            folds = StratifiedKFold(search.cv, shuffle=True, random_state=search.seed)
        case "grouped":
            folds = GroupKFold(search.cv)
            given["groups"] = table.feature_groups if table.group is None else table.group
    refit = (search.refit or search.scores[0]) if isinstance(search.scoring, list) else True
    forest_search = ForestSearchCV(estimator, grids[0] if len(grids) == 1 else grids, scoring=search.scoring, n_jobs=cores,
                                   refit=refit, cv=folds, return_train_score=search.return_train_score)
    return forest_search, given


def check(config: WineConfig, table: Table) -> None:
    """Check that the spec suits the table. Raises: UserError if not."""
    search, rows = config.search, len(table.X)
    if rows < search.cv:
        raise UserError(f"{table.what} has {rows} row(s), fewer than the {search.cv} folds (`search.cv`)",
                        f"use search.cv={rows} or less" if rows > 1 else "a search needs at least two rows")
    if len(np.unique(table.y)) == 1:
        raise UserError(f"the target `{table.target}` is {table.y[0]:g} in every row" if table.y.dtype.kind == "f" else
                        f"the target `{table.target}` is `{table.y[0]}` in every row",
                        "there is nothing to learn: choose another column with data.target=NAME, or its number")
    if config.model.classifies and table.y.dtype.kind == "f" and np.any(table.y % 1):
        raise UserError(f"the target `{table.target}` has values such as {table.y[table.y % 1 != 0][0]:g}, which are not classes",
                        "use a regressor (model.name=random_forest_regressor), or another target")
    for score in search.scores:
        if score not in get_scorer_names():
            near = nearest_keys(score, get_scorer_names())
            raise UserError(f"`{score}` is not a score of scikit-learn (`search.scoring`)",
                            f"did you mean {either(f'`{name}`' for name in near)}?" if near else
                            "sklearn.metrics.get_scorer_names() lists them")
        if not config.model.classifies and not scores_numbers(score):
            classifier = config.model.name.replace("regressor", "classifier")
            whole = table.y.dtype.kind == "f" and not np.any(table.y % 1)
            raise UserError(f"`{score}` (`search.scoring`) is a score for classes, but {config.model.name} predicts numbers",
                            f"use model.name={classifier}" if whole else "use a score for numbers, such as r2")
    if search.split == "grouped":
        groups = len(np.unique(table.feature_groups if table.group is None else table.group))
        if groups < search.cv:
            raise UserError(f"there are {groups} groups of rows, fewer than the {search.cv} folds (`search.cv`)",
                            f"use search.cv={groups} or less" if groups > 1 else
                            "all rows are in one group: use another `search.split` or `search.group`")
    if config.model.classifies and search.split in ("plain", "stratified"):
        classes, counts = np.unique(table.y, return_counts=True)
        if counts.max() < search.cv:
            raise UserError(f"each class has fewer rows than there are folds, {search.cv} (`search.cv`)",
                            f"use search.cv={max(2, counts.max())} or less")
    _check_values(config)


def scores_numbers(score: str) -> bool:
    """Return whether a score of scikit-learn can be computed from predicted numbers that are not classes."""
    rows, y = np.zeros((2, 1)), np.array([1.0, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            get_scorer(score)(DummyRegressor(strategy="constant", constant=1.5).fit(rows, y), rows, y)
        except (ValueError, AttributeError):
            return False
    return True


def _check_values(config: WineConfig) -> None:
    """Refuse values that scikit-learn does not allow, before the first fit. GridSearchCV would give them the score nan."""
    cls = ESTIMATORS[config.model.name]
    for values in ParameterGrid(config.search.grids):
        forest = cls(**{**config.model.params, **values})
        try:
            forest._validate_params()
            if not forest.bootstrap and (forest.max_samples is not None or forest.oob_score):
                name = "max_samples" if forest.max_samples is not None else "oob_score"
                raise ValueError(f"`{name}` is set, but `bootstrap` is false: `{name}` needs bootstrap samples")
        except ValueError as error:
            raise UserError(" ".join(str(error).split()), f"fix `search.grid` or `model.params`: {values}") from error
