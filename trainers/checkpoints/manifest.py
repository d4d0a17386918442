"""The manifest, which proves that a checkpoint is whole: size and hash of each file, and a seal. Imports no torch."""

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
    """A checkpoint is broken. The message says which file is wrong, and how."""


def entry(path: Path) -> dict[str, Any]:
    """Read a file from the disk, and return its manifest entry: {"size": bytes, "sha256": hex}."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": digest}


def check(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    """Check a file of a checkpoint against its manifest entry.

    Raises:
        Broken: the file is missing, cannot be read, or is not the file that was written.
    """
    check_size(folder, name, expected)
    with _readable(name):
        if entry(folder / name)["sha256"] != expected["sha256"]:
            raise Broken(f"{name} has changed since it was written (sha256)")


def check_size(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    """Check the size of a file of a checkpoint against its manifest entry.

    Raises:
        Broken: the file is missing, cannot be read, or does not have the size that was written.
    """
    with _readable(name):
        size = (folder / name).stat().st_size
        if size != expected["size"]:
            raise Broken(f"{name} has {size} bytes, not {expected['size']}")


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn an error while reading a file into Broken, which names the file."""
    try:
        yield
    except FileNotFoundError:
        raise Broken(f"{name} is missing") from None
    except OSError as error:
        raise Broken(f"{name} cannot be read: {error.strerror or error}") from None


def verify_sizes(folder: Path, step: int) -> dict[str, Any]:
    """Return the manifest of checkpoint `step` after checking the sizes of all files.

    Raises:
        Broken: the manifest is broken, or a file is missing or has another size.
    """
    return _check_all(folder, step, check_size)


def verify(folder: Path, step: int) -> dict[str, Any]:
    """Return the manifest of checkpoint `step` after checking the sizes and hashes of all files. Reads all files.

    Raises:
        Broken: the manifest is broken, or a file is not the file that was written.
    """
    return _check_all(folder, step, check)


def _check_all(folder: Path, step: int, check_file: Callable[[Path, str, Mapping[str, Any]], None]) -> dict[str, Any]:
    content = read(folder, step)
    for name, expected in content["files"].items():
        check_file(folder, name, expected)
    return content


def write(folder: Path, *, step: int, entries: Mapping[str, Any], **about: Any) -> None:
    """Write the manifest of a checkpoint. All other files must be written and flushed.

    Raises:
        OSError: the manifest cannot be written.
    """
    content = {"format": FORMAT, "step": step, **about, "files": dict(sorted(entries.items()))}
    files.replace_text(folder / NAME, sealed(content))


def read(folder: Path, step: int) -> dict[str, Any]:
    """Return the manifest of checkpoint `step`, without looking at the files that it lists.

    Raises:
        Broken: the manifest is missing, has changed since it was written, or is for another step.
    """
    try:
        with _readable(NAME):
            text = (folder / NAME).read_text(encoding="utf-8")
        content = unsealed(text, NAME)
        if content["format"] != FORMAT:
            raise Broken(f"{NAME} has format {content['format']}; this version reads {FORMAT}")
        if content["step"] != step:
            raise Broken(f"{NAME} is for step {content['step']}")
        for name in content["files"]:
            if not names_file(name):
                raise Broken(f"{NAME} lists {name!r}, which is not the name of a file in this folder")
        for name in (STATE, INDEX):
            if name not in content["files"]:
                raise Broken(f"{name} is missing from {NAME}")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Broken(f"{NAME} is not a manifest") from None
    return content


def names_file(name: str) -> bool:
    """Return whether a name is the plain name of a file: the name cannot lead out of a folder."""
    return Path(name).name == name and name not in ("", "..")


def sealed(content: Mapping[str, Any]) -> str:
    """Return a JSON object as text, with a digest that proves the text unchanged."""
    return _text({**content, "digest": _digest(content)})


def unsealed(text: str, name: str) -> dict[str, Any]:
    """Return the object in a text that `sealed` has made, without the digest.

    Args:
        name: the file's name, for the error.

    Raises:
        Broken: the text has changed.
        ValueError, KeyError, TypeError, AttributeError: the text is not one that `sealed` makes.
    """
    content = json.loads(text)
    seal = content.pop("digest")
    # The text is compared too, because a changed byte may still give the same JSON value.
    if seal != _digest(content) or text != _text({**content, "digest": seal}):
        raise Broken(f"{name} has changed since it was written (digest)")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(content).encode()).hexdigest()


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"
