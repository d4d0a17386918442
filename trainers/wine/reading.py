"""Reads the columns of a table from a file: CSV in its many forms, compressed or not, and Excel workbooks.

What a file does not say is guessed, and each guess that may be wrong becomes a note for the log.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import lzma
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trainers.contract.errors import UserError
from trainers.wine.config import Data

MISSING = frozenset(("", "na", "n/a", "nan", "null", "none", "?"))
DELIMITERS = (";", "\t", "|", ",", " ")  # in the order in which they are tried; a blank stands for any number of blanks
SAMPLE = 200  # records that are looked at to find the delimiter
DECIMAL_COMMA = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+),\d+([eE][+-]?\d+)?")
DECIMAL_POINT = re.compile(r"[+-]?\d*\.\d+([eE][+-]?\d+)?")
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(\.\d{3})+")
POINT_OR_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}\.\d{3}")
COMMA_OR_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")
UNPACK = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ\x00": lzma.decompress}
ZIP = b"PK\x03\x04"
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}

Row = list[str]


@dataclass
class Columns:
    """The columns of a table as they are in the file."""

    names: list[str]
    columns: list[Any]  # each a float64 array, or a list of its cells if one of them is not a number
    divided: str = ""   # how cells were told apart, for messages
    index: bool = False  # whether the first column has no name: it holds row numbers or row names
    notes: list[str] = field(default_factory=list)
    unused: int = 0  # rows under the names that are not in `columns`: a row of units


def read_columns(path: Path, data: Data) -> Columns:
    """Return the columns of a table.

    Raises:
        UserError: the file cannot be read, or is not a table with rows of equal length.
    """
    notes: list[str] = []
    content = _unpacked(path)
    if content.startswith(ZIP):
        rows = _workbook(path, content, notes)
        return _columns(path, data, [(line, row) for line, row in enumerate(rows, 1) if any(row)], None, notes)
    # StringIO divides at line ends only, splitlines() also at characters that a cell may hold.
    lines = list(io.StringIO(_text(path, content, data.encoding, notes), newline=""))
    skipped, comment = 0, ""
    delimiter = data.delimiter
    while lines[skipped:] and (mark := re.fullmatch(r"#.*|\s*|(?i:sep)=(.)", lines[skipped].rstrip("\r\n"))):
        delimiter = delimiter or mark[1]
        comment = lines[skipped] if re.match(r"#.*[^#\s]", lines[skipped]) else comment
        skipped += 1
    if not lines[skipped:]:
        raise UserError(f"`{path}` is empty", "a table has a line of cells for each row")
    try:
        delimiter = delimiter or _delimiter(lines[skipped:])
        first = next(_records(lines[skipped:], delimiter))[1]
        commented = _names_in_comment(comment, delimiter, len(first)) if data.header is None else []
        if (fast := _numbers(lines[skipped:], delimiter, data, commented)) is not None:
            return _named(*fast, f"cells are divided at {_said(delimiter)}", notes)
        rows_at = [(line + skipped, row) for line, row in _records(lines[skipped:], delimiter)]
    except csv.Error as error:
        raise UserError(f"`{path}` is not a CSV file: {error}",
                        'a cell that begins with a double quote ends with one; write "" for a quote inside') from error
    return _columns(path, data, rows_at, delimiter, notes, commented)


def number(cell: str) -> float | None:
    """Return the number in a cell, nan if the value is missing, or None if the cell is not a number."""
    cell = cell.strip()
    if cell.lower() in MISSING:
        return float("nan")
    try:
        return None if "_" in cell else float(cell)  # float() takes 1_000
    except ValueError:
        return None


# --- From bytes to lines


def _unpacked(path: Path) -> bytes:
    """Return the content of the file, or of the only file in an archive."""
    try:
        content = path.read_bytes()
        for mark, unpack in UNPACK.items():
            if content.startswith(mark):
                return unpack(content)
        if content.startswith(ZIP):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                files = [name for name in archive.namelist() if not name.endswith("/")]
                if len(files) == 1:
                    return archive.read(files[0])
                if "xl/workbook.xml" not in files:
                    raise UserError(f"`{path}` is an archive of {len(files)} files", "unpack it, and give one of the files")
    except (OSError, EOFError, lzma.LZMAError, zipfile.BadZipFile, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read `{path}`: {reason}", "check the file") from None
    return content


def _text(path: Path, content: bytes, encoding: str | None, notes: list[str]) -> str:
    if encoding is None:
        encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), None)
    if encoding is None:
        sample = content[:4096]
        zeros = sample.count(0)
        if 4 * zeros > len(sample) and zeros in (sample[::2].count(0), sample[1::2].count(0)):
            encoding = "utf-16-le" if sample[1::2].count(0) else "utf-16-be"
        elif any(byte < 9 for byte in sample):
            raise UserError(f"`{path}` is not a text file", "save the table as CSV (also .csv.gz), or as .xlsx")
    try:
        return content.decode(encoding or "utf-8").removeprefix("\ufeff")
    except UnicodeError as error:
        if encoding is not None:
            place = f"byte {error.start}" if isinstance(error, UnicodeDecodeError) else str(error)
            raise UserError(f"`{path}` is not {encoding} text: {place}", "set data.encoding, for instance to latin-1") from None
    notes.append("the file is not UTF-8 text and was read as Windows-1252: check letters that are not ASCII (data.encoding)")
    return content.decode("cp1252", errors="replace")


def _workbook(path: Path, content: bytes, notes: list[str]) -> list[Row]:
    """Return the rows of the first sheet of an Excel workbook."""
    try:
        from openpyxl import load_workbook
    except ModuleNotFoundError:
        raise UserError(f"`{path}` is an Excel workbook, and openpyxl, which reads workbooks, is not installed",
                        "save the table as CSV, or install openpyxl: pip install openpyxl") from None
    try:
        book = load_workbook(io.BytesIO(content), read_only=True, data_only=True)
        sheet = book.worksheets[0]
        rows = [[_cell_text(cell) for cell in row] for row in sheet.iter_rows(values_only=True)]
    except Exception as error:  # broken workbooks raise nearly anything
        raise UserError(f"`{path}` cannot be read as an Excel workbook: {' '.join(str(error).split())}",
                        "save the table as CSV") from error
    if len(book.worksheets) > 1:
        notes.append(f"the workbook has {len(book.worksheets)} sheets; only the first, `{sheet.title}`, is read")
    if not any(map(any, rows)):
        raise UserError(f"`{path}` is empty", "the table must be in the first sheet")
    return rows


def _cell_text(cell: Any) -> str:
    """Return a workbook's cell as text. A number is written so that its point is not taken for a mark between thousands."""
    text = "" if cell is None else str(cell)
    return f"{text}0" if isinstance(cell, float) and THOUSANDS.fullmatch(text) else text


