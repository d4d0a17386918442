"""The rows of each fold, written to files once. Processes map these files, so no worker holds a copy of the rows."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.utils import _safe_indexing, check_array
from sklearn.utils.validation import _check_method_params

MAPPED_BYTES = 2**20  # smaller arrays are sent along with the work, which is also joblib's limit
CHUNK_BYTES = 2**25   # rows are written in chunks of this size


@dataclass(frozen=True)
class Fold:
    """The training set and the test set of one fold, with the parameters of fits and scorers for these rows."""

    X_train: np.ndarray  # float32 [rows, columns]
    y_train: Any
    X_test: np.ndarray   # float32 [rows, columns]
    y_test: Any
    fit_params: Mapping[str, Any]
    score_params_train: Mapping[str, Any]
    score_params_test: Mapping[str, Any]


class Folds:
    """The folds of a search, by number. A fold is made on its first use. `forget` frees a fold, `close` frees all folds."""

    def __init__(self, X: Any, y: Any, splits: Sequence[tuple[np.ndarray, np.ndarray]], fit_params: Mapping[str, Any],
                 score_params: Mapping[str, Any]):
        """Raises: ValueError if X is not a dense table of numbers (it is sparse, or holds text)."""
        if issparse(X):
            raise ValueError("X is sparse")
        # A forest converts its training set and its test sets in the same way, so X can be converted once, in advance.
        self._table = X if _plain_array(X) else check_array(X, dtype=np.float32, ensure_all_finite=False)
        self._X, self._y, self._splits, self._fit, self._score = X, y, splits, fit_params, score_params
        self._made: dict[int, Fold] = {}
        self._folder: Path | None = None

    def close(self) -> None:
        self._made.clear()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def columns(self) -> int:
        return self._table.shape[1]

    def __getitem__(self, number: int) -> Fold:
        if number not in self._made:
            train, test = self._splits[number]
            self._made[number] = Fold(
                self._rows(train, f"{number}-train"), _safe_indexing(self._y, train),
                self._rows(test, f"{number}-test"), _safe_indexing(self._y, test),
                _check_method_params(self._X, params=self._fit, indices=train),
                _check_method_params(self._X, params=self._score, indices=train),
                _check_method_params(self._X, params=self._score, indices=test),
            )
        return self._made[number]

    def forget(self, number: int) -> None:
        """Delete the files of a fold. A process that still maps the files keeps the rows until it has finished."""
        self._made.pop(number, None)
        if self._folder:
            for part in ("train", "test"):
                (self._folder / f"{number}-{part}").unlink(missing_ok=True)

    def _rows(self, index: np.ndarray, name: str) -> np.ndarray:
        index = np.arange(len(self._table))[index]  # `index` may be a mask
        shape = (len(index), self.columns)
        if 4 * shape[0] * shape[1] < MAPPED_BYTES:
            return np.ascontiguousarray(self._table[index], dtype=np.float32)
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="folds-"))
        rows = np.memmap(self._folder / name, np.float32, "w+", shape=shape)
        step = max(1, CHUNK_BYTES // (8 * shape[1]))
        for start in range(0, shape[0], step):
            rows[start:start + step] = self._table[index[start:start + step]]
        rows.flush()
        del rows
        return np.memmap(self._folder / name, np.float32, "r", shape=shape)


def _plain_array(X: Any) -> bool:
    return type(X) in (np.ndarray, np.memmap) and X.ndim == 2 and X.dtype in (np.float32, np.float64) and X.size > 0
