"""The task `wine`: which specs and tables it accepts, and its errors for all others."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

from trainers.contract.errors import UserError
from trainers.contract.files import read_json
from trainers.contract.paths import RunPaths
from trainers.runner import Place
from trainers.wine.config import OF_CLASSIFIERS, PARAMETERS, Data, WineConfig
from trainers.wine.table import load_table
from trainers.wine.task import Claims, Progress, Wine

UCI = '"acid";"sugar";"quality"\n7.4;0.7;5\n7.8;0.88;5\n7.4;0.7;5\n11.2;0.28;6\n7.4;0.7;6\n'


def config(**given) -> WineConfig:
    search = {"grid": {"n_estimators": [2]}, "cv": 2, **given.pop("search", {})}
    return WineConfig.model_validate({"name": "wine", "task": "trainers.wine.task:Wine", "search": search,
                                      "data": {"source": "sample", **given.pop("data", {})}, **given})


@pytest.fixture
def table(tmp_path: Path):
    def read(text: str, classes: bool = False, group: str | None = None, **data):
        (tmp_path / "t.csv").write_text(text, encoding="utf-8")
        return load_table(Data(source=str(tmp_path / "t.csv"), **data), classes, group)

    return read


# Tables


@pytest.mark.parametrize("text", [UCI, UCI.replace(";", ","), UCI.replace(";", "\t"), "\ufeff" + UCI, UCI.replace("\n", "\r\n")])
def test_ucis_file_and_its_copies(table, text):
    loaded = table(text)
    assert loaded.names == ["acid", "sugar"] and loaded.target == "quality"
    assert loaded.X.tolist()[3] == [11.2, 0.28] and loaded.y.tolist() == [5, 5, 5, 6, 6]
    groups = loaded.feature_groups.tolist()
    assert loaded.repeats == 1 and groups[0] == groups[4] != groups[1]


def test_columns_without_a_header_are_numbered(table):
    loaded = table("1,2,3\n4,5,6\n")
    assert loaded.names == ["column 1", "column 2"] and loaded.y.tolist() == [3, 6]
    assert table("1,2,3\n4,5,6\n7,8,9\n", header=True).names == ["1", "2"]


@pytest.mark.parametrize("target, name", [("acid", "acid"), (1, "acid"), ("2", "sugar"), (-1, "quality"), (-3, "acid"),
                                          (None, "quality")])
def test_the_target_is_chosen_by_name_or_number(table, target, name):
    loaded = table(UCI, target=target)
    assert loaded.target == name and len(loaded.names) == 2 and name not in loaded.names


def test_missing_values_are_counted(table):
    loaded = table("a,b,y\n1,,1\nNA,2,2\n3,?,3\n")
    assert loaded.missing == {"a": 1, "b": 2} and np.isnan(loaded.X).sum() == 3


def test_classes_may_be_words(table):
    assert table("a,y\n1,red\n2,white\n", classes=True).y.tolist() == ["red", "white"]


def test_a_column_that_groups_is_no_feature(table):
    loaded = table("a,who,y\n1,ann,1\n2,bob,2\n", group="who")
    assert loaded.names == ["a"] and loaded.group.tolist() == ["ann", "bob"]


def test_the_sample_is_diabetes():
    loaded = load_table(Data(source="sample"), classes=False)
    assert loaded.X.shape == (442, 10) and "diabetes" in loaded.what and loaded.target == "progression"


@pytest.mark.parametrize("text, given, message, hint", [
    ("a,b,y\n1,2,3\n4,high,6\n", {}, "`high` in row 2 of column `b`, a feature, is not a number", "remove the column"),
    ("a,y\n1,2\n3,low\n", {}, "`low` in row 2 of column `y`, the target, is not a number", "use a classifier"),
    ("a,y\n1,2\n3,\n", {}, "the target `y` has no value in 1 row(s), the first is row 2", "remove those rows"),
    ("a,y\n1,2\n3\n", {}, "line 3: 1 cells, but the first line has 2", "data.delimiter"),
    ("", {}, "is empty", ""),
    ("a,y\n", {}, "has no rows", ""),
    ("y\n1\n2\n", {}, "`y` is the only column", "data.delimiter"),
    ("a,a,y\n1,2,3\n", {}, "two columns are called `a`", ""),
    (UCI, {"target": "qualty"}, "has no column `qualty`", "did you mean `quality`?"),
    (UCI, {"target": 4}, "has no column `4`", "it has `acid`"),
    ("a,y\n1e300,2\n1,2\n", {}, "column `a` has a number that is too large for float32", None),
    (UCI, {"sha256": "0" * 64}, "does not match `data.sha256`", "correct `data.sha256`"),
])
def test_tables_that_are_refused(table, text, given, message, hint):
    with pytest.raises(UserError) as error:
        table(text, **given)
    assert message in error.value.message and "\n" not in str(error.value.message)
    assert hint is None or hint in (error.value.hint or "")


def test_a_url_is_checked_by_hash(tmp_path, monkeypatch):
    (tmp_path / "served").mkdir()
    (tmp_path / "served/t.csv").write_text(UCI)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/t.csv"
        given = dict(source=url, root=str(tmp_path / "kept"))
        right = hashlib.sha256(UCI.encode()).hexdigest()
        with pytest.raises(UserError, match="is not the expected file: its SHA-256 is " + right):
            load_table(Data(**given, sha256="1" * 64), False)
        assert config(data={**given, "sha256": right}).missing() == [f"{url} in {tmp_path}/kept/tables/{right[:16]}.csv"]
        assert load_table(Data(**given, sha256=right), False).y.tolist() == [5, 5, 5, 6, 6]
        assert config(data={**given, "sha256": right}).missing() == []
        server.shutdown()
    assert load_table(Data(**given, sha256=right), False).target == "quality"  # from the disk
    with pytest.raises(UserError, match="could not be downloaded"):
        load_table(Data(**given, sha256="2" * 64), False)
    assert [path.name for path in (tmp_path / "kept/tables").iterdir()] == [f"{right[:16]}.csv"]


# Specs


def test_parameters_are_scikit_learns():
    from trainers.wine.searching import ESTIMATORS

    for name, cls in ESTIMATORS.items():
        assert set(cls().get_params()) == (PARAMETERS | OF_CLASSIFIERS if name.endswith("classifier") else PARAMETERS)


@pytest.mark.parametrize("given, message, hint", [
    ({"search": {"grid": {}}}, "the grid is empty", "give lists"),
    ({"search": {"grid": {"max_depth": None}}}, "the grid is empty", "give lists"),
    ({"search": {"grid": {"max_depth": []}}}, "`search.grid.max_depth` is an empty list", "null"),
    ({"search": {"grid": {"n_estimator": [1]}}}, "`n_estimator` is not a parameter of random_forest_regressor", "`n_estimators`"),
    ({"model": {"params": {"class_weight": "balanced"}}}, "`class_weight` is not a parameter", "it has"),
    ({"search": {"refit": "r2"}}, "`search.refit` is `r2`, which is not in", "leave `search.refit` out"),
    ({"search": {"scoring": []}}, "an empty list", ""),
    ({"search": {"group": "who"}}, "`search.group` is only for search.split=grouped", "leave `search.group` out"),
    ({"search": {"split": "stratified"}}, "needs classes", "classifier"),
    ({"data": {"source": "https://example.org/t.csv"}}, "`data.sha256` is not given", "sha256sum"),
    ({"data": {"source": "/nowhere/t.csv"}}, "`/nowhere/t.csv` does not exist", "sample"),
])
def test_specs_that_are_refused(given, message, hint):
    with pytest.raises(UserError) as error:
        config(**given).check()
    assert message in error.value.message and hint in (error.value.hint or "")


@pytest.mark.parametrize("text, given, message, hint", [
    ("a,y\n1,2\n3,4\n5,6\n", {"search": {"cv": 4}}, "has 3 row(s), fewer than the 4 folds", "search.cv=3"),
    ("a,y\n1,2\n3,2\n5,2\n", {}, "the target `y` is 2 in every row", "nothing to learn"),
    (UCI, {"search": {"scoring": "r_2"}}, "`r_2` is not a score of scikit-learn", "`r2`"),
    (UCI, {"search": {"scoring": ["r2", "accuracy"]}}, "`accuracy` (`search.scoring`) is a score for classes, but "
     "random_forest_regressor predicts numbers", "use model.name=random_forest_classifier"),
    (UCI.replace(";5\n", ";.5\n"), {"search": {"scoring": "f1"}, "model": {"name": "extra_trees_regressor"}},
     "`f1` (`search.scoring`) is a score for classes", "such as r2"),
    (UCI, {"search": {"grid": {"min_samples_leaf": [0]}}}, "'min_samples_leaf' parameter", "fix `search.grid`"),
    (UCI, {"search": {"grid": {"bootstrap": [False]}}, "model": {"params": {"max_samples": 9}}}, "`bootstrap` is false", "fix"),
    (UCI, {"search": {"split": "grouped", "cv": 4}}, "there are 3 groups of rows, fewer than the 4 folds", "search.cv=3"),
    ("a,y\n1,.5\n2,1\n", {"model": {"name": "random_forest_classifier"}}, "which are not classes", "regressor"),
    ("a,y\n1,1\n2,2\n3,3\n", {"model": {"name": "random_forest_classifier"}}, "each class has fewer rows than", "cv=2"),
])
def test_specs_that_do_not_suit_the_table_are_refused(table, text, given, message, hint):
    from trainers.wine.searching import make_search

    spec = config(**given)
    with pytest.raises(UserError) as error:
        make_search(spec, table(text, classes=spec.model.classifies), 1)
    assert message in error.value.message and hint in (error.value.hint or "")


@pytest.mark.parametrize("given, message", [
    ({"search": {"scoring": ["roc_auc"]}, "model": {"name": "random_forest_classifier"}}, "`roc_auc` is not a number"),
    ({"search": {"cv": 12}}, "`r2` is not a number at any grid point: each grid point has a fold where it is undefined"),
])
@pytest.mark.filterwarnings("ignore")
def test_a_score_that_is_never_a_number_is_an_error(table, given, message):
    from trainers.wine.report import check_scores
    from trainers.wine.searching import make_search

    spec = config(**given)
    loaded = table("a,y\n" + "".join(f"{row},{row % 3 if spec.model.classifies else row * .3}\n" for row in range(12)),
                   classes=spec.model.classifies)
    search, _ = make_search(spec, loaded, 1)
    with pytest.raises(UserError) as error:
        check_scores(spec, loaded, search.fit(loaded.X, loaded.y), None)
    assert message in error.value.message and not error.value.retry and error.value.hint


@pytest.mark.filterwarnings("ignore")
def test_fits_that_all_fail_are_an_error(tmp_path):
    given = config(model={"params": {"monotonic_cst": [1, 0]}})  # ten features
    paths = RunPaths(tmp_path)
    with pytest.raises(UserError) as error:
        Wine(given).run(Place(0, 1, 1), paths, None)
    assert error.value.message.startswith("the forests cannot be fitted: ValueError: monotonic_cst has shape 2")
    assert "\n" not in error.value.message and error.value.exit_code == 2


def test_scores_for_numbers_and_for_classes():
    from sklearn.metrics import get_scorer_names

    from trainers.wine.searching import scores_numbers

    numbers = {name for name in get_scorer_names() if scores_numbers(name)}
    assert {"r2", "explained_variance", "neg_max_error", "neg_mean_gamma_deviance", "neg_mean_squared_log_error"} < numbers
    assert not numbers & {"accuracy", "balanced_accuracy", "f1", "f1_macro", "roc_auc", "precision", "neg_log_loss", "jaccard"}


def test_the_start_names_the_target_and_the_features(tmp_path, capfd):
    (tmp_path / "t.csv").write_text("sep=;\na;b;y\n" + "".join(f"{row},5;{row % 4};{row % 3}\n" for row in range(12)))
    for target, said in ((None, "`y` (the last column), a number; 2 features: `a`, `b`"),
                         ("b", "`b`, a number; 2 features: `a`, `y`")):
        run = config(data={"source": str(tmp_path / "t.csv"), "target": target}, search={"importance_repeats": 0})
        assert Wine(run).run(Place(0, 1, 1), RunPaths(tmp_path / said[1]), None) == 0
        out = capfd.readouterr().out
        assert f"target: {said}" in out and "numbers have decimal commas: `0,5` is 0.5" in out


def test_some_failed_fits_are_reported_in_one_line(tmp_path, capfd):
    table = tmp_path / "table.csv"
    table.write_text("a,y\n" + "".join(f"{row},{row % 5 - 2}\n" for row in range(20)))
    grid = {"n_estimators": [2], "criterion": ["squared_error", "poisson"]}
    given = config(data={"source": str(table)}, search={"grid": grid, "cv": 2, "scoring": "neg_mean_squared_error"})
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert Wine(given).run(Place(0, 1, 1), RunPaths(tmp_path), None) == 0
    output = "".join([*capfd.readouterr(), *(str(warning.message) for warning in warned)])
    assert "2 of 4 fits failed: ValueError: Some value(s) of y are negative" in output and "Traceback" not in output


@pytest.mark.filterwarnings("ignore")
def test_a_failed_fit_at_each_grid_point_is_an_error(tmp_path):
    table = tmp_path / "table.csv"  # the targets of the second half sum to 0, which the criterion poisson refuses
    table.write_text("a,y\n" + "".join(f"{row},{max(0, 10 - row)}\n" for row in range(20)))
    given = config(data={"source": str(table)}, search={"grid": {"n_estimators": [2], "criterion": ["poisson"]}, "cv": 2})
    with pytest.raises(UserError) as error:
        Wine(given).run(Place(0, 1, 1), RunPaths(tmp_path), None)
    assert "no grid point can be fitted and scored on all folds: 1 of 2 fits failed: ValueError: Sum" in error.value.message
    assert "search.grid" in error.value.hint


@pytest.mark.filterwarnings("ignore")
def test_broken_pieces_do_not_count_as_finished(tmp_path):
    from trainers.forest.kept import Kept
    from trainers.wine.searching import make_search

    given, paths, place = config(), RunPaths(tmp_path), Place(0, 1, 1)
    loaded = load_table(given.data, False)
    work = make_search(given, loaded, 1)[0].prepare(loaded.X, loaded.y)
    kept = Kept(paths.pieces)
    for _ in work.results(kept=kept):
        pass
    assert Progress(work, kept, paths, None, place).update()
    broken = next(paths.pieces.iterdir())
    whole = broken.read_text()
    broken.write_text(whole[:-20])
    progress = Progress(work, kept, paths, None, place)
    assert not progress.update() and progress.fits == 1
    broken.write_text(whole)
    assert progress.update()


def test_a_search_is_not_resumed_with_another_table(tmp_path):
    paths, tables = RunPaths(tmp_path / "run"), [tmp_path / name for name in ("a.csv", "moved.csv", "other.csv")]
    for table, offset in zip(tables, (0, 0, 1)):
        table.write_text("a,y\n" + "".join(f"{row},{row % 5 + offset}\n" for row in range(20)))
    first, moved, other = (config(data={"source": str(table)}, search={"importance_repeats": 0}) for table in tables)
    assert Wine(first).run(Place(0, 1, 1), paths, None) == 0
    paths.changes.write_text("{}")  # a resumption says where the table lies
    assert Wine(moved).run(Place(0, 1, 1), paths, None) == 0
    with pytest.raises(UserError, match="none of the [0-9]+ finished pieces of this search belongs to this table"):
        Wine(other).run(Place(0, 1, 1), paths, None)


def test_ranks_started_by_hand_share_the_pieces_at_any_time(tmp_path):
    keys = [f"0-{number:016x}" for number in range(7)]
    ranks = [Claims(RunPaths(tmp_path), None, Place(rank, 3, 1), keys) for rank in range(3)]
    for late in (0, 2):  # a later rank finds kept pieces, which it does not ask for
        taken = [key for rank, mine in enumerate(ranks) for key in keys[late * rank:] if mine(key)]
        assert len(taken) == len(set(taken)) and set(keys[4:]) <= set(taken)


def test_folds_of_each_kind(table):
    from trainers.wine.searching import make_search

    loaded = table(UCI)
    for split, kind in (("plain", int), ("shuffled", "KFold"), ("grouped", "GroupKFold")):
        search, given = make_search(config(search={"split": split}), loaded, 1)
        assert isinstance(search.cv, kind) if isinstance(kind, type) else type(search.cv).__name__ == kind
        assert ("groups" in given) == (split == "grouped")
    search, _ = make_search(config(search={"scoring": ["r2", "neg_max_error"]}), loaded, 3)
    assert search.refit == "r2" and search.n_jobs == 3


@pytest.mark.filterwarnings("ignore")
def test_scores_under_other_folds_and_the_importance_are_scikit_learns(tmp_path):
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance
    from sklearn.model_selection import GroupKFold, KFold, cross_val_score

    rng = np.random.default_rng(0)
    X = rng.integers(0, 4, size=(40, 2)).astype(float)  # rows repeat
    y = X[:, 0] + rng.integers(0, 3, size=40)
    lines = [f"{a:g},{b:g},{target:g}" for (a, b), target in zip(X, y)]
    (tmp_path / "t.csv").write_text("\n".join(["a,b,y", *lines, ""]))
    given = config(data={"source": str(tmp_path / "t.csv")}, model={"params": {"random_state": 0}},
                   search={"cv": 3, "seed": 5, "grid": {"n_estimators": [3], "min_samples_leaf": [2]}})
    paths = RunPaths(tmp_path / "run")
    assert Wine(given).run(Place(0, 1, 1), paths, None) == 0
    results = read_json(paths.root / "results.json")
    forest = RandomForestRegressor(3, min_samples_leaf=2, random_state=0)
    for key, split in (("random", KFold(3, shuffle=True, random_state=5)),
                       ("grouped", GroupKFold(3, shuffle=True, random_state=5))):
        scores = cross_val_score(forest, X, y, groups=load_table(given.data, False).feature_groups, cv=split)
        assert results["folds"][key] == {"mean": scores.mean(), "std": scores.std(), "scores": scores.tolist()}
    falls = permutation_importance(forest.fit(X, y), X, y, n_repeats=10, random_state=5)
    assert {row["feature"]: (row["mean"], row["std"]) for row in results["importance"]} == dict(
        zip("ab", zip(falls.importances_mean, falls.importances_std)))
    assert sorted(path.name for path in paths.figures.iterdir()) == ["heat_map.png", "importance.png", "n_estimators.png"]
