"""Words, tracebacks and times as people read them."""

from __future__ import annotations

import pytest

from trainers.contract.clock import local_time, seconds_between, utc_at
from trainers.contract.text import either, last_state, last_traceback, whole_characters

TRACE = """\
Traceback (most recent call last):
  File "train.py", line 3, in <module>
    main()
ValueError: two
lines"""


@pytest.mark.parametrize("line, state", [("a", "a"), ("1%\r2%", "2%"), ("1%\r2%\r  \r", "2%"), ("x\r", "x"), ("\r\r", "")])
def test_the_last_state_of_an_overwritten_line(line, state):
    assert last_state(line) == state


def test_a_character_is_never_cut():
    text = "aé中🙂"
    data = text.encode()
    for length in range(len(data) + 1):
        whole, rest = whole_characters(data[:length])
        assert whole + rest == data[:length] and text.startswith(whole.decode()) and len(rest) < 4
    assert whole_characters(b"\xff") == (b"", b"\xff") and whole_characters(b"x\x80\x80\x80\x80")[1] == b""


@pytest.mark.parametrize("words, text", [(["a"], "a"), (["a", "b"], "a or b"), (["a", 2, "c"], "a, 2 or c")])
def test_alternatives_are_joined(words, text):
    assert either(words) == text


def test_the_last_traceback_is_found_between_other_lines():
    text = f"Traceback (most recent call last):\nKeyError: 'first'\nother\n{TRACE}\nlater"
    assert last_traceback(text) == TRACE.removesuffix("\nlines")
    assert last_traceback(text, to_end=True) == f"{TRACE}\nlater"
    assert last_traceback("no trace") is None
    assert last_traceback("log: caught Traceback (most recent call last): handled") is None


def test_torchs_prefix_before_each_line_of_a_traceback_is_removed():
    text = "step 1\n" + "\n".join(f"[rank12]: {line}" for line in TRACE.splitlines())
    assert last_traceback(text, to_end=True) == TRACE


def test_times():
    assert utc_at(0) == "1970-01-01T00:00:00+00:00"
    assert seconds_between("2026-01-01T00:00:00+00:00", "2026-01-01T01:00:00+01:00") == 0.0
    assert seconds_between("2026-01-01T00:00:00+00:00", "2026-01-01T00:00:02+00:00") == 2.0
    assert seconds_between("2026-01-01T00:00:02+00:00", "2026-01-01T00:00:00+00:00") == 0.0
    assert seconds_between(None, "2026-01-01T00:00:02+00:00") is None
    assert local_time(None) == "?" and len(local_time("2026-01-01T00:00:02+00:00")) == 19
