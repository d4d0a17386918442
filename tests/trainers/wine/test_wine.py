"""The forest search as a task: what its spec and its table may be, and what is said of what they may not."""

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
    found = table(text)
    assert found.names == ["acid", "sugar"] and found.target == "quality"
    assert found.X.tolist()[3] == [11.2, 0.28] and found.y.tolist() == [5, 5, 5, 6, 6]
    assert found.repeats == 1 and found.alike.tolist()[0] == found.alike.tolist()[4] != found.alike.tolist()[1]


def test_without_a_header(table):
    found = table("1,2,3\n4,5,6\n")
    assert found.names == ["column 1", "column 2"] and found.y.tolist() == [3, 6]
    assert table("1,2,3\n4,5,6\n7,8,9\n", header=True).names == ["1", "2"]


@pytest.mark.parametrize("target, name", [("acid", "acid"), (1, "acid"), ("2", "sugar"), (-1, "quality"), (-3, "acid"),
                                          (None, "quality")])
def test_another_target(table, target, name):
    found = table(UCI, target=target)
    assert found.target == name and len(found.names) == 2 and name not in found.names


def test_missing_values_are_counted(table):
    found = table("a,b,y\n1,,1\nNA,2,2\n3,?,3\n")
    assert found.missing == {"a": 1, "b": 2} and np.isnan(found.X).sum() == 3


def test_classes_may_be_words(table):
    assert table("a,y\n1,red\n2,white\n", classes=True).y.tolist() == ["red", "white"]


def test_a_column_that_groups_is_no_feature(table):
    found = table("a,who,y\n1,ann,1\n2,bob,2\n", group="who")
    assert found.names == ["a"] and found.group.tolist() == ["ann", "bob"]


def test_the_sample_is_diabetes():
    found = load_table(Data(source="sample"), classes=False)
    assert found.X.shape == (442, 10) and "diabetes" in found.what and found.target == "progression"


@pytest.mark.parametrize("text, given, said, hint", [
    ("a,b,y\n1,2,3\n4,high,6\n", {}, "`high` in row 2 of column `b`, a feature, is no number", "remove the column"),
    ("a,y\n1,2\n3,low\n", {}, "`low` in row 2 of column `y`, the target, is no number", "a classifier predicts text"),
    ("a,y\n1,2\n3,\n", {}, "the target `y` has no value in 1 row(s), the first is row 2", "remove those rows"),
    ("a,y\n1,2\n3\n", {}, "line 3: 1 cells, where the first line has 2", "data.delimiter"),
    ("", {}, "is empty", ""),
    ("a,y\n", {}, "has no rows", ""),
    ("y\n1\n2\n", {}, "`y` is its only column", "data.delimiter"),
    ("a,a,y\n1,2,3\n", {}, "two columns are called `a`", ""),
    (UCI, {"target": "qualty"}, "has no column `qualty`", "did you mean `quality`?"),
    (UCI, {"target": 4}, "has no column `4`", "it has `acid`"),
    ("a,y\n1e300,2\n1,2\n", {}, "column `a` has a number that float32", None),
    (UCI, {"sha256": "0" * 64}, "is another file than `data.sha256` says", "mend"),
])
def test_tables_that_are_refused(table, text, given, said, hint):
    with pytest.raises(UserError) as error:
        table(text, **given)
    assert said in error.value.message and "\n" not in str(error.value.message)
    assert hint is None or hint in (error.value.hint or "")


def test_text_that_is_not_utf8_far_into_a_table(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"a,who,y\n" + b"1,ann,2\n" * 3000 + b"1,Ren\xe9,2\n" * 2 + b"1,ann,2\n" * 3000)
    with pytest.raises(UserError, match="is no text in UTF-8: byte 0xe9, after line"):
        load_table(Data(source=str(tmp_path / "t.csv")), classes=False)


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
        with pytest.raises(UserError, match="is another file than expected: its SHA-256 is " + right):
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


