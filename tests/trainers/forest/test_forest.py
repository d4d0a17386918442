"""The library trainers.forest: ForestSearchCV gives the numbers of GridSearchCV for less work."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from forests.random_grids import compare, differences, own_score
from sklearn.base import clone
from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import Ridge
from sklearn.metrics import fbeta_score, make_scorer
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from trainers.forest import ForestSearchCV, load_forest, save_forest
from trainers.forest.equivalence import family, features, least_rows, prefix, same_under_limit, why_plain
from trainers.forest.kept import Kept

GRID = {"n_estimators": [2, 5, 9], "min_samples_leaf": [1, 2], "min_samples_split": [2, 4]}
PROBLEMS = int(os.environ.get("FOREST_PROBLEMS", 40))


@pytest.fixture(scope="module")
def table() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = np.round(rng.normal(size=(90, 5)), 1)
    return X, X[:, 0] * 2 + X[:, 1] ** 2 + rng.normal(size=90)


def both(table, estimator, grid=GRID, **options):
    """Fit both searches to a table."""
    ours, theirs = ForestSearchCV(estimator, grid, **options), GridSearchCV(estimator, grid, **options)
    return ours.fit(*table), theirs.fit(*table)


# Exactness


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, PROBLEMS, 20))
def test_random_small_problems_have_the_same_results(first):
    """FOREST_PROBLEMS=300 tests 300 problems."""
    outcomes = [compare(seed) for seed in range(first, min(first + 20, PROBLEMS))]
    assert sum(kind == "same" for kind, *_ in outcomes) > len(outcomes) / 2
    assert sum(grown < asked for _, grown, asked in outcomes) > len(outcomes) / 5


def test_a_small_version_of_the_wine_grid_grows_fewer_trees(table):
    ours, theirs = both(table, RandomForestRegressor(random_state=0), return_train_score=True)
    assert differences(ours, theirs) == []
    # With leaves of 2 rows, min_samples_split 2 and 4 mean the same. So each fold has 3 forests of 9 trees, 27 trees.
    # GridSearchCV grows 4 times 2 + 5 + 9 trees, 64 trees.
    assert (ours.n_trees_, ours.n_trees_asked_) == (5 * 3 * 9, 5 * 4 * 16)
    assert np.array_equal(ours.predict(table[0]), theirs.predict(table[0]))
    assert ours.best_estimator_.n_jobs is None


@pytest.mark.slow
def test_several_processes_give_the_same_results(table):
    single, _ = both(table, RandomForestRegressor(random_state=0))
    parallel = ForestSearchCV(RandomForestRegressor(random_state=0), GRID, n_jobs=2).fit(*table)
    assert differences(parallel, single) == []


def test_several_threads_in_a_piece_give_the_same_results(table):
    """A piece uses several threads if there are fewer pieces than cores."""
    grid = {"n_estimators": [3, 7]}
    ours = ForestSearchCV(RandomForestRegressor(random_state=0), grid, cv=2, n_jobs=5).fit(*table)
    theirs = GridSearchCV(RandomForestRegressor(random_state=0), grid, cv=2).fit(*table)
    assert differences(ours, theirs) == []


def test_folds_mapped_from_files_give_the_same_results():
    """The table is large enough for its folds to be written to files."""
    rng = np.random.default_rng(1)
    X = rng.normal(size=(30000, 12))
    y = (X[:, 0] > 0).astype(int)
    options = dict(cv=2, scoring=["accuracy", "neg_log_loss"], refit="accuracy")
    grid = {"n_estimators": [1, 2], "max_depth": [2, 3]}
    ours, theirs = both((X, y), RandomForestClassifier(random_state=0), grid, **options)
    assert differences(ours, theirs) == []


def test_sample_weights_and_groups_give_the_same_results(table):
    from sklearn.model_selection import GroupKFold

    X, y = table
    given = {"sample_weight": np.arange(90) % 3 + 1.0, "groups": np.arange(90) % 7}
    searches = [cls(RandomForestRegressor(random_state=0), GRID, cv=GroupKFold(3)).fit(X, y, **given)
                for cls in (ForestSearchCV, GridSearchCV)]
    assert differences(*searches) == []


# The shortcuts


def test_fewest_rows_of_leaves_and_splits():
    assert least_rows(4, 2, 100) == (4, 8)
    assert least_rows(1, 11, 100) == (1, 11)
    assert least_rows(0.05, 0.2, 99) == (5, 20)  # both rounded up
    assert least_rows(1, 0.001, 99) == (1, 2)
    assert least_rows(np.int64(2), 1.0, 30) == (2, 30)


def test_features_of_a_split():
    values = (None, "sqrt", "log2", 4, 0.5, 0.01, 1.0, np.int64(2))
    assert [features(value, 10) for value in values] == [10, 3, 3, 4, 5, 1, 10, 2]


def test_forests_of_one_family_have_the_same_hash(table):
    def name(rows=100, columns=9, **params):
        return family(RandomForestRegressor(random_state=0, **params), rows, columns)

    assert name(n_estimators=3, max_depth=2) == name(n_estimators=5)
    assert name(max_features="sqrt") == name(max_features=3) == name(max_features=0.34) != name(max_features=2)
    assert name(min_samples_leaf=0.05) == name(min_samples_leaf=5) == name(min_samples_leaf=5, min_samples_split=10)
    assert name(min_samples_leaf=0.05, rows=120) != name(min_samples_leaf=5, rows=120)
    assert name(bootstrap=True) != name(bootstrap=False)
    assert name() != family(RandomForestRegressor(random_state=1), 100, 9)


@pytest.mark.parametrize("forest, reason", [
    (RandomForestRegressor(), "random_state is not an integer"),
    (RandomForestRegressor(random_state=np.random.RandomState(0)), "random_state is not an integer"),
    (RandomForestRegressor(random_state=0, n_jobs=2), "its trees are added up in no fixed order"),
    (RandomForestRegressor(random_state=0, oob_score=True), "oob_score"),
    (RandomForestRegressor(random_state=0, warm_start=True), "warm_start"),
    (RandomForestRegressor(random_state=0, min_samples_leaf=0), "not allowed"),
    (Ridge(), "Ridge is not one of"),
    (type("Own", (RandomForestRegressor,), {})(random_state=0), "Own is not one of"),
])
def test_forests_without_shortcuts(forest, reason):
    assert reason in why_plain(forest)
    assert why_plain(RandomForestRegressor(random_state=np.int32(0), n_jobs=1)) is None


def test_a_depth_limit_at_the_deepest_tree_is_another_forest(table):
    """A limit equal to the deepest tree can change a forest. This was first seen on 600 rows of four values."""
    rng = np.random.default_rng(0)
    X, y = rng.integers(0, 3, size=(300, 6)).astype(float), rng.normal(size=300)
    changed = 0
    for seed in range(12):
        free = RandomForestRegressor(8, random_state=seed, max_features=2).fit(X, y)
        deepest = max(tree.tree_.max_depth for tree in free.estimators_)
        above = clone(free).set_params(max_depth=deepest + 1).fit(X, y)
        assert same_under_limit(free, 8, deepest + 1) and np.array_equal(above.predict(X), free.predict(X))
        assert not same_under_limit(free, 8, deepest)
        at = clone(free).set_params(max_depth=deepest).fit(X, y)
        changed += not np.array_equal(at.predict(X), free.predict(X))
    assert changed
    assert not same_under_limit(RandomForestRegressor(2, random_state=0, ccp_alpha=0.1).fit(X, y), 2, 10**6)


def test_the_first_trees_are_the_smaller_forest(table):
    X, y = table
    y = (y > 0).astype(int)
    for cls in (RandomForestClassifier, ExtraTreesClassifier):
        large = cls(9, random_state=3).fit(X, y)
        small = cls(4, random_state=3).fit(X, y)
        assert np.array_equal(prefix(large, 4).predict_proba(X), small.predict_proba(X))
        assert prefix(large, 4).get_params() == small.get_params() and len(large.estimators_) == 9


@pytest.mark.parametrize("options, reason", [
    (dict(estimator=RandomForestRegressor(), scoring="r2"), "random_state is not an integer"),
    (dict(estimator=RandomForestRegressor(random_state=0), scoring=own_score), "may read more of a forest"),
])
def test_plain_fits_are_announced_with_their_reason(table, options, reason):
    with pytest.warns(UserWarning, match=f"2 of 2 candidates are fitted one by one.*{reason}"):
        search = ForestSearchCV(param_grid={"n_estimators": [1, 2]}, cv=2, **options).fit(*table)
    assert search.n_trees_ == search.n_trees_asked_ == 2 * 3


def test_any_other_estimator_is_fitted_plainly(table):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = make_pipeline(FunctionTransformer(lambda X: X + 1), StandardScaler(), Ridge())  # a lambda cannot be pickled
        ours, theirs = both(table, pipeline, {"ridge__alpha": [0.1, 1.0]})
    assert differences(ours, theirs) == []


# scikit-learn's interface


def test_it_is_an_estimator(table):
    X, y = table
    search = ForestSearchCV(RandomForestRegressor(random_state=0), {"n_estimators": [2, 3]}, cv=3)
    copy = clone(search)
    assert copy.get_params()["estimator__random_state"] == 0 and copy is not search
    pipeline = make_pipeline(StandardScaler(), search).fit(X, y)
    assert pipeline.predict(X).shape == y.shape and pipeline.score(X, y) > 0.5
    assert np.array_equal(pickle.loads(pickle.dumps(pipeline)).predict(X), pipeline.predict(X))
    assert "ForestSearchCV(" in repr(search)


@pytest.mark.slow
def test_it_passes_the_checks_of_scikit_learn():
    """It may fail only checks that GridSearchCV fails too."""
    def failures(cls) -> set[str]:
        search = cls(RandomForestRegressor(n_estimators=3, random_state=0), {"min_samples_leaf": [1, 2]}, cv=2)
        failed = set()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for estimator, check in estimator_checks_generator(search):
                name = getattr(check, "func", check).__name__
                try:
                    check(estimator)
                except Exception:
                    failed.add(name)
        return failed

    assert failures(ForestSearchCV) <= failures(GridSearchCV)


# Pieces that are kept


def test_kept_pieces_are_not_fitted_again(table, tmp_path):
    given = dict(estimator=RandomForestRegressor(random_state=0), param_grid=GRID, cv=3, scoring=["r2", "neg_max_error"],
                 refit="r2", return_train_score=True)
    theirs = GridSearchCV(**given).fit(*table)
    ours = ForestSearchCV(**given, keep_in=tmp_path).fit(*table)
    assert differences(ours, theirs) == [] and ours.n_trees_ == 3 * 3 * 9
    files = sorted(tmp_path.iterdir())
    assert len(files) == 9
    again = ForestSearchCV(**given, keep_in=tmp_path).fit(*table)
    assert differences(again, theirs) == [] and again.n_trees_ == 0
    files[0].unlink()
    files[1].write_text(files[1].read_text()[:-20])
    again = ForestSearchCV(**given, keep_in=str(tmp_path)).fit(*table)
    assert differences(again, theirs) == [] and again.n_trees_ == 2 * 9


@pytest.mark.parametrize("change", ["a value", "a row's place", "the folds", "the score", "the scores", "the seed", "the grid"])
def test_kept_pieces_of_another_search_are_not_used(table, tmp_path, change):
    X, y = table
    given = dict(estimator=RandomForestRegressor(random_state=0), param_grid={"n_estimators": [2, 3]}, cv=2, scoring="r2")
    ForestSearchCV(**given, keep_in=tmp_path).fit(X, y)
    match change:
        case "a value":
            X = X.copy()
            X[3, 1] += 1e-9
        case "a row's place":
            X, y = np.roll(X, 1, axis=0), np.roll(y, 1)
        case "the folds":
            given["cv"] = 3
        case "the score":
            given["scoring"] = "neg_mean_absolute_error"
        case "the scores":  # another score under the same name
            ForestSearchCV(**{**given, "scoring": {"a": "r2"}, "refit": "a"}, keep_in=tmp_path).fit(X, y)
            given |= {"scoring": {"a": "neg_max_error"}, "refit": "a"}
        case "the seed":
            given["estimator"] = RandomForestRegressor(random_state=1)
        case "the grid":
            given["param_grid"] = {"n_estimators": [2, 4]}
    search = ForestSearchCV(**given, keep_in=tmp_path).fit(X, y)
    assert differences(search, GridSearchCV(**given).fit(X, y)) == []
    assert search.n_trees_ == search.n_splits_ * max(given["param_grid"]["n_estimators"])


def test_a_new_function_or_class_of_the_same_name_has_other_keys(table, tmp_path):
    """For example after a cell of a notebook is run again, or a file is edited."""
    def scorer(sign: int):
        def own(y, predicted):
            return sign * float(np.mean(np.abs(y - predicted)))
        return make_scorer(own)

    def estimator(shift: float):
        class Own(Ridge):
            def predict(self, X):
                return super().predict(X) + shift
        return Own()

    def fit(estimator, **given):
        return ForestSearchCV(estimator, cv=2, keep_in=tmp_path, **given).fit(*table)

    grid, forest, first = {"n_estimators": [2]}, RandomForestRegressor(random_state=0), scorer(1)
    found = fit(forest, param_grid=grid, scoring=first)
    assert fit(forest, param_grid=grid, scoring=first).n_trees_ == 0
    assert fit(forest, param_grid=grid, scoring=scorer(-1)).best_score_ == -found.best_score_
    grid = {"alpha": [1.0]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of plain fits
        assert fit(estimator(0.0), param_grid=grid).best_score_ != fit(estimator(9.0), param_grid=grid).best_score_


def test_arguments_of_a_score_change_the_key(table, tmp_path):
    y = (table[1] > np.median(table[1])).astype(int)
    given = dict(param_grid={"n_estimators": [3]}, cv=2, keep_in=tmp_path)
    searches = [ForestSearchCV(RandomForestClassifier(random_state=0), scoring=make_scorer(fbeta_score, beta=beta), **given).fit(
        table[0], y) for beta in (0.1, 0.1, 9.0)]
    assert [search.n_trees_ > 0 for search in searches] == [True, False, True]


def test_pieces_with_numpy_numbers_are_kept(table, tmp_path):
    grid = {"n_estimators": np.arange(2, 4), "max_depth": np.arange(2, 4)}
    given = dict(estimator=RandomForestRegressor(random_state=0), param_grid=grid, cv=2)
    theirs = GridSearchCV(**given).fit(*table)
    for trees in (2 * 2 * 3, 0):
        ours = ForestSearchCV(**given, keep_in=tmp_path).fit(*table)
        assert differences(ours, theirs) == [] and ours.n_trees_ == trees and ours.n_trees_asked_ == 20


def test_plain_fits_with_numpy_numbers_are_kept(table, tmp_path):
    given = dict(param_grid={"n_estimators": np.arange(2, 4)}, cv=2, keep_in=tmp_path)
    for trees in (10, 0):
        with pytest.warns(UserWarning, match="fitted one by one"):
            assert ForestSearchCV(RandomForestRegressor(), **given).fit(*table).n_trees_ == trees


@pytest.mark.parametrize("kind", [list, tuple, np.asarray, lambda rows: rows])
def test_folds_given_as_any_kind_of_rows(table, kind):
    half = len(table[0]) // 2
    first, second = range(half), range(half, 2 * half)
    cv = [(kind(first), kind(second)), (kind(second), kind(first))]
    given = dict(estimator=RandomForestRegressor(random_state=0), param_grid={"n_estimators": [2, 3]})
    theirs = GridSearchCV(**given, cv=[(np.asarray(train), np.asarray(test)) for train, test in cv]).fit(*table)
    assert differences(ForestSearchCV(**given, cv=cv).fit(*table), theirs) == []


def test_scores_are_kept_to_the_last_bit(tmp_path):
    kept = Kept(tmp_path)
    scores = {"a": 0.1 + 0.2, "b": float("nan"), "c": float("-inf"), "d": -5e-324, "e": np.float64(1) / 3}
    kept.write("x", {4: {"test_scores": scores, "fit_error": None}, 7: {"test_scores": 2.5}}, 3, 0.1)
    results = kept.read("x")
    assert {key: np.float64(value).tobytes() for key, value in results[4]["test_scores"].items()} == {
        key: np.float64(value).tobytes() for key, value in scores.items()}
    assert results[7] == {"test_scores": 2.5} and kept.read("y") is None and kept.keys() == {"x"}


def test_failed_fits_are_reported_as_by_gridsearchcv(table):
    """Half of the grid cannot be fitted."""
    grid = {"bootstrap": [True, False], "max_samples": [0.5], "n_estimators": [2]}
    with pytest.warns(Warning) as ours:
        search = ForestSearchCV(RandomForestRegressor(random_state=0), grid, cv=2).fit(*table)
    with pytest.warns(Warning) as theirs:
        expected = GridSearchCV(RandomForestRegressor(random_state=0), grid, cv=2).fit(*table)
    assert differences(search, expected) == []
    assert {warning.category for warning in ours} == {warning.category for warning in theirs}
    with pytest.raises(ValueError, match="max_sample"):
        ForestSearchCV(RandomForestRegressor(random_state=0), grid, cv=2, error_score="raise").fit(*table)


# The saved model


@pytest.mark.parametrize("cls, labels", [(RandomForestRegressor, None), (RandomForestClassifier, ["x", "yy", "z"]),
                                         (ExtraTreesClassifier, [3, 5, 8])])
def test_a_saved_forest_predicts_the_same(table, tmp_path, cls, labels):
    X, y = table
    X = X.copy()
    if "Random" in cls.__name__:
        X[np.random.default_rng(0).random(X.shape) < 0.1] = np.nan
    y = y if labels is None else np.array(labels)[np.digitize(y, [0, 2])]
    forest = cls(7, random_state=0).fit(X, y)
    save_forest(forest, tmp_path / "model.npz", {"target": "t"})
    loaded = load_forest(tmp_path / "model.npz")
    assert np.array_equal(loaded.predict(X), forest.predict(X)) and loaded.about == {"target": "t"}
    if labels is not None:
        assert np.array_equal(loaded.predict_proba(X), forest.predict_proba(X))
    with pytest.raises(ValueError, match="3 columns|90 x 3"):
        loaded.predict(X[:, :3])
    assert [path.name for path in tmp_path.iterdir()] == ["model.npz"]


def test_a_file_that_is_not_a_saved_forest(tmp_path):
    file = tmp_path / "model.npz"
    np.savez(file, header=np.array([os.getcwd()], dtype=object))
    with pytest.raises(ValueError, match="is not a saved forest"):
        load_forest(file)
    file.write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="is not a saved forest"):
        load_forest(file)


def test_the_library_does_not_import_launch():
    code = ("import sys, trainers.forest; heavy = {'launch', 'torch', 'pydantic', 'wandb'};"
            "assert not heavy & {name.partition('.')[0] for name in sys.modules}")
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=Path(__file__).parents[3])
