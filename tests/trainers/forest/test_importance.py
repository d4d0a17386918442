"""Predictions of a forest that are shared by several scores, and the permutation importance made from them."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.ensemble import ExtraTreesRegressor, RandomForestClassifier, RandomForestRegressor
from sklearn.inspection import permutation_importance
from sklearn.metrics import check_scoring, get_scorer

from trainers.forest import importance
from trainers.forest.equivalence import prefix
from trainers.forest.importance import permutation_falls
from trainers.forest.predictions import answering, predictions


def problem(classes: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = np.round(rng.normal(size=(70, 4)), 1)
    X[rng.random(X.shape) < 0.05] = np.nan
    y = np.nan_to_num(X[:, 0]) + rng.normal(size=70)
    return X, np.digitize(y, [-0.5, 0.7]) if classes else y


@pytest.mark.parametrize("cls, method", [(RandomForestRegressor, "predict"), (ExtraTreesRegressor, "predict"),
                                         (RandomForestClassifier, "predict_proba")])
def test_predictions_of_the_first_trees_are_those_of_the_smaller_forest(cls, method):
    X, y = problem(cls is RandomForestClassifier)
    forest = cls(9, random_state=0).fit(X, y)
    found = predictions(forest, X, [9, 1, 4, 4])
    assert list(found) == [1, 4, 9]
    for size, answer in found.items():
        assert np.array_equal(answer, getattr(prefix(forest, size), method)(X))
        assert np.array_equal(answering(forest, answer).predict(X), prefix(forest, size).predict(X))
    with pytest.raises(ValueError, match="infinity"):
        predictions(forest, np.full((2, 4), np.inf), [9])


@pytest.mark.parametrize("most_bytes", [1, 70 * 4 * 4 * 2, 2**25])  # one copy of the table at once, two, and all five
@pytest.mark.parametrize("cls, score", [(RandomForestRegressor, "neg_max_error"), (RandomForestClassifier, "roc_auc_ovr"),
                                        (RandomForestClassifier, None)])
def test_the_importance_is_scikit_learns(monkeypatch, cls, score, most_bytes):
    X, y = problem(cls is RandomForestClassifier)
    forest = cls(7, random_state=0, min_samples_leaf=3).fit(X, y)
    expected = permutation_importance(forest, X, y, scoring=score, n_repeats=5, random_state=3)
    monkeypatch.setattr(importance, "MOST_BYTES", most_bytes)
    falls = permutation_falls(forest, X, y, check_scoring(forest, score), 5, 3, n_jobs=2)
    assert np.array_equal(falls, expected.importances) and len(np.unique(falls)) > 5
    assert np.array_equal(falls.mean(axis=1), expected.importances_mean)
    assert np.array_equal(falls.std(axis=1), expected.importances_std)


def test_a_score_that_reads_the_forest_is_computed_by_scikit_learn(monkeypatch):
    def own_score(forest, X, y):
        return float(forest.predict(X)[0] + len(forest.estimators_))

    X, y = problem(False)
    forest = RandomForestRegressor(3, random_state=0).fit(X, y)
    expected = permutation_importance(forest, X, y, scoring=own_score, n_repeats=2, random_state=0).importances
    monkeypatch.setattr(importance, "predictions", None)  # would fail
    assert np.array_equal(permutation_falls(forest, X, y, own_score, 2, 0), expected)
    with pytest.raises(TypeError):
        permutation_falls(forest, X, y, get_scorer("r2"), 2, 0)
