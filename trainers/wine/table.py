"""Tables of numbers from CSV files: UCI's (`;`, quoted header), comma-separated copies, files without a header."""

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
    what: str                  # in words
    X: np.ndarray              # float64 [rows, features]
    y: np.ndarray              # float64, or text, [rows]
    names: list[str]           # of the features
    target: str
    group: np.ndarray | None   # of each row: the values of the column that groups them

    @property
    def alike(self) -> np.ndarray:
        """A number for each row, the same for rows whose features are identical."""
        _, numbers = np.unique(self.X, axis=0, return_inverse=True, equal_nan=True)
        return numbers.ravel()

    @property
    def repeats(self) -> int:
        """Rows that are, target and all, a copy of an earlier one."""
        _, targets = np.unique(self.y, return_inverse=True)
        return len(self.X) - len(np.unique(np.column_stack([self.alike, targets]), axis=0))

    @property
    def missing(self) -> dict[str, int]:
        """Cells without a value, by column that has some."""
        counts = np.isnan(self.X).sum(axis=0)
        return {name: int(count) for name, count in zip(self.names, counts) if count}


def load_table(data: Data, classes: bool, group: str | None = None) -> Table:
    """The table that `data` says.

    Args:
        classes: whether the target may be text.
        group: the name of a column that is no feature but says which rows belong together.

    Raises:
        UserError: it is not there, cannot be had, or holds what is no number.
    """
    if data.source == "sample":
        return _chosen("scikit-learn's diabetes data (sample)", *_diabetes(), data.target, classes, group)
    path = fetch(data)
    if data.sha256 and data.download() is None and _sha256(path) != data.sha256:
        raise UserError(f"{path} is another file than `data.sha256` says: its SHA-256 is {_sha256(path)}",
                        "mend the one or the other")
    names, columns = _read(path, data)
    return _chosen(f"{'UCI Wine Quality, red' if data.source == 'wine' else path.name}", names, columns, data.target, classes,
                   group)


def fetch(data: Data) -> Path:
    """The file, downloaded if it is a URL's that is not on disk yet. Raises: UserError."""
    download = data.download()
    if download is None:
        return Path(data.source)
    url, sha256, path = download
    if path.is_file() and _sha256(path) == sha256:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".table-") as beside:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                while block := answer.read(2**20):
                    beside.write(block)
            beside.flush()
            if (found := _sha256(Path(beside.name))) != sha256:
                raise UserError(f"{url} is another file than expected: its SHA-256 is {found}, not {sha256}",
                                "look at it; if it is the right one, give its own: data.sha256=...")
            os.replace(beside.name, path)
            Path(beside.name).touch()  # for its own removal
    except (OSError, HTTPException, urllib.error.URLError) as error:
        raise UserError(f"the table is not in {path}, and {url} could not be downloaded: {' '.join(str(error).split())}",
                        "put the file there, give one you have by data=PATH, or use data=sample (diabetes, nothing to download)"
                        ) from error
    return path


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _diabetes() -> tuple[list[str], list[np.ndarray]]:
    from sklearn.datasets import load_diabetes

    found = load_diabetes()
    return [*found.feature_names, "progression"], [*found.data.T, found.target]