@pytest.mark.parametrize("given, said, hint", [
    ({"search": {"grid": {}}}, "the grid is empty", "give lists"),
    ({"search": {"grid": {"max_depth": None}}}, "the grid is empty", "give lists"),
    ({"search": {"grid": {"max_depth": []}}}, "`search.grid.max_depth` is an empty list", "null"),
    ({"search": {"grid": {"n_estimator": [1]}}}, "`n_estimator` is no parameter of random_forest_regressor", "`n_estimators`"),
    ({"model": {"params": {"class_weight": "balanced"}}}, "`class_weight` is no parameter", "it has"),
    ({"search": {"refit": "r2"}}, "`search.refit` is `r2`, which is none of", "leave it out"),
    ({"search": {"scoring": []}}, "an empty list", ""),
    ({"search": {"group": "who"}}, "`search.group` is of search.split=grouped alone", ""),
    ({"search": {"split": "stratified"}}, "needs classes", "classifier"),
    ({"data": {"source": "https://example.org/t.csv"}}, "`data.sha256` is not given", "sha256sum"),
    ({"data": {"source": "/nowhere/t.csv"}}, "`/nowhere/t.csv` is not there", "sample"),
])
def test_specs_that_are_refused(given, said, hint):
    with pytest.raises(UserError) as error:
        config(**given).check()
    assert said in error.value.message and hint in (error.value.hint or "")


@pytest.mark.parametrize("text, given, said, hint", [
    ("a,y\n1,2\n3,4\n5,6\n", {"search": {"cv": 4}}, "has 3 row(s), fewer than the 4 folds", "search.cv=3"),
    ("a,y\n1,2\n3,2\n5,2\n", {}, "the target `y` is 2 in every row", "nothing to learn"),
    (UCI, {"search": {"scoring": "r_2"}}, "`r_2` is no score of scikit-learn", "`r2`"),
    (UCI, {"search": {"grid": {"min_samples_leaf": [0]}}}, "'min_samples_leaf' parameter", "mend `search.grid`"),
    (UCI, {"search": {"grid": {"bootstrap": [False]}}, "model": {"params": {"max_samples": 9}}}, "`bootstrap` is false", "mend"),
    (UCI, {"search": {"split": "grouped", "cv": 4}}, "there are 3 groups of rows, fewer than the 4 folds", "search.cv=3"),
    ("a,y\n1,.5\n2,1\n", {"model": {"name": "random_forest_classifier"}}, "which are no classes", "regressor"),
    ("a,y\n1,1\n2,2\n3,3\n", {"model": {"name": "random_forest_classifier"}}, "no class has as many rows", "cv=2"),
])
def test_what_does_not_fit_the_table_is_refused(table, text, given, said, hint):
    from trainers.wine.searching import make_search

    made = config(**given)
    with pytest.raises(UserError) as error:
        make_search(made, table(text, classes=made.model.classifies), 1)
    assert said in error.value.message and hint in (error.value.hint or "")


@pytest.mark.parametrize("given, said", [
    ({"search": {"scoring": "accuracy"}}, "the score `accuracy` is no number at any grid point: continuous is not supported"),
    ({"search": {"scoring": ["roc_auc"]}, "model": {"name": "random_forest_classifier"}}, "`roc_auc` is no number"),
    ({"search": {"cv": 12}}, "`r2` is no number at any grid point: each grid point has a fold where it is undefined"),
])
@pytest.mark.filterwarnings("ignore")
def test_a_score_that_is_never_a_number_is_an_error(table, given, said):
    from trainers.wine.report import check_scores
    from trainers.wine.searching import make_search

    made = config(**given)
    read = table("a,y\n" + "".join(f"{row},{row % 3 if made.model.classifies else row * .3}\n" for row in range(12)),
                 classes=made.model.classifies)
    search, _ = make_search(made, read, 1)
    with pytest.raises(UserError) as error:
        check_scores(made, read, search.fit(read.X, read.y), None)
    assert said in error.value.message and not error.value.retry and error.value.hint


