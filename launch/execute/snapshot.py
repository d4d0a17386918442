"""Copies of the code that a run was submitted with, including edits that are not committed.

    runs/<id>/code/snapshot.json   for each tree: commit, branch, untracked files, files that were not copied
    runs/<id>/code/<tree>/         the copy of the tree, which a queued run executes
    runs/<id>/code/<tree>.diff     the changes that were not committed

A tree is a git work tree or another folder. Git says which files belong to a work tree. In another folder, these are
the files whose names look like code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from itertools import islice
from pathlib import Path
from typing import Any

from trainers.contract.errors import UserError
from trainers.contract.files import read_json, replace_text
from trainers.contract.paths import RunPaths

RECORD = "snapshot.json"
MAX_FILE_BYTES = MAX_DIFF_BYTES = 5 * 2**20
MAX_BYTES = 64 * 2**20  # of all trees together
MAX_FILES = 5_000       # of all trees together
MAX_SEEN = 50_000       # entries looked at in a folder outside git, which may be someone's home
MAX_LISTED = 1_000      # names in one list of snapshot.json
GIT_TIMEOUT_S = 20.0

CODE = set(""".py .pyi .pyx .pxd .ipynb .yaml .yml .json .toml .cfg .ini .conf .gin .txt .md .rst .sh .bash .c .cc .cpp .cxx .cu
 .cuh .h .hh .hpp .f90 .jl .r .lua .rs .go .js .ts .proto .sql .j2 .jinja .html .css""".split())
SECRETS = (".env", ".env.*", ".netrc", "_netrc", ".pypirc", "*.pem", "*.key", "id_rsa*", "id_ecdsa*", "id_ed25519*",
           "*credentials*")
SECRET = re.compile("|".join(map(translate, SECRETS)), re.IGNORECASE)
# Folders that are skipped outside git, together with hidden folders.
SKIPPED = {"__pycache__", "node_modules", "site-packages", "venv", "runs", "wandb"}
RUN = {RunPaths(Path()).record.name, RunPaths(Path()).spec.name}  # a folder that holds both files is a run directory


@dataclass(frozen=True)
class Snapshot:
    """The copies of a run's code, and where each source lies in them."""

    folder: Path                       # runs/<id>/code, absolute
    trees: tuple[dict[str, Any], ...]  # as in snapshot.json
    places: dict[str, str]             # by the absolute path of a source or tree: its path in `folder`

    @property
    def left_out(self) -> tuple[str, ...]:
        """Files that were not copied, each with the reason, as text to print."""
        return tuple(f"{_shown(tree['source'])}/{entry}" for tree in self.trees for entry in tree["left_out"])

    def moved(self, path: str | Path) -> Path:
        """The path of a file or folder of the user's code in the snapshot; the path itself if it was not copied.

        Use this for code only: the copy of a folder lacks the files that git ignores, such as data.
        """
        for absolute in (os.path.realpath(path), os.path.abspath(path)):
            for source in sorted(self.places, key=len, reverse=True):
                if Path(absolute).is_relative_to(source):
                    copied = self.folder / self.places[source] / os.path.relpath(absolute, source)
                    if not self.folder.exists():  # `survey` was called, `take` was not yet
                        return copied
                    if copied.exists() and copied.resolve().is_relative_to(self.folder.resolve()):
                        return copied
        return Path(path)


@dataclass
class _Tree:
    """A folder to copy."""

    source: str     # the folder, absolute, links resolved
    copy: str       # the name of its copy
    own: list[str]  # the sources of the snapshot that lie in it, absolute
    names: dict[str, bool] = field(default_factory=dict)  # its files, relative to `source`: whether git tracks them
    left_out: list[str] = field(default_factory=list)     # files that are not copied, each with the reason
    git: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(("commit", "branch", "dirty", "diff", "note")))


class _NoGit(Exception):
    """Git cannot describe a folder. The message says why."""


def survey(sources: Sequence[Path], into: Path) -> Snapshot:
    """The snapshot that `take` would make, without copying anything.

    Its `moved` is right for the sources, since `take` always copies them.

    Raises:
        UserError: a source does not exist.
    """
    trees = _trees(sources)
    return Snapshot(Path(into).absolute(), (), _places(trees, sources))


