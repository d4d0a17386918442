"""The walls between the two packages, and what keeps `launch --help` quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import launch
import trainers

HEAVY = {"torch", "torchvision", "transformers", "accelerate", "deepspeed", "numpy", "wandb", "sklearn", "joblib", "scipy"}
LATE = {"pydantic", "ruamel", "rich"}


def loaded_by(code: str) -> set[str]:
    """The top names of all modules that are loaded when some code has run."""
    report = "import sys; print('loaded:', *{name.partition('.')[0] for name in sys.modules})"
    ran = subprocess.run([sys.executable, "-P", "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(ran.stdout.splitlines()[-1].removeprefix("loaded: ").split())


def test_help_imports_little() -> None:
    loaded = loaded_by("from launch.cli import main; main(['--help'])")
    assert "click" in loaded
    assert not loaded & (HEAVY | LATE)


@pytest.mark.parametrize("words", ["show cifar10", "show wine", "schema wine", "cifar10 --help", "tasks", "runs",
                                   "schema cifar10"])
def test_commands_import_no_framework(words: str) -> None:
    loaded = loaded_by(f"from launch.cli import main; assert main({words.split()}) == 0")
    assert not loaded & (HEAVY | {"rich"})


def test_launch_imports_no_framework() -> None:
    """Of all its modules none, and so no module of trainers that does."""
    modules = [f"launch.{path.stem}" for path in Path(launch.__file__).parent.glob("*.py") if path.stem != "__init__"]
    assert {"launch.cli", "launch.spec", "launch.__main__"} <= set(modules)
    loaded = loaded_by("\n".join(f"import {module}" for module in modules))
    assert {"launch", "trainers"} <= loaded
    assert not loaded & HEAVY


def test_trainers_never_imports_launch() -> None:
    files = list(Path(trainers.__file__).parent.rglob("*.py"))
    assert len(files) > 10
    found = [f"{path}:{node.lineno}" for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if any(name.partition(".")[0] == "launch" for name in imported(node))]
    assert found == []


def imported(node: ast.AST) -> list[str]:
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom(level=0):
            return [node.module or ""]
    return []


def test_a_search_needs_no_torch() -> None:
    modules = ["trainers.run", *(f"trainers.wine.{path.stem}" for path in Path(trainers.__file__).parent.glob("wine/*.py"))]
    loaded = loaded_by("\n".join(f"import {module}" for module in modules if not module.endswith("__init__")))
    assert "sklearn" in loaded and not loaded & {"torch", "accelerate", "launch"}


def test_no_task_imports_another() -> None:
    folders = [path.parent for path in Path(trainers.__file__).parent.glob("*/*.yaml")]
    assert folders
    for folder in folders:
        others = {f"trainers.{other.name}" for other in folders} - {f"trainers.{folder.name}"}
        for path in folder.rglob("*.py"):
            names = {name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for name in imported(node)}
            assert not {".".join(name.split(".")[:2]) for name in names} & others, path