# --- From lines to rows


def _records(lines: list[str], delimiter: str) -> Iterator[tuple[int, Row]]:
    """Give (line number, cells) of each record, without empty records and comments. A record may have several lines; the number
    is that of the last."""
    blanks = delimiter == " "
    reader = csv.reader((line.strip() + "\n" if blanks else line for line in lines), delimiter=delimiter,
                        skipinitialspace=blanks)
    for cells in reader:
        if any(cell.strip() for cell in cells) and not (len(cells) == 1 and cells[0].startswith("#")):
            yield reader.line_num, cells


def _cells(line: str, delimiter: str) -> Row:
    return next(csv.reader([line.strip()], delimiter=delimiter, skipinitialspace=delimiter == " "), [])


def _delimiter(lines: list[str]) -> str:
    """Return the delimiter that gives all rows the same number of cells. The first line may have one cell less or more."""
    fits: dict[str, bool] = {}
    for mark in DELIMITERS:
        try:
            first, *rows = [cells for _, cells in islice(_records(lines, mark), SAMPLE)]
        except csv.Error:
            continue
        widths = {len(cells) for cells in rows} or {len(first)}
        width = max(widths)
        if len(widths) == 1 and width > 1 and abs(width - len(first)) <= (1 if len(first) > 1 else 0):
            fits[mark] = width == len(first)
    exact = [mark for mark, same in fits.items() if same]
    return next(iter([*exact, *fits]), next((mark for mark in DELIMITERS[:-1] if mark in lines[0]), ","))


def _names_in_comment(comment: str, delimiter: str, width: int) -> Row:
    """Return the cells of a comment if they may be the names of `width` columns, otherwise an empty list."""
    whole = delimiter != " " and comment[1:].lstrip(" ").startswith(delimiter)  # `#` is then itself the name of a column
    for cells in ([_cells(comment, delimiter)] if whole else []) + [_cells(comment[1:], delimiter)]:
        if len(cells) == width > 1 and any(map(str.strip, cells)) and not _has_number(cells):
            return cells
    return []


def _is_number(cell: str, commas: bool) -> bool:
    """Return whether a cell is a number or has no value. `commas`: a number may have a decimal comma."""
    cell = cell.strip()
    return number(cell) is not None or commas and bool(DECIMAL_COMMA.fullmatch(cell) or THOUSANDS.fullmatch(cell))


def _has_number(cells: Row, commas: bool = False) -> bool:
    """Return whether a cell is a number. Missing values do not count: a column may have no name, or be called `Na`."""
    return any(cell.strip().lower() not in MISSING and _is_number(cell, commas) for cell in cells)