def take(sources: Sequence[Path], into: Path) -> Snapshot:
    """Copy the code that the sources belong to: of each source, the git work tree that holds it, or else the folder.

    The folder of runs is not copied, and files that may hold secrets are not. A file among the sources is always copied.

    Args:
        sources: files or folders.
        into: a new folder.

    Raises:
        UserError: a source does not exist, or the copy cannot be written. No partial copy is left.
    """
    into, trees, made = Path(into).absolute(), _trees(sources), False
    try:
        into.mkdir(parents=True)
        made = True
        for tree in trees:
            _find_files(tree, into)
        _copy(trees, into)
        places = _places(trees, sources)
        records = tuple({
            "source": tree.source, "copy": tree.copy, **tree.git, "left_out": _listed(tree.left_out),
            "untracked": _listed(_shown(name) for name, tracked in tree.names.items() if not tracked),
        } for tree in trees)
        text = json.dumps({"trees": records, "places": places}, indent=1, ensure_ascii=False) + "\n"
        # A path that is not UTF-8 has lone surrogates in it. Only JSON's escapes can hold these.
        replace_text(into / RECORD, re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text))
    except BaseException as error:
        if made:
            shutil.rmtree(into, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(f"the code cannot be copied into `{into}`: {error.strerror or error}",
                        "make room there, or choose another place with --runs DIR or LAUNCH_RUNS") from error
    return Snapshot(into, records, places)


def _places(trees: Sequence[_Tree], sources: Sequence[Path]) -> dict[str, str]:
    """The `places` of a snapshot."""
    places = {tree.source: tree.copy for tree in trees}
    for real, source in ((os.path.realpath(source), os.path.abspath(source)) for source in sources):
        tree = next(tree for tree in trees if real in tree.own)
        places[source] = os.path.normpath(f"{tree.copy}/{os.path.relpath(real, tree.source)}")
    return places


def load(folder: Path) -> Snapshot | None:
    """The snapshot in the folder; None if the folder holds none, or only a part of one.

    snapshot.json is written last, so a snapshot without it is not complete.

    Raises:
        UserError: snapshot.json cannot be read.
    """
    folder = Path(folder).absolute()
    try:
        record = read_json(folder / RECORD)
        return Snapshot(folder, tuple(record["trees"]), record["places"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read `{folder / RECORD}`: {error!r}", "restore that file, or start a new run") from None


def _trees(sources: Sequence[Path]) -> list[_Tree]:
    """The trees that hold the sources, each with a name for its copy.

    Raises:
        UserError: a source does not exist.
    """
    own: dict[str, list[str]] = {}
    for real in sorted(map(os.path.realpath, sources), key=lambda path: len(_folder(path))):  # outer folders first
        if not os.path.exists(real):
            raise UserError(f"`{_shown(real)}` does not exist, so its code cannot be copied for the run",
                            "restore it, or correct the path")
        folder = Path(_folder(real))
        upwards = (folder, *folder.parents)
        work_trees = (above for above in upwards if os.path.lexists(above / ".git"))
        top = next(work_trees, None) or next((above for above in upwards if str(above) in own), folder)
        own.setdefault(str(top), []).append(real)
    trees: list[_Tree] = []
    used = {RECORD}
    for source, reals in own.items():
        word = re.sub(r"[^\w.-]+", "-", os.path.basename(source))[:60].strip("-.") or "code"
        candidates = (f"{word}-{number}" if number else word for number in (0, *range(2, len(own) + 4)))
        name = next(name for name in candidates if not {name.lower(), f"{name}.diff".lower()} & used)
        used |= {name.lower(), f"{name}.diff".lower()}
        trees.append(_Tree(source, name, reals))
    return trees


def _find_files(tree: _Tree, into: Path) -> None:
    """Fill in the names of the tree's files and git's description of the tree. Write git's diff to a file."""
    top, folders, code = tree.source, [*map(_folder, tree.own)], Path(os.path.realpath(into))
    # Skip the folder of runs. If a source lies in it, skip only this run's folder, or its folder of code.
    skip = next((str(path) for path in (code.parents[1], code.parent, code)
                 if Path(top) in path.parents and not any(Path(folder).is_relative_to(path) for folder in folders)), None)
    by_git = os.path.lexists(f"{top}/.git")
    if by_git:
        try:
            commit, branch, _ = _git(top, "rev-parse", "HEAD", "--abbrev-ref", "HEAD").decode().split("\n")
            tree.names = _git_names(top, skip)
            tree.git.update(commit=commit, branch=None if branch == "HEAD" else branch)
        except _NoGit as error:
            tree.git["note"], by_git = f"not by git: {error}", False
    # A source is copied even if git ignores it, or if its name does not look like code.
    starts = [folder for folder in folders if not any(f"{top}/{name}".startswith(f"{folder}/") for name in tree.names)]
    starts += [] if by_git else [top]
    for name in (name for start in dict.fromkeys(starts) for name in _walk(tree, start, skip)):
        tree.names.setdefault(name, not by_git)
    for path, folder in zip(tree.own, folders):
        if path != folder:
            tree.names.setdefault(os.path.relpath(path, top), not by_git)
    if not by_git:
        return
    large = [name for name, tracked in tree.names.items()
             if tracked and os.path.isfile(f"{top}/{name}") and os.path.getsize(f"{top}/{name}") > MAX_FILE_BYTES]
    try:
        diff = _git(top, "diff", "HEAD", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/",
                    "--dst-prefix=b/", "--submodule=short", "--", ".",
                    *(f":(exclude,icase,glob)**/{pattern}" for pattern in SECRETS),
                    *(f":(exclude,literal){name}" for name in large[:MAX_LISTED]))
    except _NoGit as error:
        diff, tree.git["note"] = b"", f"no diff: {error}"
    if diff:
        tree.git["diff"] = f"{tree.copy}.diff"
        (into / tree.git["diff"]).write_bytes(diff[:MAX_DIFF_BYTES])
    if len(diff) > MAX_DIFF_BYTES:
        tree.git["note"] = f"the diff is cut: it has {_mib(len(diff))}"
    tree.git["dirty"] = bool(diff) or not all(tree.names.values())


def _git(top: str, *args: str) -> bytes:
    """The output of a git command in the folder `top`. Raises: _NoGit."""
    # A git hook sets variables that would point to another repository, or change what the arguments mean.
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_") or key.startswith("GIT_CONFIG")}
    try:
        result = subprocess.run(["git", "-C", top, "-c", "core.fsmonitor=false", *args], capture_output=True, check=False,
                                env={**env, "LC_ALL": "C"}, stdin=subprocess.DEVNULL, timeout=GIT_TIMEOUT_S)
    except FileNotFoundError:
        raise _NoGit("git is not installed") from None
    except OSError as error:
        raise _NoGit(f"git cannot be started: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise _NoGit(f"git took more than {GIT_TIMEOUT_S:.0f} s") from None
    if result.returncode:
        message = os.fsdecode(result.stderr).partition("\n")[0].removeprefix("fatal: ")
        raise _NoGit("the repository has no commit yet" if "ambiguous argument 'HEAD'" in message else message)
    return result.stdout


def _git_names(top: str, skip: str | None) -> dict[str, bool]:
    """The files of a work tree, each with whether git tracks it. Leaves out `skip` and untracked run directories.

    Raises: _NoGit.
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
            except _NoGit:
                within = _walk(_Tree(path, "", []), path, skip)
            names |= {f"{name.rstrip('/')}/{nested}": tag != "?" for nested in within}
    folders = [{os.path.dirname(name) for name in names if os.path.basename(name) == word} for word in RUN]
    runs = tuple(f"{folder}/" for folder in set.intersection(*folders) if folder)
    return {name: tracked for name, tracked in names.items() if tracked or not name.startswith(runs)}


def _walk(tree: _Tree, start: str, skip: str | None) -> Iterator[str]:
    """The names, relative to the tree, of files below `start` that look like code; files near `start` come first."""
    folders, seen = deque([start]), 0
    while folders:
        folder = folders.popleft()
        shown = _shown(os.path.relpath(folder, tree.source))
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
        seen += len(entries)
        if seen > MAX_SEEN:
            tree.left_out.append(f"{shown}/ and further folders (more than {MAX_SEEN:,} files)")
            return


def _copy(trees: list[_Tree], into: Path) -> None:
    """Copy the files of all trees, then the links.

    Sources are copied first, then Python files: files after MAX_FILES or MAX_BYTES are left out.

    Raises:
        OSError: a copy cannot be written, or a source cannot be read.
    """
    files: list[tuple[tuple[bool, ...], _Tree, str, os.stat_result]] = []
    links: dict[tuple[str, str], tuple[_Tree, str, str]] = {}
    copied: dict[str, set[str]] = {tree.copy: {"."} for tree in trees}  # files, folders and links
    for tree in trees:
        os.mkdir(into / tree.copy)
        own = tuple(path if os.path.isfile(path) else f"{path}/" for path in tree.own)
        for folder in filter(os.path.isdir, tree.own):
            _make_folders(tree, os.path.relpath(folder, tree.source) + "/", into, copied)
        for name, tracked in tree.names.items():
            path = f"{tree.source}/{name}"
            try:
                info = os.lstat(path)
                target = os.readlink(path) if stat.S_ISLNK(info.st_mode) else None
            except (FileNotFoundError, NotADirectoryError):
                continue  # deleted, but the deletion is not committed yet
            except OSError as error:
                tree.left_out.append(f"{_shown(name)} ({error.strerror})")
                continue
            if SECRET.match(os.path.basename(name)) and path not in tree.own:
                tree.left_out.append(f"{_shown(name)} (may hold secrets)")
            elif target is not None:
                links[tree.copy, name] = tree, name, target
            elif stat.S_ISREG(info.st_mode):
                order = path not in tree.own, not name.endswith(".py"), not path.startswith(own), not tracked
                files.append((order, tree, name, info))

    count = total = 0
    for _, tree, name, info in sorted(files, key=lambda file: file[0]):
        if links and any((tree.copy, str(above)) in links for above in Path(name).parents):
            continue  # a link has replaced the file's folder: for git, the file is deleted
        is_source = f"{tree.source}/{name}" in tree.own
        why = (None if is_source else _mib(info.st_size) if info.st_size > MAX_FILE_BYTES else
               f"more than {MAX_FILES:,} files" if count >= MAX_FILES else
               f"more than {_mib(MAX_BYTES)} in all" if total + info.st_size > MAX_BYTES else None)
        try:
            data = b"" if why else Path(tree.source, name).read_bytes()
        except FileNotFoundError:
            continue  # deleted just now
        except OSError as error:
            if is_source:
                raise
            why = error.strerror
        if why:
            tree.left_out.append(f"{_shown(name)} ({why})")
            continue
        _make_folders(tree, name, into, copied)
        copy = f"{into}/{tree.copy}/{name}"
        with open(copy, "wb") as file:
            file.write(data)
        os.chmod(copy, info.st_mode & 0o777)
        os.utime(copy, ns=(info.st_atime_ns, info.st_mtime_ns))
        copied[tree.copy].add(name)
        count, total = count + 1, total + len(data)

    for tree, name, _ in islice(links.values(), MAX_FILES, None):
        tree.left_out.append(f"{_shown(name)} (more than {MAX_FILES:,} links)")
    for tree, name, _ in islice(links.values(), MAX_FILES):
        _make_folders(tree, name, into, copied)
        copied[tree.copy].add(name)
    for tree, name, target in islice(links.values(), MAX_FILES):
        # A link whose target was copied points to the copy. Any other link points to its old target, by an absolute path.
        folder = os.path.dirname(f"{tree.source}/{name}")
        absolute = os.path.normpath(os.path.join(folder, target))
        inside = os.path.relpath(absolute, tree.source) in copied[tree.copy]
        os.symlink(os.path.relpath(absolute, folder) if inside else absolute, f"{into}/{tree.copy}/{name}")


def _make_folders(tree: _Tree, name: str, into: Path, copied: dict[str, set[str]]) -> None:
    """Make the folder of a file in the tree's copy, and note it in `copied`."""
    folder = os.path.dirname(name)
    if folder and folder not in copied[tree.copy]:
        _make_folders(tree, folder, into, copied)
        os.mkdir(f"{into}/{tree.copy}/{folder}")
        copied[tree.copy].add(folder)


def _listed(words: Iterable[str]) -> list[str]:
    """The words without duplicates, at most MAX_LISTED. If words are cut off, a last entry says how many."""
    unique = list(dict.fromkeys(words))
    more = len(unique) - MAX_LISTED
    return [*unique[:MAX_LISTED], f"... (and {more:,} more)"] if more > 0 else unique


def _shown(name: str) -> str:
    """The name in a form that is safe to print: one line, no control characters, no broken text."""
    return name if name.isprintable() else repr(name)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _folder(path: str) -> str:
    """The path itself if it is a folder, else the folder that holds it."""
    return path if os.path.isdir(path) else os.path.dirname(path)
