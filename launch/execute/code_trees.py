"""The files that belong to code: of a git work tree those that git names, of another folder those that look like code."""

from __future__ import annotations

import glob
import os
import re
import subprocess
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase, translate
from itertools import islice
from pathlib import Path
from typing import Any

from trainers.contract.errors import UserError
from trainers.contract.files import read_json
from trainers.contract.paths import RunPaths

MAX_FILE_BYTES = MAX_DIFF_BYTES = 5 * 2**20
MAX_SEEN = 50_000       # entries looked at in a folder outside git, which may be someone's home
MAX_LISTED = 1_000      # names in one list of snapshot.json
GIT_TIMEOUT_S = 20.0
RECORD = "snapshot.json"

CODE = set(""".py .pyi .pyx .pxd .ipynb .yaml .yml .json .toml .cfg .ini .conf .gin .txt .md .rst .sh .bash .c .cc .cpp .cxx .cu
 .cuh .h .hh .hpp .f90 .jl .r .lua .rs .go .js .ts .proto .sql .j2 .jinja .html .css""".split())
SECRETS = (".env", ".env.*", ".netrc", "_netrc", ".pypirc", "*.pem", "*.key", "id_rsa*", "id_ecdsa*", "id_ed25519*",
           "*credentials*")
NO_SECRET = r"(?!\.env\.(example|sample|template|dist)$)"
SECRET = re.compile(f"{NO_SECRET}({'|'.join(map(translate, SECRETS))})", re.IGNORECASE)
# Folders that are skipped outside git, together with hidden folders.
SKIPPED = {"__pycache__", "node_modules", "site-packages", "venv", "runs", "wandb"}
RUN = {RunPaths(Path()).record.name, RunPaths(Path()).spec.name}  # a folder that holds both files is a run directory


@dataclass
class Tree:
    """A folder to copy."""

    source: str     # the folder, absolute, links resolved
    copy: str       # the name of its copy
    own: list[str]  # the sources of the snapshot that lie in it, absolute
    names: dict[str, bool] = field(default_factory=dict)  # its files, relative to `source`: whether git tracks them
    left_out: list[str] = field(default_factory=list)     # files that are not copied, each with the reason
    missing: list[str] = field(default_factory=list)      # those of `left_out` that git tracks
    others: list[str] = field(default_factory=list)       # outside git: files that do not look like code
    included: set[str] = field(default_factory=set)       # files that are copied whatever their size and name
    git: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(("commit", "branch", "dirty", "diff", "note")))


class NoGit(Exception):
    """Git cannot describe a folder. The message says why."""


def find_trees(sources: Sequence[Path]) -> list[Tree]:
    """The trees that hold the sources, each with a name for its copy.

    Raises:
        UserError: a source does not exist.
    """
    own: dict[str, list[str]] = {}
    for real in sorted(map(os.path.realpath, sources), key=lambda path: len(folder_of(path))):  # outer folders first
        if not os.path.exists(real):
            raise UserError(f"`{printable(real)}` does not exist, so its code cannot be copied for the run",
                            "restore it, or correct the path")
        folder = Path(folder_of(real))
        upwards = (folder, *folder.parents)
        work_trees = (above for above in upwards if os.path.lexists(above / ".git") or (above.parent / RECORD).exists())
        top = next(work_trees, None) or next((above for above in upwards if str(above) in own), folder)
        own.setdefault(str(top), []).append(real)
    trees: list[Tree] = []
    used = {RECORD}
    for source, reals in own.items():
        word = re.sub(r"[^\w.-]+", "-", os.path.basename(source))[:60].strip("-.") or "code"
        candidates = (f"{word}-{number}" if number else word for number in (0, *range(2, len(own) + 4)))
        name = next(name for name in candidates if not {name.lower(), f"{name}.diff".lower()} & used)
        used |= {name.lower(), f"{name}.diff".lower()}
        trees.append(Tree(source, name, reals))
    return trees


