"""What proves a checkpoint whole: the size and hash of each of its files, under a seal. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Mapping

from trainers.contract import files

NAME = "manifest.json"
STATE = "state.json"
INDEX = "index.json"
FORMAT = 2


class Broken(Exception):
    """What is wrong with which file of a checkpoint."""


def entry(path: Path) -> dict[str, Any]:
    """{"size": bytes, "sha256": hex} of a file, read as it lies on the disk."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": digest}


def check(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    """Raises: Broken: the file is not the one that was written."""
    check_size(folder, name, expected)
    with _readable(name):
        if entry(folder / name)["sha256"] != expected["sha256"]:
            raise Broken(f"{name} has changed since it was written (sha256)")


def check_size(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    """Raises: Broken: the file is missing, or has not the size that was written."""
    with _readable(name):
        size = (folder / name).stat().st_size
        if size != expected["size"]:
            raise Broken(f"{name} has {size} bytes, not {expected['size']}")


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise Broken(f"{name} is missing") from None
    except OSError as error:
        raise Broken(f"{name} cannot be read: {error.strerror or error}") from None


def sealed(folder: Path, step: int) -> dict[str, Any]:
    """The manifest of checkpoint `step`, if all its files have the sizes that it says.

    Raises:
        Broken: they have not.
    """
    return _each(folder, step, check_size)


def verify(folder: Path, step: int) -> dict[str, Any]:
    """The manifest of checkpoint `step`, if all its files are as it says. Reads them all.

    Raises:
        Broken: they are not.
    """
    return _each(folder, step, check)


def _each(folder: Path, step: int, look: Callable[[Path, str, Mapping[str, Any]], None]) -> dict[str, Any]:
    content = read(folder, step)
    for name, expected in content["files"].items():
        look(folder, name, expected)
    return content


def write(folder: Path, *, step: int, entries: Mapping[str, Any], **about: Any) -> None:
    """Seal a checkpoint whose other files are written and flushed.

    Raises:
        OSError: the manifest could not be written.
    """
    content = {"format": FORMAT, "step": step, **about, "files": dict(sorted(entries.items()))}
    files.replace_text(folder / NAME, _text({**content, "digest": _digest(content)}))


def read(folder: Path, step: int) -> dict[str, Any]:
    """The manifest of checkpoint `step`. Whether the files are as it says, `check` tells.

    Raises:
        Broken: there is none, or it is not as it was written, or not for this step.
    """
    try:
        with _readable(NAME):
            text = (folder / NAME).read_text(encoding="utf-8")
        content = json.loads(text)
        seal = content.pop("digest")
        # The text is compared too: a byte may change and still be read as the same JSON.
        if seal != _digest(content) or text != _text({**content, "digest": seal}):
            raise Broken(f"{NAME} has changed since it was written (digest)")
        if content["format"] != FORMAT:
            raise Broken(f"{NAME} has format {content['format']}; this version reads {FORMAT}")
        if content["step"] != step:
            raise Broken(f"{NAME} is for step {content['step']}")
        for name in content["files"]:
            if not names_file(name):
                raise Broken(f"{NAME} lists {name!r}, which is no name of a file in this folder")
        for name in (STATE, INDEX):
            if name not in content["files"]:
                raise Broken(f"{name} is missing from {NAME}")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Broken(f"{NAME} is not a manifest") from None
    return content


def names_file(name: str) -> bool:
    """Whether it is a file's name, which leads out of no folder."""
    return Path(name).name == name and name not in ("", "..")


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(content).encode()).hexdigest()


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"