def _is_header(rows: list[Row], commas: bool) -> bool | None:
    """Return whether the first row holds names, or None if that is unclear.

    It does if a column has text on top and only numbers below. If no column has, then a text that its column repeats is a
    value, such as the name of a class. Otherwise a row without numbers holds names.
    """
    first, below = rows[0], rows[1:]
    texts = [place for place, cell in enumerate(first) if not _is_number(cell, commas)]
    if not texts:
        return False
    shift = int(len(below) > 0 and all(len(row) == len(first) + 1 for row in below))  # R: row names have no name
    for place in texts:
        column = [row[place + shift] for row in below if place + shift < len(row)]
        if any(map(str.strip, column)) and all(_is_number(cell, commas) for cell in column):
            return True
    if any(first[place].strip() == row[place].strip() for place in texts for row in below if place < len(row)):
        return False
    return None if any(cell.strip() and _is_number(cell, commas) for cell in first) else True


def _numbers(lines: list[str], delimiter: str, data: Data, commented: Row) -> tuple[Row, list[np.ndarray]] | None:
    """Return (names, columns) if all cells are plain numbers, otherwise None. np.loadtxt is fast and strict."""
    first = next(_records(lines, delimiter))
    header = data.header if data.header is not None else not commented and any(number(cell) is None for cell in first[1])
    if header and data.header is None and _has_number(first[1]):
        return None  # names are seldom numbers: look at this file cell by cell
    if data.decimal == ",":
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # np.loadtxt warns of files without rows
            values = np.loadtxt(iter(lines[first[0] if header else 0:]), delimiter=None if delimiter == " " else delimiter,
                                quotechar='"', ndmin=2, comments=None, dtype=np.float64)
    except ValueError:
        return None
    if not len(values) or header and values.shape[1] != len(first[1]):
        return None
    return first[1] if header else commented, list(values.T)


# --- From rows to columns


def _columns(path: Path, data: Data, rows: list[tuple[int, Row]], delimiter: str | None, notes: list[str],
             commented: Row | None = None) -> Columns:
    """Return the columns of the rows. `commented`: names in a comment above the rows, which are used if no row holds names."""
    divided = f"cells are divided at {_said(delimiter)}" if delimiter else ""
    names: Row = []
    if data.header is None and not commented and _is_summary(rows):
        notes.append(f"the first line, `{','.join(rows[0][1])}`, is a summary as in scikit-learn's own files: the columns have "
                     "no names")
        rows = rows[1:]
    elif data.header if data.header is not None else _guessed_header(path, rows, data, delimiter, notes, commented or []):
        names, rows = rows[0][1], rows[1:]
    else:
        names = commented or []
    if not rows:
        raise UserError(f"`{path}` has no rows", "use data.header=false if its only line is a row")
    width = max(len(cells) for _, cells in rows)
    if width > 1 and all(len(cells) < width or not cells[-1].strip() for _, cells in rows) and not any(names[width - 1:]):
        rows = [(line, cells[:width - 1]) for line, cells in rows]  # each line ends with a delimiter
        names, width = names[:width - 1], width - 1
    if names and not names[-1].strip() and len(names) == width + 1:
        names = names[:-1]
    if names and len(names) == width - 1 and all(len(cells) == width for _, cells in rows):
        names = ["", *names]  # as R writes tables: the column of row names has no name
    for line, cells in rows:
        if len(cells) != (len(names) or width):
            raise UserError(f"`{path}`, line {line}: {len(cells)} cells, but the first line has {len(names or rows[0][1])}",
                            f"{divided}; if that is wrong, set data.delimiter" if divided else "give each row as many cells")
    columns = [list(column) for column in zip(*(cells for _, cells in rows))]
    examples = _decimal_commas(path, columns) if data.decimal is None and delimiter != "," else []
    if examples:
        notes.append("numbers have decimal commas: " + ", and ".join(f"`{cell}` is {_point(cell)}" for cell in examples) +
                     " (data.decimal)")
    if examples or data.decimal == ",":
        columns = [[_point(cell) for cell in column] for column in columns]
    unused = 0
    if names and (units := _units(columns)):
        if all(map(str.strip, units)) and not all(map(str.strip, names)):
            title = " ".join(filter(None, map(str.strip, names)))
            if all(map(str.strip, names[1:])):  # the first name may be missing above row numbers
                raise UserError(f"`{path}`: it is not clear which line holds the names of the columns, `{title}` or "
                                f"`{', '.join(units[:8])}`", "remove a title above the names, or a row of units below them")
            notes.append(f"the first line, `{title}`, is taken for a title: the names are in the next line")
            names = units
        else:
            notes.append(f"the row under the names is taken for units and is not used: {', '.join(units[:8])}")
            unused = 1
        columns = [column[1:] for column in columns]
    values: list[Any] = []
    for column in columns:
        numbers = [number(cell) for cell in column]
        values.append(column if None in numbers else np.array(numbers))
    return _named(names, values, divided, notes, unused)


