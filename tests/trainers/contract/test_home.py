"""Paths that start with `~`, and the folder for downloads."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from trainers.contract.errors import UserError
from trainers.contract.home import downloads, expanded


def test_home_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert [str(expanded(path)) for path in ("~", "~/x", "x/~", "~nobody-of-this-name/x")] == [
        "/home/me", "/home/me/x", "x/~", "~nobody-of-this-name/x"]
    assert downloads(None, {}) == Path("/home/me/.cache/launch")
    assert downloads(None, {"LAUNCH_DATA": "~/sets"}) == Path("/home/me/sets")
    assert downloads("/elsewhere", {"LAUNCH_DATA": "~/sets"}) == Path("/elsewhere")


def test_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(user: int) -> None:
        raise KeyError(user)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(UserError, match="`~/x` is in your home folder, which is not known"):
        expanded("~/x")
    with pytest.raises(UserError, match="no folder for downloads") as error:
        downloads(None, {})
    assert error.value.hint == "set LAUNCH_DATA, or HOME"
    assert downloads(None, {"LAUNCH_DATA": "/sets"}) == Path("/sets") and expanded("/x") == Path("/x")
