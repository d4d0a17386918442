"""Saves a fitted forest as a file of plain arrays, and loads it again.

The file holds no pickle, so reading it runs no code and needs no certain version of scikit-learn. (skops stores
scikit-learn's own objects. Its reader must decide which types to trust, and must have the same version of scikit-learn.)
The file stores the nodes of all trees one after another. The number of a child counts from the first node of its tree.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, is_classifier

from trainers.contract.files import temporary_path
from trainers.forest.equivalence import FORESTS

FORMAT = 1
# Name in the file -> attribute of scikit-learn's tree.
NODES = {"left": "children_left", "right": "children_right", "feature": "feature", "threshold": "threshold",
         "missing_left": "missing_go_to_left"}


def save_forest(forest: BaseEstimator, path: Path, about: dict[str, Any] | None = None) -> None:
    """Write a fitted forest to a file (.npz). An existing file is replaced in one step.

    Args:
        forest: a RandomForestRegressor, RandomForestClassifier, ExtraTreesRegressor or ExtraTreesClassifier.
        about: facts to store with the forest, as JSON values.

    Raises:
        ValueError: `forest` is another estimator, or has several targets, which the file format cannot hold.
        OSError: the file cannot be written.
    """
    if type(forest) not in FORESTS or forest.n_outputs_ != 1:
        raise ValueError("only a random forest or an extra-trees forest with one target can be saved")
    trees = [tree.tree_ for tree in forest.estimators_]
    classes = np.asarray(forest.classes_) if is_classifier(forest) else None
    if classes is not None and classes.dtype == object:
        classes = classes.astype(str)
    names = [str(name) for name in getattr(forest, "feature_names_in_", [])]
    header = {"format": FORMAT, "kind": type(forest).__name__, "features": int(forest.n_features_in_), "names": names,
              "about": about or {}}
    arrays = {name: np.concatenate([getattr(tree, attribute) for tree in trees]) for name, attribute in NODES.items()}
    arrays["value"] = np.concatenate([tree.value[:, 0, :] for tree in trees])
    arrays["begin"] = np.cumsum([0, *(tree.node_count for tree in trees)])
    if classes is not None:
        arrays["classes"] = classes
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            # numpy's types take every keyword for `allow_pickle`.
            np.savez_compressed(file, header=np.array(json.dumps(header)), **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_forest(path: Path) -> SavedForest:
    """Read a forest that `save_forest` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file was not written by `save_forest`, or has an unknown format.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(str(arrays.pop("header")))
        if header["format"] != FORMAT:
            raise ValueError(f"unknown format {header['format']}")
        return SavedForest(header["kind"], header["features"], header["names"], header["about"],
                           arrays.pop("classes", None), arrays)
    except (KeyError, TypeError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a saved forest: {error}") from error


@dataclass(frozen=True)
class SavedForest:
    """A forest read from a file. Its predictions equal those of the scikit-learn forest to the last bit."""

    kind: str                     # the name of scikit-learn's class
    features: int                 # number of columns
    names: list[str]              # of the columns; empty if they had no names
    about: dict[str, Any]         # the facts given to `save_forest`
    classes: np.ndarray | None    # the labels of a classifier; None for a regressor
    arrays: dict[str, np.ndarray]  # the nodes of all trees

    @property
    def trees(self) -> int:
        return len(self.arrays["begin"]) - 1

    def predict(self, X: Any) -> np.ndarray:
        """Return the prediction for each row of X [rows, features]: values or labels [rows].

        Raises:
            ValueError: X is not a table, or has another number of columns than the training set.
        """
        if self.classes is None:
            return self._mean(X)[:, 0]
        return self.classes.take(np.argmax(self._mean(X), axis=1), axis=0)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of each class for each row of X [rows, features]: [rows, classes].

        Raises:
            ValueError: this forest is a regressor, X is not a table, or X has another number of columns than the training set.
        """
        if self.classes is None:
            raise ValueError(f"a {self.kind} has no classes")
        return self._mean(X)

    def _mean(self, X: Any) -> np.ndarray:
        X = np.asarray(X, dtype=np.float32)  # the type that scikit-learn's trees read
        if X.ndim != 2 or X.shape[1] != self.features:
            raise ValueError(f"X is {' x '.join(map(str, X.shape))}, but this forest was fitted to {self.features} columns")
        total = np.zeros((len(X), self.arrays["value"].shape[1]))
        for tree in range(self.trees):  # in scikit-learn's order: a floating-point sum depends on its order
            total += self._leaves(tree, X)
        return total / self.trees

    def _leaves(self, tree: int, X: np.ndarray) -> np.ndarray:
        """Return the value of the leaf that each row reaches in a tree: [rows, classes], or [rows, 1] for a regressor."""
        first, end = self.arrays["begin"][tree:tree + 2]
        left, right, feature, threshold, missing_left, value = (
            self.arrays[name][first:end] for name in (*NODES, "value"))
        node = np.zeros(len(X), dtype=np.intp)
        inside = np.flatnonzero(left[node] != -1)  # rows that have not reached a leaf yet
        while inside.size:
            at = node[inside]
            x = X[inside, feature[at]]
            goes_left = np.where(np.isnan(x), missing_left[at].astype(bool), x <= threshold[at])
            node[inside] = np.where(goes_left, left[at], right[at])
            inside = inside[left[node[inside]] != -1]
        return value[node]
