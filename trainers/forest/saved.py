"""A fitted forest as a file of plain arrays, and back: no pickle, so reading one runs no code, and no version of
scikit-learn is asked for.

(skops keeps scikit-learn's own objects, but asks its reader to decide which types to trust, and for the same version
of scikit-learn.) All trees' nodes lie one after another; a child is counted from its tree's first node.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, is_classifier

from trainers.forest.equivalence import FORESTS

FORMAT = 1
NODES = {"left": "children_left", "right": "children_right", "feature": "feature", "threshold": "threshold",
         "missing_left": "missing_go_to_left"}


def save_forest(forest: BaseEstimator, path: Path, about: dict[str, Any] | None = None) -> None:
    """Write a fitted forest (.npz), with what else is to be known `about` it. Replaces the file at once.

    Raises:
        ValueError: it is no forest, or has several targets, which this format has no place for.
        OSError: the file cannot be written.
    """
    if type(forest) not in FORESTS or forest.n_outputs_ != 1:
        raise ValueError("only a forest with one target can be saved so")
    trees = [tree.tree_ for tree in forest.estimators_]
    classes = np.asarray(forest.classes_) if is_classifier(forest) else None
    if classes is not None and classes.dtype == object:
        classes = classes.astype(str)
    names = [str(name) for name in getattr(forest, "feature_names_in_", [])]
    header = {"format": FORMAT, "kind": type(forest).__name__, "features": int(forest.n_features_in_), "names": names,
              "about": about or {}}
    arrays = {name: np.concatenate([getattr(tree, of) for tree in trees]) for name, of in NODES.items()}
    arrays["value"] = np.concatenate([tree.value[:, 0, :] for tree in trees])
    arrays["begin"] = np.cumsum([0, *(tree.node_count for tree in trees)])
    if classes is not None:
        arrays["classes"] = classes
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            np.savez_compressed(file, header=np.array(json.dumps(header)), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load_forest(path: Path) -> SavedForest:
    """Raises: OSError; ValueError if the file is none of `save_forest`'s."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(str(arrays.pop("header")))
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']} is not known here")
        return SavedForest(header["kind"], header["features"], header["names"], header["about"],
                           arrays.pop("classes", None), arrays)
    except (KeyError, TypeError, ValueError, EOFError) as error:
        raise ValueError(f"{path} holds no forest: {error}") from error


@dataclass(frozen=True)
class SavedForest:
    """A forest that predicts, to the last bit what scikit-learn's predicted."""

    kind: str                   # of scikit-learn's classes
    features: int
    names: list[str]            # of the columns, where they had some
    about: dict[str, Any]
    classes: np.ndarray | None  # of a classifier
    arrays: dict[str, np.ndarray]

    @property
    def trees(self) -> int:
        return len(self.arrays["begin"]) - 1

    def predict(self, X: Any) -> np.ndarray:
        """[rows] Raises: ValueError if X has another number of columns."""
        if self.classes is None:
            return self._mean(X)[:, 0]
        return self.classes.take(np.argmax(self._mean(X), axis=1), axis=0)

    def predict_proba(self, X: Any) -> np.ndarray:
        """[rows, classes] Raises: ValueError if it is no classifier, or X has another number of columns."""
        if self.classes is None:
            raise ValueError(f"a {self.kind} has no classes")
        return self._mean(X)

    def _mean(self, X: Any) -> np.ndarray:
        X = np.asarray(X, dtype=np.float32)  # as scikit-learn's trees see it
        if X.ndim != 2 or X.shape[1] != self.features:
            raise ValueError(f"X is {' x '.join(map(str, X.shape))}; this forest was fitted to {self.features} columns")
        total = np.zeros((len(X), self.arrays["value"].shape[1]))
        for tree in range(self.trees):  # in order, as floating-point sums have one
            total += self._leaves(tree, X)
        return total / self.trees

    def _leaves(self, tree: int, X: np.ndarray) -> np.ndarray:
        first, end = self.arrays["begin"][tree:tree + 2]
        left, right, feature, threshold, missing_left, value = (
            self.arrays[name][first:end] for name in (*NODES, "value"))
        node = np.zeros(len(X), dtype=np.intp)
        inside = np.flatnonzero(left[node] != -1)  # rows that have not come to a leaf
        while inside.size:
            at = node[inside]
            x = X[inside, feature[at]]
            goes_left = np.where(np.isnan(x), missing_left[at].astype(bool), x <= threshold[at])
            node[inside] = np.where(goes_left, left[at], right[at])
            inside = inside[left[node[inside]] != -1]
        return value[node]
