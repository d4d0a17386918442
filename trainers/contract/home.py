"""Paths that start with `~`. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trainers.contract.errors import UserError


def expanded(path: str) -> Path:
    """Return the path with the home folder in place of a leading `~`. As in a shell, the name of an unknown user stays.

    Raises:
        UserError: the user has no home folder: HOME is not set, and the user is not in /etc/passwd, as in some containers.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        if Path(path).parts[0] != "~":
            return Path(path)
        raise UserError(f"`{path}` is in your home folder, which is not known", "set HOME, or give an absolute path") from None


def downloads(root: str | None, environment: Mapping[str, str]) -> Path:
    """Return the folder for downloads: `root`, otherwise $LAUNCH_DATA, otherwise ~/.cache/launch.

    Raises:
        UserError: the folder is in the user's home folder, which is not known.
    """
    if chosen := root or environment.get("LAUNCH_DATA"):
        return expanded(chosen)
    try:
        return expanded("~/.cache/launch")
    except UserError:
        raise UserError("there is no folder for downloads: your home folder is not known", "set LAUNCH_DATA, or HOME") from None
