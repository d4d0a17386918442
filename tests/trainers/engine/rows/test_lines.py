"""Lines of a file, read one at a time."""

from __future__ import annotations

import pickle

import pytest

from trainers.engine.rows import lines
from trainers.engine.rows.lines import Lines


@pytest.mark.parametrize("content, wanted", [
    (b"", []), (b"\n", [""]), (b"a", ["a"]), (b"a\n", ["a"]), (b"\n\na\n\n", ["", "", "a", ""]),
    (b"a\r\nb\r\n", ["a", "b"]), (b"a\rb\n", ["a\rb"]), (b"a\r", ["a"]),
    ("a\u2028b\x0bc\x85d\n\u4e2d\n".encode(), ["a\u2028b\x0bc\x85d", "\u4e2d"]),
    (b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", ["a", "\ufeffb"]),
])
@pytest.mark.parametrize("chunk", [1, 2, 3, 2**24])
def test_only_line_feeds_end_a_line(tmp_path, monkeypatch, content, wanted, chunk):
    monkeypatch.setattr(lines, "CHUNK", chunk)
    (tmp_path / "file").write_bytes(content)
    read = Lines(tmp_path / "file")
    assert len(read) == len(wanted) and list(read) == wanted == list(pickle.loads(pickle.dumps(read)))
    assert read[1:] == wanted[1:] and read[::-1] == wanted[::-1]
    with pytest.raises(IndexError):
        read[len(wanted)]
    if wanted:
        assert read[-1] == wanted[-1]