@pytest.mark.filterwarnings("ignore")
def test_fits_that_all_fail_are_an_error(tmp_path):
    given = config(model={"params": {"monotonic_cst": [1, 0]}})  # ten features
    paths = RunPaths(tmp_path)
    with pytest.raises(UserError) as error:
        Wine(given).run(Place(0, 1, 1), paths, None)
    assert error.value.message.startswith("the forests cannot be fitted: ValueError: monotonic_cst has shape 2")
    assert "\n" not in error.value.message and error.value.exit_code == 2


def test_fits_that_fail_in_part_are_told_in_a_line(tmp_path, capfd):
    table = tmp_path / "table.csv"
    table.write_text("a,y\n" + "".join(f"{row},{row % 5 - 2}\n" for row in range(20)))
    grid = {"n_estimators": [2], "criterion": ["squared_error", "poisson"]}
    given = config(data={"source": str(table)}, search={"grid": grid, "cv": 2, "scoring": "neg_mean_squared_error"})
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert Wine(given).run(Place(0, 1, 1), RunPaths(tmp_path), None) == 0
    said = "".join([*capfd.readouterr(), *(str(one.message) for one in warned)])
    assert "2 of 4 fits failed: ValueError: Some value(s) of y are negative" in said and "Traceback" not in said


@pytest.mark.filterwarnings("ignore")
def test_where_each_grid_point_has_a_fit_that_fails_that_is_the_error(tmp_path):
    table = tmp_path / "table.csv"  # the targets of the second half sum to 0
    table.write_text("a,y\n" + "".join(f"{row},{max(0, 10 - row)}\n" for row in range(20)))
    given = config(data={"source": str(table)}, search={"grid": {"n_estimators": [2], "criterion": ["poisson"]}, "cv": 2})
    with pytest.raises(UserError) as error:
        Wine(given).run(Place(0, 1, 1), RunPaths(tmp_path), None)
    assert "no grid point can be fitted and scored on all folds: 1 of 2 fits failed: ValueError: Sum" in error.value.message
    assert "search.grid" in error.value.hint


@pytest.mark.filterwarnings("ignore")
def test_broken_pieces_are_not_done(tmp_path):
    from trainers.forest.kept import Kept
    from trainers.wine.searching import make_search

    given, paths, place = config(), RunPaths(tmp_path), Place(0, 1, 1)
    read = load_table(given.data, False)
    work = make_search(given, read, 1)[0].prepare(read.X, read.y)
    kept = Kept(paths.pieces)
    for _ in work.results(kept=kept):
        pass
    assert Progress(work, kept, paths, None, place).look()
    broken = next(paths.pieces.iterdir())
    whole = broken.read_text()
    broken.write_text(whole[:-20])
    progress = Progress(work, kept, paths, None, place)
    assert not progress.look() and progress.fits == 1
    broken.write_text(whole)
    assert progress.look()


def test_ranks_started_by_hand_share_the_pieces_whenever_each_looks(tmp_path):
    keys = [f"0-{number:016x}" for number in range(7)]
    ranks = [Claims(RunPaths(tmp_path), None, Place(rank, 3, 1), keys) for rank in range(3)]
    for late in (0, 2):  # a rank that finds some kept is not asked of those
        taken = [key for rank, mine in enumerate(ranks) for key in keys[late * rank:] if mine(key)]
        assert len(taken) == len(set(taken)) and set(keys[4:]) <= set(taken)


def test_folds_of_each_kind(table):
    from trainers.wine.searching import make_search

    read = table(UCI)
    for split, kind in (("plain", int), ("shuffled", "KFold"), ("grouped", "GroupKFold")):
        search, given = make_search(config(search={"split": split}), read, 1)
        assert isinstance(search.cv, kind) if isinstance(kind, type) else type(search.cv).__name__ == kind
        assert ("groups" in given) == (split == "grouped")
    search, _ = make_search(config(search={"scoring": ["r2", "neg_max_error"]}), read, 3)
    assert search.refit == "r2" and search.n_jobs == 3
