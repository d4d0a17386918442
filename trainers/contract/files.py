"""Replace files as a whole, so that a reader never sees half a file. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The format of run.json, attempt.json and submission.json. A reader ignores keys that it does not know and gives missing keys
# a default. The number grows only when an older reader would misunderstand a file.
FORMAT = 1


def check_format(value: Mapping[str, Any]) -> None:
    """Check that this version of launch understands the content of a file. Raises: ValueError."""
    if (number := value.get("format", FORMAT)) > FORMAT:
        raise ValueError(f"a newer version of launch has written it (format {number}; this version knows format {FORMAT})")


def exchange_folder(folder: Path, new: Path, old: Path) -> None:
    """Rename `folder` to `old`, and `new` to `folder`. If the second fails, the first is undone. Raises: OSError."""
    os.rename(folder, old)
    try:
        os.rename(new, folder)
    except BaseException:
        os.rename(old, folder)
        raise


def flush_folder(folder: Path) -> None:
    """Flush a folder to disk, so that the names of its files survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """Return a name next to a file that no other process uses: another host may have a process with the same number."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}")


def replace_text(path: Path, text: str) -> None:
    """Replace a file: write a temporary file next to it, flush, rename.

    On an error (a full disk), the old file stays and no temporary file is left.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def jsonable(value: Any) -> Any:
    """Return the same value with None in place of numbers that JSON does not have (infinity, not a number)."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def replace_json(path: Path, value: Any) -> None:
    """Replace a file by a value as JSON. Raises: OSError: the file cannot be written."""
    replace_text(path, json.dumps(jsonable(value), indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        OSError: the file cannot be read (FileNotFoundError: it does not exist).
        ValueError: the file is not JSON.
    """
    return json.loads(path.read_text(encoding="utf-8"))


def update_json(path: Path, **changes: Any) -> dict[str, Any]:
    """Change some keys of the JSON object in a file, and return the new object.

    Only one process may write at a time. For run.json, that is the node process before the ranks start and after they
    end, and rank 0 in between.
    """
    value = {**read_json(path), **changes}
    replace_json(path, value)
    return value
