"""The structure of the project: which imports are allowed, how large a folder may be, and what keeps `launch --help` quick."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "torchvision", "transformers", "accelerate", "deepspeed", "numpy", "wandb", "sklearn", "joblib", "scipy"}
LATE = {"pydantic", "ruamel", "rich"}
MOST_FILES = 20  # in one folder

# Top to bottom: a part imports only from its own part and from those below it.
LAUNCH = ("cli", "report", "execute", "supervise", "plan", "records", "cluster")
TRAINERS = ("run", "tasks", "forest and data", "engine", "runner", "checkpoints", "config", "contract")
# Of `trainers`, what `launch` may import: none of these imports torch.
SHARED = ("trainers.contract", "trainers.config", "trainers.checkpoints")


def modules(top: str) -> dict[str, Path]:
    """The file of each module of a package, by the module's full name."""
    found = {}
    for path in sorted((ROOT / top).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


OURS = {**modules("launch"), **modules("trainers")}
TASKS = {path.parent.name for path in (ROOT / "trainers").glob("*/*.yaml")}


def imported(path: Path, known: Mapping[str, object]) -> Iterator[tuple[int, str]]:
    """(line, module) of each import in a file, those inside functions too. Of `from a import b` the module `a.b`, if that
    is one of `known`. Imports for the type checker alone do not count: they are never executed."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    never = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
             for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in never:
            continue
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom(module=str(module), level=0):
                inner = {f"{module}.{alias.name}" for alias in node.names}
                yield from ((node.lineno, name) for name in sorted(inner & known.keys() or {module}))
            case ast.ImportFrom():
                raise AssertionError(f"{path}:{node.lineno} is a relative import: write the full name")


IMPORTS = {module: [(line, name) for line, name in imported(path, OURS) if name in OURS and name != module]
           for module, path in OURS.items()}


def rank(module: str) -> int | None:
    """How far up a module stands in its package; None: it belongs to no part (entry points, public names)."""
    package, _, rest = module.partition(".")
    part = rest.partition(".")[0]
    if package == "trainers":
        part = {"forest": "forest and data", "data": "forest and data", **dict.fromkeys(TASKS, "tasks"),
                **dict.fromkeys(("run", "probe", "prefetch", "trial", "accelerate_env"), "run")}.get(part, part)
    order = LAUNCH if package == "launch" else TRAINERS
    return len(order) - order.index(part) if part in order else None


def upward(imports: Mapping[str, list[tuple[int, str]]]) -> list[str]:
    """The imports that run from a lower part to a higher one."""
    found = []
    for module, targets in imports.items():
        for line, target in targets:
            low, high = rank(module), rank(target)
            same = module.partition(".")[0] == target.partition(".")[0]
            if same and low is not None and high is not None and high > low:
                found.append(f"{module}:{line} imports {target}")
    return found


def test_every_file_belongs_to_a_part() -> None:
    entries = {"launch", "trainers", "launch.__main__", "launch.job", "trainers.errors"}
    assert [module for module in OURS if rank(module) is None and module not in entries] == []


def test_imports_run_one_way() -> None:
    assert sum(map(len, IMPORTS.values())) > 300
    assert upward(IMPORTS) == []


def test_an_import_that_is_turned_round_is_found() -> None:
    turned = {"launch.cluster.slurm": [(7, "launch.plan.plan")], "trainers.contract.files": [(9, "trainers.engine.loop")]}
    assert upward(turned) == ["launch.cluster.slurm:7 imports launch.plan.plan",
                              "trainers.contract.files:9 imports trainers.engine.loop"]


def test_no_files_import_each_other_in_a_circle() -> None:
    # A package's __init__.py that lists its public names imports what imports the package: that is no circle.
    graph = {module: {target for _, target in targets if not module.startswith(f"{target}.")}
             for module, targets in IMPORTS.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_folder_grows_too_large() -> None:
    """Tests count too."""
    files = [path for top in ("launch", "trainers", "tests") for path in (ROOT / top).rglob("*.py")]
    count = Counter(path.parent for path in files if path.name != "__init__.py")
    assert {str(folder): number for folder, number in count.items() if number > MOST_FILES} == {}


def test_tests_mirror_the_packages() -> None:
    """A test file lies in the folder of the part that it tests."""
    for path in [*(ROOT / "tests" / "launch").rglob("test_*.py"), *(ROOT / "tests" / "trainers").rglob("test_*.py")]:
        folder = path.parent.relative_to(ROOT / "tests")
        assert (ROOT / folder).is_dir() and len(folder.parts) > 1, path


def test_launch_imports_of_trainers_only_what_needs_no_torch() -> None:
    configs = {f"trainers.{task}.config" for task in TASKS}
    # `--debug` runs a rank in the command's own process, and that rank is trainers.run.
    found = [f"{module}:{line} imports {name}" for module, targets in IMPORTS.items() if module.startswith("launch.")
             for line, name in targets if name.startswith("trainers") and not name.startswith(SHARED) and name not in configs]
    assert found == []


def test_trainers_never_imports_launch() -> None:
    found = [f"{module}:{line}" for module, targets in IMPORTS.items() if module.startswith("trainers")
             for line, name in targets if name.partition(".")[0] == "launch"]
    assert found == []


def test_no_task_imports_another() -> None:
    assert len(TASKS) > 1
    for task in TASKS:
        others = {f"trainers.{other}" for other in TASKS - {task}}
        found = [(module, name) for module, targets in IMPORTS.items() if module.startswith(f"trainers.{task}.")
                 for _, name in targets if ".".join(name.split(".")[:2]) in others]
        assert found == []


# What is loaded


def loaded_by(code: str) -> set[str]:
    """The top names of all modules that are loaded when some code has run."""
    report = "import sys; print('loaded:', *{name.partition('.')[0] for name in sys.modules})"
    with tempfile.TemporaryDirectory() as folder:  # without runs: a table of runs needs more
        ran = subprocess.run([sys.executable, "-P", "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True,
                             cwd=folder, env={key: value for key, value in os.environ.items() if key != "LAUNCH_RUNS"})
    return set(ran.stdout.splitlines()[-1].removeprefix("loaded: ").split())


def test_help_imports_little() -> None:
    loaded = loaded_by("from launch.cli.main import main; main(['--help'])")
    assert "click" in loaded
    assert not loaded & (HEAVY | LATE)


@pytest.mark.parametrize("words", ["show cifar10", "show wine", "schema wine", "cifar10 --help", "tasks", "runs",
                                   "schema cifar10"])
def test_commands_import_no_framework(words: str) -> None:
    loaded = loaded_by(f"from launch.cli.main import main; assert main({words.split()}) == 0")
    assert not loaded & (HEAVY | {"rich"})


def test_launch_imports_no_framework() -> None:
    """Of all its modules none, and so no module of trainers that does."""
    loaded = loaded_by("\n".join(f"import {module}" for module in modules("launch")))
    assert {"launch", "trainers"} <= loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("package", SHARED)
def test_what_both_packages_share_imports_no_framework(package: str) -> None:
    loaded = loaded_by("\n".join(f"import {module}" for module in modules("trainers") if module.startswith(package)))
    assert not loaded & HEAVY


def test_a_search_needs_no_torch() -> None:
    loaded = loaded_by("\n".join(f"import {module}" for module in OURS if module.startswith(("trainers.run", "trainers.wine"))))
    assert "sklearn" in loaded and not loaded & {"torch", "accelerate", "launch"}


# Public names, and what is installed


def test_public_names_for_users_tasks() -> None:
    """The README lists them."""
    code = ("from trainers.config import Group, RunConfig, SearchConfig, Section\n"
            "from trainers.engine.task import Dataset, Loss, Share, Task, Update\n"
            "from trainers.engine.map_style import MapStyle\n"
            "from trainers.engine.batches.noise import normal, uniform\n"
            "from trainers.engine.device import to_device\n"
            "from trainers.errors import TrainingError, UserError\n"
            "from trainers.forest import ForestSearchCV, load_forest, save_forest\n"
            "from trainers.runner import Place, Runner")
    loaded_by(code)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in code.splitlines():
        _, module, _, names = line.split(" ", 3)
        row = next((row for row in readme.splitlines() if row.startswith(f"| `{module}` |")), "")
        assert all(name in row for name in names.split(", ")), line


@pytest.mark.slow
def test_the_wheel_holds_every_file(tmp_path: Path) -> None:
    """A folder that .gitignore names would be missing from it."""
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    kept = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {str(path.relative_to(ROOT)) for top in ("launch", "trainers", "cluster_configs")
              for path in (ROOT / top).rglob("*") if path.is_file() and path.suffix in (".py", ".yaml", ".json")}
    assert kept == wanted