def find_files(tree: Tree, into: Path, include: Sequence[str] = (), leave_out: Sequence[str] = ()) -> None:
    """Fill in the names of the tree's files and git's description of the tree. Write git's diff to a file.

    Args:
        include: patterns of further files and folders, relative to the tree.
        leave_out: patterns of files and folders that are not copied; a pattern without a slash fits in every folder.
    """
    top, folders, code = tree.source, [*map(folder_of, tree.own)], Path(os.path.realpath(into))
    # Skip the folder of runs. If a source lies in it, skip only this run's folder, or its folder of code.
    skip = next((str(path) for path in (code.parents[1], code.parent, code)
                 if Path(top) in path.parents and not any(Path(folder).is_relative_to(path) for folder in folders)), None)
    by_git = os.path.lexists(f"{top}/.git")
    if by_git:
        try:
            commit, branch, _ = os.fsdecode(_git(top, "rev-parse", "HEAD", "--abbrev-ref", "HEAD")).split("\n")
            tree.names = _git_names(top, skip)
            tree.git.update(commit=commit, branch=None if branch == "HEAD" else branch)
        except NoGit as error:
            tree.git["note"], by_git = f"not by git: {error}", False
    # A source is copied even if git ignores it, or if its name does not look like code.
    starts = [folder for folder in folders if not any(f"{top}/{name}".startswith(f"{folder}/") for name in tree.names)]
    if not by_git and (recorded := _recorded(top)):
        tree.names |= dict.fromkeys(recorded, False)
    elif not by_git:
        starts.append(top)
    for name in (name for start in dict.fromkeys(starts) for name in walk(tree, start, skip)):
        tree.names.setdefault(name, not by_git)
    for path, folder in zip(tree.own, folders):
        if path != folder:
            tree.names.setdefault(os.path.relpath(path, top), not by_git)
    tree.names = {name: tracked for name, tracked in tree.names.items()
                  if f"{top}/{name}" in tree.own or not any(_fits(name, pattern) for pattern in leave_out)}
    tree.included = {os.path.relpath(path, top) for pattern in include for path in glob_files(top, pattern)}
    for name in sorted(tree.included):
        tree.names.setdefault(name, False)
    tree.others = [name for name in tree.others if name not in tree.names
                   and not any(_fits(name, pattern) for pattern in leave_out)]
    if not by_git:
        return
    large = [name for name, tracked in tree.names.items()
             if tracked and os.path.isfile(f"{top}/{name}") and os.path.getsize(f"{top}/{name}") > MAX_FILE_BYTES]
    try:
        diff = _git(top, "diff", "HEAD", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/",
                    "--dst-prefix=b/", "--submodule=short", "--", ".",
                    *(f":(exclude,icase,glob)**/{pattern}" for pattern in SECRETS),
                    *(f":(exclude,literal){name}" for name in large[:MAX_LISTED]))
    except NoGit as error:
        diff, tree.git["note"] = b"", f"no diff: {error}"
    if diff:
        tree.git["diff"] = f"{tree.copy}.diff"
        (into / tree.git["diff"]).write_bytes(diff[:MAX_DIFF_BYTES])
    if len(diff) > MAX_DIFF_BYTES:
        tree.git["note"] = f"the diff is cut: it has {mib(len(diff))}"
    tree.git["dirty"] = bool(diff) or not all(tree.names.values())


def _recorded(top: str) -> list[str]:
    """The files of a folder that is itself a tree of a snapshot, as an evaluation finds the code of its run; else none."""
    try:
        trees = read_json(Path(top).parent / RECORD)["trees"]
        return next((list(tree["files"]) for tree in trees if tree["copy"] == os.path.basename(top)), [])
    except (OSError, ValueError, KeyError):
        return []


def _fits(name: str, pattern: str) -> bool:
    """Whether a pattern names the file, or a folder that holds it."""
    pattern = pattern.rstrip("/")
    paths = [name, *map(str, Path(name).parents)]
    return any(fnmatchcase(path if "/" in pattern else os.path.basename(path), pattern) for path in paths)