def _read(path: Path, data: Data) -> tuple[list[str], list[Any]]:
    """(names, columns), a column float64 or, where a cell is no number, a list of its cells. Raises: UserError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
    except UnicodeDecodeError as error:
        raise UserError(f"`{path}` is no text in UTF-8: byte {error.start}") from None
    except OSError as error:
        raise UserError(f"cannot read `{path}`: {error.strerror}") from None
    if not first.strip():
        raise UserError(f"`{path}` is empty, or its first line is", "a table has a line of cells for each row")
    delimiter = data.delimiter or next((mark for mark in (";", "\t", ",") if mark in first), ",")
    cells = next(csv.reader([first], delimiter=delimiter))
    header = data.header if data.header is not None else any(_number(cell) is None for cell in cells)
    names = [cell.strip() for cell in cells] if header else [f"column {number}" for number in range(1, len(cells) + 1)]
    try:
        # Fast, and strict: whatever it does not take is looked at cell by cell.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of no rows
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
                raise UserError(f"`{path}`, line {line}: {len(cells)} cells, where the first line has {len(names)}",
                                f"cells are taken to lie between `{delimiter}`: data.delimiter says otherwise")
            rows.append(cells)
    except csv.Error as error:
        raise UserError(f"`{path}` is no CSV file: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"`{path}` is no text in UTF-8: byte {error.object[error.start]:#04x}, after line {line}",
                        f"turn it into UTF-8, if it is Latin-1 by `iconv -f latin1 -t utf-8 {path}`") from error
    if not rows:
        raise UserError(f"`{path}` has no rows", "data.header=false if its only line is one")
    columns: list[Any] = []
    for cells in zip(*rows):
        numbers = [_number(cell) for cell in cells]
        columns.append(list(cells) if None in numbers else np.array(numbers))
    return columns


def _lines(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        for cells in reader:
            yield reader.line_num, cells


def _number(cell: str) -> float | None:
    """nan for a missing value, None for what is no number."""
    cell = cell.strip()
    if cell.lower() in MISSING:
        return float("nan")
    try:
        return None if "_" in cell else float(cell)  # Python takes 1_000
    except ValueError:
        return None


def _chosen(what: str, names: list[str], columns: list[Any], target: int | str | None, classes: bool, group: str | None
            ) -> Table:
    """Raises: UserError."""
    if repeated := next((name for place, name in enumerate(names) if name in names[:place]), None):
        raise UserError(f"{what}: two columns are called `{repeated}`", "rename one in its first line")
    place = _place(what, names, target)
    grouping = None if group is None else _place(what, names, group)
    if grouping == place:
        raise UserError(f"`{group}` is both the target and the column that groups", "choose another `search.group`")
    y: Any = columns[place]
    if isinstance(y, list):
        if not classes:
            raise _text(what, names[place], y, "the target", "a classifier predicts text: model.name=random_forest_classifier")
        y = np.array([cell.strip() for cell in y])
        lost = np.flatnonzero(np.isin(np.char.lower(y), list(MISSING)))
    else:
        lost = np.flatnonzero(~np.isfinite(y))
    if lost.size:
        raise UserError(f"{what}: the target `{names[place]}` has no value in {lost.size} row(s), the first is row {lost[0] + 1}",
                        "remove those rows: nothing can be learned from them")
    features = [number for number in range(len(names)) if number not in (place, grouping)]
    for number in features:
        if isinstance(columns[number], list):
            raise _text(what, names[number], columns[number], "a feature", "turn it into numbers, or remove the column")
        if not np.all(np.abs(columns[number][~np.isnan(columns[number])]) < np.finfo(np.float32).max):
            raise UserError(f"{what}: column `{names[number]}` has a number that float32, in which trees compare, does not hold")
    if not features:
        raise UserError(f"{what}: `{names[place]}` is its only column", "a table needs features beside the target"
                        + ("; data.delimiter says what lies between cells" if len(names) == 1 else ""))
    X = np.ascontiguousarray(np.column_stack([columns[number] for number in features]))
    return Table(what, X, np.ascontiguousarray(y), [names[number] for number in features], names[place],
                 None if grouping is None else np.asarray(columns[grouping]))


def _place(what: str, names: list[str], wanted: int | str | None) -> int:
    """Which column it is. Raises: UserError."""
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


def _text(what: str, name: str, cells: list[str], kind: str, hint: str) -> UserError:
    row = next(row for row, cell in enumerate(cells, 1) if _number(cell) is None)
    return UserError(f"{what}: `{cells[row - 1].strip()}` in row {row} of column `{name}`, {kind}, is no number", hint)
