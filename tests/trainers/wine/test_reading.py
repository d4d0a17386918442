"""Tables as spreadsheets, instruments and other programs write them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sys
import zipfile

import numpy as np
import pytest
from sklearn import datasets

from trainers.contract.errors import UserError
from trainers.wine.config import Data
from trainers.wine.table import Table, load_table

PLAIN = "a,b,y\n1.5,2,3\n4,5.25,6\n7,8,9.5\n"
VALUES = [[1.5, 2, 3], [4, 5.25, 6], [7, 8, 9.5]]


@pytest.fixture
def load(tmp_path):
    def load(content: str | bytes, classes: bool = False, name: str = "t.csv", **data) -> Table:
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_table(Data(source=str(file), **data), classes)

    return load


def values(table: Table) -> list[list[float]]:
    return np.column_stack([table.X, table.y]).tolist()


COMMAS = PLAIN.replace(",", ";").replace(".", ",")
FORMS = {
    "plain": PLAIN,
    "semicolons": PLAIN.replace(",", ";"),
    "bars": PLAIN.replace(",", "|"),
    "blanks": PLAIN.replace(",", "   "),
    "aligned blanks": "  a     b    y\n 1.5   2.0  3\n   4  5.25  6\n   7   8.0  9.5\n",
    "tabs": PLAIN.replace(",", "\t"),
    "decimal commas": COMMAS,
    "decimal commas and blanks": COMMAS.replace(";", "  "),
    "decimal commas and thousands": COMMAS.replace("1,5", "0.001,5"),
    "Excel's first line": "sep=;\n" + COMMAS,
    "comments": "# measured on Monday, by me\n# twice\n\n" + PLAIN.replace("4,", "# pause\n4,"),
    "names in a comment": "# " + PLAIN,
    "names in a box of comments": "#####\n# " + PLAIN.replace("y\n", "y\n#\n"),
    "delimiters at the ends of lines": PLAIN.replace("\n", ",\n"),
    "delimiters at the ends of rows": PLAIN.replace("\n", ",\n").replace("y,", "y"),
    "blank lines": PLAIN.replace("\n", "\n\n"),
    "old line ends": PLAIN.replace("\n", "\r"),
    "a line end in a name": PLAIN.replace("b", '"b\n"'),
    "units": PLAIN.replace("y\n", "y\nkg,m,-\n"),
    "units and decimal commas": COMMAS.replace("y\n", "y\nkg;m;-\n"),
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_forms_of_the_same_table(load, text):
    table = load(text)
    assert values(table) == VALUES and (table.names, table.target) == (["a", "b"], "y")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_tables(load, pack):
    assert values(load(pack(PLAIN.encode()), name="t.csv.gz")) == VALUES


def test_an_archive_of_one_table(load):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("x/t.csv", PLAIN)
    assert values(load(content.getvalue())) == VALUES
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr("more.csv", PLAIN)
    with pytest.raises(UserError, match="is an archive of 2 files"):
        load(content.getvalue())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings_that_a_file_tells(load, encoding):
    table = load(PLAIN.replace("b", "größe").encode(encoding))
    assert values(table) == VALUES and table.names == ["a", "größe"] and table.notes == ()


def test_encodings_that_must_be_guessed(load):
    content = PLAIN.replace("b", "größe").encode("latin-1")
    table = load(content)
    assert table.names == ["a", "größe"] and "read as Windows-1252" in table.notes[0]
    assert load(content, encoding="latin-1").notes == ()
    assert load(PLAIN.replace("b", "体重").encode("gbk"), encoding="gbk").names == ["a", "体重"]
    with pytest.raises(UserError, match="is not gbk text"):
        load(b"\xff" + content, encoding="gbk")
    with pytest.raises(ValueError, match="encoding that Python knows"):
        Data(source="x.csv", encoding="klingon")


def test_a_delimiter_inside_a_quoted_name(load):
    table = load('"acid; fixed","sugar, residual",y\n1,2,3\n4,5,6\n')
    assert table.names == ["acid; fixed", "sugar, residual"]


@pytest.mark.parametrize("text", [
    ",a,b,y\n0,1.5,2,3\n1,4,5.25,6\n2,7,8,9.5\n", "Unnamed: 0,a,b,y\n0,1.5,2,3\n1,4,5.25,6\n2,7,8,9.5\n",
    "a,b,y\n0,1.5,2,3\n1,4,5.25,6\n2,7,8,9.5\n", '"a" "b" "y"\n"Mazda" 1.5 2 3\n"Fiat 128" 4 5.25 6\n"Ford" 7 8 9.5\n'])
def test_row_numbers_and_row_names_are_no_feature(load, text):
    table = load(text)
    assert values(table) == VALUES and table.names == ["a", "b"]
    assert "the first column has no name" in table.notes[0]


def test_row_numbers_may_be_the_target_if_they_are_named_by_number(load):
    table = load(",a\n5,1\n6,2\n", target=1)
    assert table.y.tolist() == [5, 6] and table.names == ["a"]


def test_guesses_are_said(load):
    assert load(FORMS["decimal commas"]).notes == ("numbers have decimal commas: `1,5` is 1.5 (data.decimal)",)
    assert load(FORMS["units"]).notes == ("the row under the names is taken for units and is not used: kg, m, -",)
    assert load(PLAIN).notes == ()


def test_numbers_with_points_are_not_taken_for_thousands(load):
    with pytest.raises(UserError, match="`1,5` in row 1 of column `a`") as error:
        load("a;b;y\n1,5;2.25;3\n4;5;6\n")
    assert "cells are divided at `;` (data.delimiter, data.decimal)" in error.value.hint
    assert load("a;b;y\n1,5;2.250;3\n4;5;6\n", decimal=",").X[0].tolist() == [1.5, 2250]


def test_points_between_thousands(load):
    assert load("a;b;y\n1,5;2.250;3\n4;5;6\n").X.tolist() == [[1.5, 2250], [4, 5]]
    assert load("a;y\n2.250;3\n4;6\n", decimal=",").X.tolist() == [[2250], [4]]
    assert load("a;y\n2.250;3\n4;6\n").X.tolist() == [[2.25], [4]]


def test_points_that_are_taken_for_marks_between_thousands_are_named(load):
    table = load("a;b;y\n1,5;1.234;3\n2,5;2.500;6\n")
    assert table.notes == ("numbers have decimal commas: `1,5` is 1.5, and `1.234` is 1234 (data.decimal)",)


@pytest.mark.parametrize("text", ["a\tprice\n10\t1,234\n20\t999\n30\t12,500\n", "a;b;y\n1;1,234;1.500\n2;3,250;2\n"])
def test_commas_that_may_stand_between_thousands_are_refused(load, text):
    with pytest.raises(UserError, match="`1,234` may be 1.234 or 1234") as error:
        load(text)
    assert "data.decimal=, if the comma is the decimal mark" in error.value.hint
    assert 1.234 in np.column_stack([load(text, decimal=",").X, load(text, decimal=",").y])
    with pytest.raises(UserError, match="`1,234` in row 1"):
        load(text, decimal=".")


@pytest.mark.parametrize("decisive", ["0,123", "1,5", "1234,567", "1.234,567"])
def test_one_number_decides_what_commas_are(load, decisive):
    assert load(f"a;y\n1,234;3\n{decisive};6\n").X[0].tolist() == [1.234]


@pytest.mark.parametrize("text, names", [
    ("#,a,b\n1,2,3\n2,5,6\n", ["#", "a"]), ("#,a,label\n1,2,x\n2,5,y\n", ["#", "a"]), ("#\ta\tb\n1\t2\n2\t5\n", ["a"]),
    ("# a,b,label\n1,2,x\n2,5,y\n", ["a", "b"]), ("# Na,K,y\n1,2,3\n2,5,6\n", ["Na", "K"]),
    ("# a,b,label\n1,n.a.,x\n2,5,y\n", None)])
def test_names_after_the_mark_of_a_comment(load, text, names):
    if names is None:
        with pytest.raises(UserError, match="`n.a.` in row 1 of column `b`"):
            load(text, classes=True)
        return
    table = load(text, classes="label" in text)
    assert table.names == names and len(table.X) == 2 and table.X[0].tolist() == [1, 2][:len(names)]


def test_names_in_a_row_are_preferred_to_a_comment_of_the_same_width(load):
    table = load("# on Monday, by me\na,y\n1,2\n2,5\n")
    assert (table.names, table.target) == (["a"], "y")
    assert "taken from line 2, `a,y`, not from the comment ` on Monday, by me`".replace("` on", "`on") in table.notes[0]


IRIS = "5.1,3.5,Iris-setosa\n4.9,3.0,Iris-setosa\n7.0,3.2,Iris-versicolor\n"


def test_a_first_row_of_values_and_a_label_is_a_row(load):
    table = load(IRIS, classes=True)
    assert len(table.X) == 3 and table.y[0] == "Iris-setosa" and table.target == "column 3"
    assert table.notes == ("line 1, `5.1,3.5,Iris-setosa`, is taken for a row, so the columns have no names (data.header)",)
    assert len(load("?,?,x\n1,2,x\n3,4,y\n", classes=True).X) == 3
    assert load("a,b,label\n" + IRIS, classes=True).names == ["a", "b"]
    assert load(",2019,y\n0,1,2\n1,3,4\n").names == ["2019"]


def test_a_first_row_that_may_be_names_or_values_is_refused(load):
    text = "2019,2020,kind\n1,2,x\n3,4,y\n"
    with pytest.raises(UserError, match="line 1: `2019,2020,kind` has numbers and text, and may be") as error:
        load(text, classes=True)
    assert "data.header=true" in error.value.hint and "data.header=false" in error.value.hint
    assert load(text, classes=True, header=True).names == ["2019", "2020"]
    assert len(load(text, classes=True, header=False).X) == 3
    assert "is taken for the names of the columns, although it has numbers" in load("a,2019\n1,2\n3,4\n").notes[0]


def test_a_title_above_the_names(load):
    table = load("My table,,\na,b,y\n1,2,3\n4,5,6\n")
    assert (table.names, table.target, len(table.X)) == (["a", "b"], "y", 2)
    assert table.notes == ("the first line, `My table`, is taken for a title: the names are in the next line",)
    with pytest.raises(UserError, match="which line holds the names of the columns, `My table` or `a, y`"):
        load("My table\na,y\n1,2\n3,4\n")


def test_rows_are_counted_from_the_names(load):
    with pytest.raises(UserError, match="`x` in row 3 of column `a`"):
        load("a,y\nkg,m\n1,2\nx,3\n", target="a")


def test_encodings_of_text_only(load):
    for encoding in ("hex", "rot13", "base64", "undefined"):
        with pytest.raises(ValueError, match="encoding that Python knows"):
            Data(source="x.csv", encoding=encoding)
    for encoding in ("utf-8", "utf-16-le"):
        assert load(("\ufeff" + PLAIN).encode(encoding), encoding=encoding).names == ["a", "b"]


def test_scikit_learns_own_file(load):
    file = datasets.__path__[0] + "/data/iris.csv"
    table = load_table(Data(source=file), classes=True)
    assert table.X.tolist() == datasets.load_iris().data.tolist() and table.y.tolist() == datasets.load_iris().target.tolist()
    assert "`150,4,setosa,versicolor,virginica`, is a summary" in table.notes[0] and table.target == "column 5"


@pytest.mark.parametrize("content, name, message, hint", [
    (b"\x00\x01\x02PAR1", "t.parquet", "is not a text file", "CSV"),
    (gzip.compress(PLAIN.encode(), mtime=0)[:-9], "t.csv.gz", "cannot read", "check the file"),
    ("a b\n", "t.csv", "has no rows", ""),
    ("y\n1\n2\n", "t.csv", "`y` is the only column", "divided at `,`; data.delimiter"),
    ("a:b\n1:2\n3:4\n", "t.csv", "`a:b` is the only column", "data.delimiter"),
    ("a,b,y\n1,2,3\n4,5\n", "t.csv", "line 3: 2 cells, but the first line has 3", "divided at `,`; if that is wrong"),
    ("a,y\n1,2 kg\n3,4 kg\n", "t.csv", "`2 kg` in row 1 of column `y`, the target, is not a number", "divided at `,`"),
])
def test_tables_that_are_refused_say_how_cells_were_divided(load, content, name, message, hint):
    with pytest.raises(UserError) as error:
        load(content, name=name)
    assert message in error.value.message and hint in (error.value.hint or "") and "classifier" not in (error.value.hint or "")


def test_a_workbook_without_openpyxl_is_refused(load, monkeypatch):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("xl/workbook.xml", "")
        archive.writestr("[Content_Types].xml", "")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(UserError, match="is an Excel workbook, and openpyxl, which reads workbooks, is not installed") as error:
        load(content.getvalue(), name="t.xlsx")
    assert "pip install openpyxl" in error.value.hint


def test_a_workbook(load):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in [[None], [None], ["a", "b", "y"], *VALUES, [None, None, None]]:
        book.active.append(row)
    book.create_sheet("more")
    content = io.BytesIO()
    book.save(content)
    table = load(content.getvalue(), name="t.xlsx")
    assert values(table) == VALUES and table.names == ["a", "b"]
    assert "2 sheets; only the first, `Sheet`, is read" in table.notes[0]


def test_a_workbooks_numbers_have_no_marks_between_thousands(load):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in [["a", "b", "y"], [2.125, "1,5", 1], [3, "2,5", 2]]:
        book.active.append(row)
    content = io.BytesIO()
    book.save(content)
    with pytest.raises(UserError, match="`1,5` in row 1"):
        load(content.getvalue(), name="t.xlsx")
    assert load(content.getvalue(), name="t.xlsx", decimal=",").X.tolist() == [[2.125, 1.5], [3, 2.5]]