def glob_files(top: str, pattern: str) -> list[str]:
    """The files that a pattern names, and the files in folders that the pattern names. No file outside `top` counts."""
    found: list[str] = []
    for path in glob.iglob(os.path.join(glob.escape(top), pattern), recursive=True, include_hidden=True):
        if os.path.isdir(path) and not os.path.islink(path):
            found += (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
        else:
            found.append(path)
    return [path for path in map(os.path.normpath, found) if path.startswith(f"{top}/")]


def _git(top: str, *args: str) -> bytes:
    """The output of a git command in the folder `top`. Raises: NoGit."""
    # A git hook sets variables that would point to another repository, or change what the arguments mean.
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_") or key.startswith("GIT_CONFIG")}
    try:
        result = subprocess.run(["git", "-C", top, "-c", "core.fsmonitor=false", *args], capture_output=True, check=False,
                                env={**env, "LC_ALL": "C"}, stdin=subprocess.DEVNULL, timeout=GIT_TIMEOUT_S)
    except FileNotFoundError:
        raise NoGit("git is not installed") from None
    except OSError as error:
        raise NoGit(f"git cannot be started: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise NoGit(f"git took more than {GIT_TIMEOUT_S:.0f} s") from None
    if result.returncode:
        message = os.fsdecode(result.stderr).partition("\n")[0].removeprefix("fatal: ")
        raise NoGit("the repository has no commit yet" if "ambiguous argument 'HEAD'" in message else message)
    return result.stdout


def _git_names(top: str, skip: str | None) -> dict[str, bool]:
    """The files of a work tree, each with whether git tracks it. Leaves out `skip` and untracked run directories.

    Raises: NoGit.
    """
    inside = os.path.relpath(skip, top) + "/" if skip else None
    # Keep git from looking there: there may be thousands of runs.
    exclusion = [] if inside is None else ["--exclude=/" + re.sub(r"([\\*?\[\] ])", r"\\\1", inside)]
    output = os.fsdecode(_git(top, "ls-files", "-t", "--cached", "--others", "--exclude-standard", *exclusion, "-z"))
    names: dict[str, bool] = {}
    for tag, _, name in (line.partition(" ") for line in output.split("\0")[:-1]):
        path = f"{top}/{name}".rstrip("/")
        if not os.path.isdir(path) or os.path.islink(path):
            if inside is None or not name.startswith(inside):
                names.setdefault(name, tag != "?")
        elif os.path.lexists(f"{path}/.git"):  # a submodule, or a nested repository
            try:
                within: Iterable[str] = _git_names(path, skip if skip and Path(skip).is_relative_to(path) else None)
            except NoGit:
                within = walk(Tree(path, "", []), path, skip)
            names |= {f"{name.rstrip('/')}/{nested}": tag != "?" for nested in within}
    folders = [{os.path.dirname(name) for name in names if os.path.basename(name) == word} for word in RUN]
    runs = tuple(f"{folder}/" for folder in set.intersection(*folders) if folder)
    return {name: tracked for name, tracked in names.items() if tracked or not name.startswith(runs)}


def walk(tree: Tree, start: str, skip: str | None) -> Iterator[str]:
    """The names, relative to the tree, of files below `start` that look like code; files near `start` come first."""
    folders, seen = deque([start]), 0
    while folders:
        folder = folders.popleft()
        shown = printable(os.path.relpath(folder, tree.source))
        try:
            with os.scandir(folder) as listing:
                entries = sorted(islice(listing, MAX_SEEN + 1), key=lambda entry: entry.name)
        except OSError as error:
            tree.left_out.append(f"{shown}/ ({error.strerror})")
            continue
        names = {entry.name for entry in entries}
        if folder != start and (RUN <= names or names & {"pyvenv.cfg", "conda-meta"}):
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if not (entry.name.startswith(".") or entry.name in SKIPPED or entry.path == skip):
                    folders.append(entry.path)
            elif entry.is_symlink() or os.path.splitext(entry.name)[1].lower() in CODE:
                yield os.path.relpath(entry.path, tree.source)
            elif entry.is_file() and not entry.name.startswith("."):
                tree.others.append(os.path.relpath(entry.path, tree.source))
        seen += len(entries)
        if seen > MAX_SEEN:
            tree.left_out.append(f"{shown}/ and further folders (more than {MAX_SEEN:,} files)")
            return


def printable(name: str) -> str:
    """The name in a form that is safe to print: one line, no control characters, no broken text."""
    return name if name.isprintable() else repr(name)


def mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def folder_of(path: str) -> str:
    """The path itself if it is a folder, else the folder that holds it."""
    return path if os.path.isdir(path) else os.path.dirname(path)
