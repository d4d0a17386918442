"""The file behind a word that names a script or a module of the user's."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from importlib.machinery import PathFinder
from itertools import islice, product
from pathlib import Path

from trainers.contract.errors import UserError

RUNS = "`launch` runs Python scripts (.py), Python modules (launch -m pkg.train), specs (.yaml) and built-in tasks"
ADVICE = {".ipynb": "; export the notebook: jupyter nbconvert --to script", ".sh": "; give the Python script that it starts"}
MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


# Sections of a task's spec, and what to do instead in a script.
INSTEAD = {"wandb": "call wandb.init() in the script; set the variable WANDB_MODE=online or offline to choose its mode"}
OPTIONS = "give the script its own options after `--`: launch {} -- --lr 1e-3"


def check_keys(word: str, keys: Iterable[str], args: Sequence[str], known: Container[str]) -> None:
    """Check the keys that a command line sets for a script or a module.

    Args:
        word: the script or module, as on the command line.
        args: the words after `--`.
        known: the sections that a script's spec has.

    Raises:
        UserError: only tasks have such a key, or the script's options are given twice.
    """
    from trainers.config.schema import RunConfig, ScriptTrain

    for key in keys:
        section, _, rest = key.partition(".")
        only_tasks = section not in known if section != "train" else rest not in ScriptTrain.model_fields
        if section in RunConfig.model_fields and only_tasks:
            raise UserError(f"`{key}` is a key of tasks, and `{word}` is a script", INSTEAD.get(section, OPTIONS.format(word)))
        if key == "args" and args:
            raise UserError("the script's options are given twice: as `args` and after `--`", "keep one")


def check_sweep(word: str, overrides: Sequence[str], args: Sequence[str]) -> None:
    """Check that a sweep of a script varies a key.

    Raises:
        UserError: no key has several values; the hint shows how the script's own options are varied.
    """
    if any("," in override for override in overrides):
        return
    choices = product(*(arg.split(",") for arg in args or ["--lr", "0.1,0.2"]))
    points = ",".join(json.dumps(choice, separators=(",", ":"), ensure_ascii=False) for choice in islice(choices, 20))
    rest = "".join(f" {override}" for override in overrides)
    raise UserError("no key has several values: `launch sweep` does not vary the words after `--`",
                    f"give all words of each run as a list: launch sweep {word}{rest} {shlex.quote(f'args={points}')}")


def check_script(path: Path) -> None:
    """Check that a file is a Python script: by its name, or by a first line such as `#!/usr/bin/env python3`.

    Raises:
        UserError: there is no such file, it is a folder, or it is something else than a Python script.
    """
    if path.is_dir():
        package = (path / "__main__.py").is_file()
        raise UserError(f"`{path}` is a folder", f"run the package with `launch -m {path.name}`" if package else
                        "give a script, a spec (.yaml) or the name of a task")
    if not path.is_file():
        raise UserError(f"there is no file `{path}`", "give a script, a spec (.yaml) or the name of a task")
    if path.suffix in (".py", ".pyw"):
        return
    with path.open("rb") as file:
        first = file.readline(200)
    if not (first.startswith(b"#!") and b"python" in first):
        raise UserError(f"`{path}` is not a Python script", RUNS + ADVICE.get(path.suffix, ""))


def find_module(name: str, folder: Path) -> tuple[Path, Path | None] | None:
    """Find the file that `python -m NAME` would run in a folder. Nothing is imported.

    Returns:
        The file; and `folder` if the module lies there, or None if it is installed. None if there is no such module.
    """
    if not MODULE.fullmatch(name):
        return None
    for home in (folder, None):
        search = [str(home)] if home else sys.path
        parts = name.split(".")
        for position in range(len(parts)):
            spec = PathFinder.find_spec(".".join(parts[:position + 1]), search)
            if spec is None:
                break
            search = list(spec.submodule_search_locations or ())
        if spec is not None and spec.submodule_search_locations is not None:
            spec = PathFinder.find_spec(f"{name}.__main__", search)
        if spec is not None and spec.origin and Path(spec.origin).suffix == ".py":
            return Path(spec.origin), home
    return None


def other_environment(env: Mapping[str, str], prefix: str = sys.prefix) -> str | None:
    """Return a warning if another virtual environment is active than the one whose Python runs launch, and so the script."""
    conda = env.get("CONDA_PREFIX") if env.get("CONDA_DEFAULT_ENV") != "base" else None
    active = env.get("VIRTUAL_ENV") or conda
    if not active or Path(active).resolve() == Path(prefix).resolve():
        return None
    return f"the script runs in launch's environment {prefix}, not in the active {active}: install launch there to use that one"
