"""Loads a table from a file or a URL, and chooses its target, its groups and its features."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from trainers.contract.errors import UserError
from trainers.contract.text import first_few
from trainers.wine.config import Data
from trainers.wine.reading import MISSING, Columns, number, read_columns

TIMEOUT_S = 60


@dataclass(frozen=True)
class Table:
    """A table of features, with the target of each row."""

    what: str                  # the table's name in messages
    X: np.ndarray              # float64 [rows, features]
    y: np.ndarray              # float64, or text, [rows]
    names: list[str]           # of the features
    target: str
    group: np.ndarray | None   # [rows], the values of the column that groups the rows, if there is one
    notes: tuple[str, ...] = ()  # what was guessed while the file was read

    @property
    def feature_groups(self) -> np.ndarray:
        """[rows], a number for each row: rows with identical features have the same number."""
        _, numbers = np.unique(self.X, axis=0, return_inverse=True, equal_nan=True)
        return numbers.ravel()

    @property
    def repeats(self) -> int:
        """How many rows have the features and the target of an earlier row."""
        _, targets = np.unique(self.y, return_inverse=True)
        return len(self.X) - len(np.unique(np.column_stack([self.feature_groups, targets]), axis=0))

    @property
    def missing(self) -> dict[str, int]:
        """The number of cells without a value, for each column that has such cells."""
        counts = np.isnan(self.X).sum(axis=0)
        return {name: int(count) for name, count in zip(self.names, counts) if count}


def load_table(data: Data, classes: bool, group: str | None = None) -> Table:
    """Load the table that `data` describes.

    Args:
        classes: whether the target may be text.
        group: the name of a column that gives the group of each row and is not a feature.

    Raises:
        UserError: the table cannot be downloaded or read, or holds text where a number is needed.
    """
    if data.source == "sample":
        return _select("scikit-learn's diabetes data (sample)", _diabetes(), data.target, classes, group)
    path = fetch(data)
    if data.sha256 and data.download() is None and _sha256(path) != data.sha256:
        raise UserError(f"{path} does not match `data.sha256`: the file's SHA-256 is {_sha256(path)}",
                        "correct `data.sha256`, or use the right file")
    what = "UCI Wine Quality, red" if data.source == "wine" else path.name
    return _select(what, read_columns(path, data), data.target, classes, group)


def fetch(data: Data) -> Path:
    """Return the path of the file, after downloading it if it is not on disk.

    Raises:
        UserError: the file cannot be downloaded, or has another SHA-256.
    """
    download = data.download()
    if download is None:
        return Path(data.source)
    url, sha256, path = download
    if path.is_file() and _sha256(path) == sha256:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".table-") as temporary:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
                while block := response.read(2**20):
                    temporary.write(block)
            temporary.flush()
            if (actual := _sha256(Path(temporary.name))) != sha256:
                raise UserError(f"{url} is not the expected file: its SHA-256 is {actual}, not {sha256}",
                                "check the file; if it is the right one, give its SHA-256: data.sha256=...")
            os.replace(temporary.name, path)
            Path(temporary.name).touch()  # leaving `with` deletes a file of this name
    except (OSError, HTTPException, urllib.error.URLError) as error:
        raise UserError(f"the table is not in {path}, and {url} could not be downloaded: {' '.join(str(error).split())}",
                        "put the file there, use your own file with data=PATH, or use data=sample (diabetes, nothing to download)"
                        ) from error
    return path


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _diabetes() -> Columns:
    from sklearn.datasets import load_diabetes

    diabetes = load_diabetes()
    return Columns([*diabetes.feature_names, "progression"], [*diabetes.data.T, diabetes.target])


def _select(what: str, table: Columns, target: int | str | None, classes: bool, group: str | None) -> Table:
    """Return the table with its target, group and features chosen from the columns.

    Raises:
        UserError: a column does not exist, is used twice, or holds what its use does not allow.
    """
    names, columns = table.names, table.columns
    if len(names) == 1:
        raise UserError(f"{what}: `{names[0]}` is the only column, but a table needs features besides the target",
                        f"{table.divided}; data.delimiter sets another character" if table.divided else None)
    if repeated := next((name for place, name in enumerate(names) if name in names[:place]), None):
        raise UserError(f"{what}: two columns are called `{repeated}`", "rename one of them in the first line")
    place = _column_index(what, names, target)
    grouping = None if group is None else _column_index(what, names, group)
    if grouping == place:
        raise UserError(f"`{group}` is both the target and `search.group`", "choose another `search.group`")
    y: Any = columns[place]
    if isinstance(y, list):
        if not classes:
            words = any(not re.search(r"\d", cell) and number(cell) is None for cell in y)
            raise _text_error(what, names[place], y, table.unused, "the target",
                              "to predict text, use a classifier: model.name=random_forest_classifier; data.target=NAME chooses "
                              "another target" if words else _advice(table, "turn it into numbers"))
        y = np.array([cell.strip() for cell in y])
        empty_rows = np.flatnonzero(np.isin(np.char.lower(y), list(MISSING)))
    else:
        empty_rows = np.flatnonzero(~np.isfinite(y))
    if empty_rows.size:
        raise UserError(f"{what}: the target `{names[place]}` has no value in {empty_rows.size} row(s), the first is row "
                        f"{empty_rows[0] + 1 + table.unused}",
                        "remove those rows: nothing can be learned from them")
    unused = (place, grouping, 0 if table.index else None)
    features = [column for column in range(len(names)) if column not in unused]
    for column in features:
        if isinstance(columns[column], list):
            raise _text_error(what, names[column], columns[column], table.unused, "a feature",
                              _advice(table, "turn it into numbers, or remove the column"))
        if not np.all(np.abs(columns[column][~np.isnan(columns[column])]) < np.finfo(np.float32).max):
            raise UserError(f"{what}: column `{names[column]}` has a number that is too large for float32, which trees use")
    if not features:
        raise UserError(f"{what} has no column for a feature, besides " + " and ".join(
            f"`{names[column]}`" for column in sorted({column for column in unused if column is not None})),
                        "a table needs features besides the target")
    X = np.ascontiguousarray(np.column_stack([columns[column] for column in features]))
    return Table(what, X, np.ascontiguousarray(y), [names[column] for column in features], names[place],
                 None if grouping is None else np.asarray(columns[grouping]), tuple(table.notes))


def _advice(table: Columns, advice: str) -> str:
    return advice + (f"; {table.divided} (data.delimiter, data.decimal)" if table.divided else "")


def _column_index(what: str, names: list[str], wanted: int | str | None) -> int:
    """Return the index of the column that is `wanted` by its name or number. Raises: UserError if there is no such column."""
    if wanted is None:
        return len(names) - 1
    if isinstance(wanted, str) and wanted in names:
        return names.index(wanted)
    place = wanted if isinstance(wanted, int) else int(wanted) if re.fullmatch(r"-?\d{1,6}", wanted) else 0
    if 1 <= place <= len(names):
        return place - 1
    if -len(names) <= place < 0:
        return place + len(names)
    near = get_close_matches(str(wanted), names, n=1)
    raise UserError(f"{what} has no column `{wanted}`", f"did you mean `{near[0]}`?" if near else
                    f"it has {first_few([f'`{name}`' for name in names], 20)}")


def _text_error(what: str, name: str, cells: list[str], unused: int, kind: str, hint: str) -> UserError:
    """Return the error for a column that must hold numbers, but holds text. `unused`: rows of the table above the cells."""
    row = next(row for row, cell in enumerate(cells, 1) if number(cell) is None)
    return UserError(f"{what}: `{cells[row - 1].strip()}` in row {row + unused} of column `{name}`, {kind}, is not a number",
                     hint)
