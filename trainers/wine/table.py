"""Reads tables of numbers from CSV files: UCI's file (`;`, quoted header), its copies with commas, files without a header."""

from __future__ import annotations

import csv
import hashlib
import os
import re
import tempfile
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from trainers.contract.errors import UserError
from trainers.wine.config import Data

MISSING = frozenset(("", "na", "n/a", "nan", "null", "none", "?"))
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
        return _select("scikit-learn's diabetes data (sample)", *_diabetes(), data.target, classes, group)
    path = fetch(data)
    if data.sha256 and data.download() is None and _sha256(path) != data.sha256:
        raise UserError(f"{path} does not match `data.sha256`: the file's SHA-256 is {_sha256(path)}",
                        "correct `data.sha256`, or use the right file")
    names, columns = _read(path, data)
    return _select(f"{'UCI Wine Quality, red' if data.source == 'wine' else path.name}", names, columns, data.target, classes,
                   group)


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


def _diabetes() -> tuple[list[str], list[np.ndarray]]:
    from sklearn.datasets import load_diabetes

    diabetes = load_diabetes()
    return [*diabetes.feature_names, "progression"], [*diabetes.data.T, diabetes.target]


def _read(path: Path, data: Data) -> tuple[list[str], list[Any]]:
    """Return (names, columns). A column is a float64 array, or a list of its cells if one of them is not a number.

    Raises:
        UserError: the file cannot be read, or is not a CSV file with rows of equal length.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
    except UnicodeDecodeError as error:
        raise UserError(f"`{path}` is not UTF-8 text: byte {error.start}") from None
    except OSError as error:
        raise UserError(f"cannot read `{path}`: {error.strerror}") from None
    if not first.strip():
        raise UserError(f"`{path}` is empty, or its first line is empty", "a table has a line of cells for each row")
    delimiter = data.delimiter or next((mark for mark in (";", "\t", ",") if mark in first), ",")
    cells = next(csv.reader([first], delimiter=delimiter))
    header = data.header if data.header is not None else any(_number(cell) is None for cell in cells)
    names = [cell.strip() for cell in cells] if header else [f"column {number}" for number in range(1, len(cells) + 1)]
    try:
        # np.loadtxt is fast and strict. Files that it does not take are read cell by cell instead.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # np.loadtxt warns of files without rows
            numbers = np.loadtxt(path, delimiter=delimiter, skiprows=int(header), quotechar='"', ndmin=2, comments=None,
                                 encoding="utf-8-sig", dtype=np.float64)
        if numbers.shape[1] == len(names) and len(numbers):
            return names, list(numbers.T)
    except ValueError:
        pass
    return names, _columns(path, delimiter, header, names)


def _columns(path: Path, delimiter: str, header: bool, names: list[str]) -> list[Any]:
    rows: list[list[str]] = []
    line = 0
    try:
        for line, cells in _lines(path, delimiter):
            if header and line == 1 or not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                raise UserError(f"`{path}`, line {line}: {len(cells)} cells, but the first line has {len(names)}",
                                f"cells are divided at `{delimiter}`; if that is wrong, set data.delimiter")
            rows.append(cells)
    except csv.Error as error:
        raise UserError(f"`{path}` is not a CSV file: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"`{path}` is not UTF-8 text: byte {error.object[error.start]:#04x}, after line {line}",
                        f"convert the file to UTF-8; from Latin-1, use `iconv -f latin1 -t utf-8 {path}`") from error
    if not rows:
        raise UserError(f"`{path}` has no rows", "use data.header=false if its only line is a row")
    columns: list[Any] = []
    for column in zip(*rows):
        numbers = [_number(cell) for cell in column]
        columns.append(list(column) if None in numbers else np.array(numbers))
    return columns


def _lines(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        for cells in reader:
            yield reader.line_num, cells


def _number(cell: str) -> float | None:
    """Return the number in a cell, nan if the value is missing, or None if the cell is not a number."""
    cell = cell.strip()
    if cell.lower() in MISSING:
        return float("nan")
    try:
        return None if "_" in cell else float(cell)  # float() takes 1_000
    except ValueError:
        return None


def _select(what: str, names: list[str], columns: list[Any], target: int | str | None, classes: bool, group: str | None
            ) -> Table:
    """Return the table with its target, group and features chosen from the columns.

    Raises:
        UserError: a column does not exist, is used twice, or holds what its use does not allow.
    """
    if repeated := next((name for place, name in enumerate(names) if name in names[:place]), None):
        raise UserError(f"{what}: two columns are called `{repeated}`", "rename one of them in the first line")
    place = _column_index(what, names, target)
    grouping = None if group is None else _column_index(what, names, group)
    if grouping == place:
        raise UserError(f"`{group}` is both the target and `search.group`", "choose another `search.group`")
    y: Any = columns[place]
    if isinstance(y, list):
        if not classes:
            raise _text_error(what, names[place], y, "the target",
                              "to predict text, use a classifier: model.name=random_forest_classifier")
        y = np.array([cell.strip() for cell in y])
        empty_rows = np.flatnonzero(np.isin(np.char.lower(y), list(MISSING)))
    else:
        empty_rows = np.flatnonzero(~np.isfinite(y))
    if empty_rows.size:
        raise UserError(f"{what}: the target `{names[place]}` has no value in {empty_rows.size} row(s), the first is row "
                        f"{empty_rows[0] + 1}",
                        "remove those rows: nothing can be learned from them")
    features = [number for number in range(len(names)) if number not in (place, grouping)]
    for number in features:
        if isinstance(columns[number], list):
            raise _text_error(what, names[number], columns[number], "a feature", "turn it into numbers, or remove the column")
        if not np.all(np.abs(columns[number][~np.isnan(columns[number])]) < np.finfo(np.float32).max):
            raise UserError(f"{what}: column `{names[number]}` has a number that is too large for float32, which trees use")
    if not features:
        raise UserError(f"{what}: `{names[place]}` is the only column", "a table needs features besides the target"
                        + ("; data.delimiter sets the character between cells" if len(names) == 1 else ""))
    X = np.ascontiguousarray(np.column_stack([columns[number] for number in features]))
    return Table(what, X, np.ascontiguousarray(y), [names[number] for number in features], names[place],
                 None if grouping is None else np.asarray(columns[grouping]))


def _column_index(what: str, names: list[str], wanted: int | str | None) -> int:
    """Return the index of the column that is `wanted` by its name or number. Raises: UserError if there is no such column."""
    if wanted is None:
        return len(names) - 1
    if isinstance(wanted, str) and wanted in names:
        return names.index(wanted)
    number = wanted if isinstance(wanted, int) else int(wanted) if re.fullmatch(r"-?\d{1,6}", wanted) else 0
    if 1 <= number <= len(names):
        return number - 1
    if -len(names) <= number < 0:
        return number + len(names)
    near = get_close_matches(str(wanted), names, n=1)
    raise UserError(f"{what} has no column `{wanted}`", f"did you mean `{near[0]}`?" if near else
                    f"it has {', '.join(f'`{name}`' for name in names[:20])}" + (" and more" if len(names) > 20 else ""))


def _text_error(what: str, name: str, cells: list[str], kind: str, hint: str) -> UserError:
    """Return the error for a column that must hold numbers, but holds text."""
    row = next(row for row, cell in enumerate(cells, 1) if _number(cell) is None)
    return UserError(f"{what}: `{cells[row - 1].strip()}` in row {row} of column `{name}`, {kind}, is not a number", hint)
