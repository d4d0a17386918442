"""Files that are replaced whole, so that a reader never sees half of one. Imports no torch."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def flush_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write beside, flush, rename. On an error (a full disk) the old file stays and nothing is left over.

    Raises:
        OSError: the file could not be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def jsonable(value: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def replace_json(path: Path, value: Any) -> None:
    replace_text(path, json.dumps(jsonable(value), indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises: FileNotFoundError; ValueError if it is no JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def update_json(path: Path, **changes: Any) -> dict[str, Any]:
    """Change some keys of a JSON object; one writer at a time (run.json: the node process before the
    ranks start and after they have gone, rank 0 in between)."""
    value = {**read_json(path), **changes}
    replace_json(path, value)
    return value