def _guessed_header(path: Path, rows: list[tuple[int, Row]], data: Data, delimiter: str | None, notes: list[str],
                    commented: Row) -> bool:
    """Return whether the first row holds names, with a note unless that is plain.

    Raises:
        UserError: it is unclear.
    """
    line, first = rows[0]
    commas = data.decimal == "," or data.decimal is None and delimiter != ","
    header, mixed, said = _is_header([cells for _, cells in rows], commas), _has_number(first, commas), ",".join(first)
    if commented:
        if header and not mixed:
            notes.append(f"the names of the columns are taken from line {line}, `{said}`, not from the comment "
                         f"`{','.join(commented)}`")
        return bool(header) and not mixed
    if header is None:
        raise UserError(f"`{path}`, line {line}: `{said}` has numbers and text, and may be a row or the names of the columns",
                        "set data.header=true if it holds the names, or data.header=false if it is a row")
    if header and mixed:
        notes.append(f"line {line}, `{said}`, is taken for the names of the columns, although it has numbers (data.header)")
    elif not header and not all(_is_number(cell, commas) for cell in first):
        notes.append(f"line {line}, `{said}`, is taken for a row, so the columns have no names (data.header)")
    return header


def _named(names: Row, columns: list[Any], divided: str, notes: list[str], unused: int = 0) -> Columns:
    """Return the columns with names that are not empty."""
    cleaned = [" ".join(name.split()) for name in names]
    index = len(columns) > 1 and bool(names) and (not cleaned[0] or cleaned[0] == "Unnamed: 0")
    if index:
        notes.append("the first column has no name: it is taken for row numbers or row names, and is not a feature")
    named = [name or f"column {place}" for place, name in enumerate(cleaned or [""] * len(columns), 1)]
    return Columns(named, columns, divided, index, notes, unused)


def _is_summary(rows: list[tuple[int, Row]]) -> bool:
    """Return whether the first row is `rows,features,class,class,...`, as in the files that scikit-learn comes with."""
    first = [cell.strip() for cell in rows[0][1]]
    return (len(first) > 2 and first[0] == str(len(rows) - 1) and first[1].isdecimal()
            and all(number(cell) is None for cell in first[2:])
            and all(len(cells) == int(first[1]) + 1 for _, cells in rows[1:]))


def _units(columns: list[Row]) -> Row | None:
    """Return the first row if it has no number in any column whose other cells are all numbers: a row of units."""
    row = [column[0] for column in columns]
    if len(columns[0]) < 3 or all(number(cell) is not None for cell in row):
        return None
    first = [number(column[0]) for column in columns if all(number(cell) is not None for cell in column[1:])]
    return row if None in first and all(value is None or value != value for value in first) else None


def _decimal_commas(path: Path, columns: list[Row]) -> list[str]:
    """Return examples of how numbers are read if there are decimal commas and no decimal points, otherwise an empty list.

    The first example has a decimal comma. The second, if there is one, has a point that is taken for a mark between thousands.

    Raises:
        UserError: all commas may also be marks between thousands.
    """
    comma = thousands = None
    unclear = True
    for cell in (cell.strip() for column in columns for cell in column):
        if DECIMAL_COMMA.fullmatch(cell):
            comma, unclear = comma or cell, unclear and bool(COMMA_OR_THOUSANDS.fullmatch(cell))
        elif POINT_OR_THOUSANDS.fullmatch(cell):
            thousands = thousands or cell
        elif DECIMAL_POINT.fullmatch(cell):
            return []
    if comma and unclear:
        raise UserError(f"`{path}`: `{comma}` may be {comma.replace(',', '.')} or {comma.replace(',', '')}: all commas in "
                        "numbers stand before three digits",
                        "set data.decimal=, if the comma is the decimal mark; otherwise remove the commas from the file")
    return [cell for cell in (comma, thousands) if cell] if comma else []


def _point(cell: str) -> str:
    """Return a number of a table with decimal commas as Python writes it; any other text as it is."""
    found = DECIMAL_COMMA.fullmatch(cell.strip()) or THOUSANDS.fullmatch(cell.strip())
    return found[0].replace(".", "").replace(",", ".") if found else cell


def _said(delimiter: str) -> str:
    return {" ": "blanks", "\t": "tabs"}.get(delimiter, f"`{delimiter}`")
