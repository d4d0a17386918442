"""The code a run was submitted with: copies of the user's folders as they were, uncommitted edits included.

    runs/<id>/code/snapshot.json   of each tree: commit, branch, untracked files, what was left out
    runs/<id>/code/<tree>/         its copy, which is what a queued run executes
    runs/<id>/code/<tree>.diff     what was not committed

Of a git work tree git says what belongs to it; of any other folder it is the files whose names look like code.
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
MAX_BYTES = 64 * 2**20  # of all trees
MAX_FILES = 5_000       # of all trees
MAX_SEEN = 50_000       # looked at in a folder outside git, which may be someone's home
MAX_LISTED = 1_000      # names in a list of the record
GIT_TIMEOUT_S = 20.0

CODE = set(""".py .pyi .pyx .pxd .ipynb .yaml .yml .json .toml .cfg .ini .conf .gin .txt .md .rst .sh .bash .c .cc .cpp .cxx .cu
 .cuh .h .hh .hpp .f90 .jl .r .lua .rs .go .js .ts .proto .sql .j2 .jinja .html .css""".split())
SECRETS = (".env", ".env.*", ".netrc", "_netrc", ".pypirc", "*.pem", "*.key", "id_rsa*", "id_ecdsa*", "id_ed25519*",
           "*credentials*")
SECRET = re.compile("|".join(map(translate, SECRETS)), re.IGNORECASE)
SKIPPED = {"__pycache__", "node_modules", "site-packages", "venv", "runs", "wandb"}  # folders outside git, as hidden ones
RUN = {RunPaths(Path()).record.name, RunPaths(Path()).spec.name}  # the folder that holds both is a run's


@dataclass(frozen=True)
class Snapshot:
    """The copies, and where each source went."""

    folder: Path                       # runs/<id>/code, absolute
    trees: tuple[dict[str, Any], ...]  # as in snapshot.json
    places: dict[str, str]             # the absolute path of a source or tree -> where it lies in `folder`

    @property
    def left_out(self) -> tuple[str, ...]:
        """Files that were not copied, each with the reason, as text to print."""
        return tuple(f"{_shown(tree['source'])}/{entry}" for tree in self.trees for entry in tree["left_out"])

    def moved(self, path: str | Path) -> Path:
        """Where a file or folder of the user's code lies in the snapshot; the path itself if it was not copied.

        A folder's copy lacks what git ignores, data for instance: this is for code, not for data.
        """
        for spelled in (os.path.realpath(path), os.path.abspath(path)):
            for source in sorted(self.places, key=len, reverse=True):
                if Path(spelled).is_relative_to(source):
                    found = self.folder / self.places[source] / os.path.relpath(spelled, source)
                    if not self.folder.exists():  # surveyed, not yet taken
                        return found
                    if found.exists() and found.resolve().is_relative_to(self.folder.resolve()):
                        return found
        return Path(path)


@dataclass
class _Tree:
    source: str     # what is copied, absolute, links resolved
    copy: str       # the name of its copy
    own: list[str]  # the files and folders in it for whose sake it is copied
    names: dict[str, bool] = field(default_factory=dict)  # its files, relative to `source`; False: untracked
    left_out: list[str] = field(default_factory=list)
    git: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(("commit", "branch", "dirty", "diff", "note")))


class _NoGit(Exception):
    """Why git says nothing about a folder."""


def survey(sources: Sequence[Path], into: Path) -> Snapshot:
    """Where `take` would put them; nothing is copied. Its `moved` is right for the sources, which always are copied.

    Raises:
        UserError: a source does not exist.
    """
    trees = _trees(sources)
    return Snapshot(Path(into).absolute(), (), _places(trees, sources))


def take(sources: Sequence[Path], into: Path) -> Snapshot:
    """Copy the code that `sources`, files or folders, belong to into the folder `into`, which does not exist yet:
    the git work tree that each is in, else the folder. Neither the folder of runs is copied nor what may hold secrets;
    a file among the sources always is.

    Raises:
        UserError: a source does not exist, or the copy cannot be written; nothing is left of it then.
    """
    into, trees, made = Path(into).absolute(), _trees(sources), False
    try:
        into.mkdir(parents=True)
        made = True
        for tree in trees:
            _list(tree, into)
        _copy(trees, into)
        places = _places(trees, sources)
        records = tuple({
            "source": tree.source, "copy": tree.copy, **tree.git, "left_out": _listed(tree.left_out),
            "untracked": _listed(_shown(name) for name, tracked in tree.names.items() if not tracked),
        } for tree in trees)
        text = json.dumps({"trees": records, "places": places}, indent=1, ensure_ascii=False) + "\n"
        # A path that is no UTF-8 has lone surrogates here, which only JSON's own escapes can hold.
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
    places = {tree.source: tree.copy for tree in trees}
    for real, source in ((os.path.realpath(source), os.path.abspath(source)) for source in sources):
        tree = next(tree for tree in trees if real in tree.own)
        places[source] = os.path.normpath(f"{tree.copy}/{os.path.relpath(real, tree.source)}")
    return places


def load(folder: Path) -> Snapshot | None:
    """The snapshot in the folder; None if there is none, or half of one: the record is written last.

    Raises:
        UserError: the record cannot be read.
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
    """The trees that hold the sources, each once, with names for their copies."""
    own: dict[str, list[str]] = {}
    for real in sorted(map(os.path.realpath, sources), key=lambda path: len(_folder(path))):  # a folder before those in it
        if not os.path.exists(real):
            raise UserError(f"there is no file or folder `{_shown(real)}`", "its code cannot be kept for the run")
        folder = Path(_folder(real))
        up = (folder, *folder.parents)
        git = (above for above in up if os.path.lexists(above / ".git"))
        top = next(git, None) or next((above for above in up if str(above) in own), folder)
        own.setdefault(str(top), []).append(real)
    trees: list[_Tree] = []
    used = {RECORD}
    for top, reals in own.items():
        word = re.sub(r"[^\w.-]+", "-", os.path.basename(top))[:60].strip("-.") or "code"
        tries = (f"{word}-{number}" if number else word for number in (0, *range(2, len(own) + 4)))
        name = next(name for name in tries if not {name.lower(), f"{name}.diff".lower()} & used)
        used |= {name.lower(), f"{name}.diff".lower()}
        trees.append(_Tree(top, name, reals))
    return trees


def _list(tree: _Tree, into: Path) -> None:
    """Find what belongs to the tree, and what git knows of it, whose diff goes into a file."""
    top, folders, code = tree.source, [*map(_folder, tree.own)], Path(os.path.realpath(into))
    # The folder of runs, unless it holds what is to be copied; then this run's.
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
    # What a run was asked to execute belongs to it, also if git ignores it, or its name is like no code.
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
                    "--dst-prefix=b/", "--submodule=short", "--", ".", *(f":(exclude,icase,glob)**/{it}" for it in SECRETS),
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
    """Raises: _NoGit."""
    # Variables that a hook sets would point to another repository, or give the arguments another meaning.
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_") or key.startswith("GIT_CONFIG")}
    try:
        ran = subprocess.run(["git", "-C", top, "-c", "core.fsmonitor=false", *args], capture_output=True, check=False,
                             env={**env, "LC_ALL": "C"}, stdin=subprocess.DEVNULL, timeout=GIT_TIMEOUT_S)
    except FileNotFoundError:
        raise _NoGit("git is not installed") from None
    except OSError as error:
        raise _NoGit(f"git cannot be started: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise _NoGit(f"git took more than {GIT_TIMEOUT_S:.0f} s") from None
    if ran.returncode:
        words = os.fsdecode(ran.stderr).partition("\n")[0].removeprefix("fatal: ")
        raise _NoGit("the repository has no commit yet" if "ambiguous argument 'HEAD'" in words else words)
    return ran.stdout


def _git_names(top: str, skip: str | None) -> dict[str, bool]:
    """The files of a work tree, and whether each is tracked, without those in `skip` and in untracked folders of runs.

    Raises: _NoGit.
    """
    inside = os.path.relpath(skip, top) + "/" if skip else None
    # That git does not even look there saves the time: there may be thousands of runs.
    but = [] if inside is None else ["--exclude=/" + re.sub(r"([\\*?\[\] ])", r"\\\1", inside)]
    said = os.fsdecode(_git(top, "ls-files", "-t", "--cached", "--others", "--exclude-standard", *but, "-z"))
    names: dict[str, bool] = {}
    for tag, _, name in (line.partition(" ") for line in said.split("\0")[:-1]):
        path = f"{top}/{name}".rstrip("/")
        if not os.path.isdir(path) or os.path.islink(path):
            if inside is None or not name.startswith(inside):
                names.setdefault(name, tag != "?")
        elif os.path.lexists(f"{path}/.git"):  # a submodule, or a repository of its own
            try:
                within: Iterable[str] = _git_names(path, skip if skip and Path(skip).is_relative_to(path) else None)
            except _NoGit:
                within = _walk(_Tree(path, "", []), path, skip)
            names |= {f"{name.rstrip('/')}/{each}": tag != "?" for each in within}
    folders = [{os.path.dirname(name) for name in names if os.path.basename(name) == word} for word in RUN]
    runs = tuple(f"{folder}/" for folder in set.intersection(*folders) if folder)
    return {name: tracked for name, tracked in names.items() if tracked or not name.startswith(runs)}


def _walk(tree: _Tree, start: str, skip: str | None) -> Iterator[str]:
    """The names, relative to the tree, of what looks like code below `start`, what is near first."""
    folders, seen = deque([start]), 0
    while folders:
        folder = folders.popleft()
        here = _shown(os.path.relpath(folder, tree.source))
        try:
            with os.scandir(folder) as listing:
                entries = sorted(islice(listing, MAX_SEEN + 1), key=lambda entry: entry.name)
        except OSError as error:
            tree.left_out.append(f"{here}/ ({error.strerror})")
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
            tree.left_out.append(f"{here}/ and on (more than {MAX_SEEN:,} files)")
            return


def _copy(trees: list[_Tree], into: Path) -> None:
    """Copy the files of all trees, Python's first, then the links. Raises: OSError if it cannot be written."""
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
                found = os.lstat(path)
                target = os.readlink(path) if stat.S_ISLNK(found.st_mode) else None
            except (FileNotFoundError, NotADirectoryError):
                continue  # deleted, which is not committed yet
            except OSError as error:
                tree.left_out.append(f"{_shown(name)} ({error.strerror})")
                continue
            if SECRET.match(os.path.basename(name)) and path not in tree.own:
                tree.left_out.append(f"{_shown(name)} (may hold secrets)")
            elif target is not None:
                links[tree.copy, name] = tree, name, target
            elif stat.S_ISREG(found.st_mode):
                last = path not in tree.own, not name.endswith(".py"), not path.startswith(own), not tracked
                files.append((last, tree, name, found))

    count = total = 0
    for _, tree, name, found in sorted(files, key=lambda file: file[0]):
        if links and any((tree.copy, str(above)) in links for above in Path(name).parents):
            continue  # a link has taken the place of its folder: to git it is deleted
        asked = f"{tree.source}/{name}" in tree.own
        why = (None if asked else _mib(found.st_size) if found.st_size > MAX_FILE_BYTES else
               f"more than {MAX_FILES:,} files" if count >= MAX_FILES else
               f"more than {_mib(MAX_BYTES)} in all" if total + found.st_size > MAX_BYTES else None)
        try:
            data = b"" if why else Path(tree.source, name).read_bytes()
        except FileNotFoundError:
            continue  # deleted just now
        except OSError as error:
            if asked:
                raise
            why = error.strerror
        if why:
            tree.left_out.append(f"{_shown(name)} ({why})")
            continue
        _make_folders(tree, name, into, copied)
        target = f"{into}/{tree.copy}/{name}"
        with open(target, "wb") as file:
            file.write(data)
        os.chmod(target, found.st_mode & 0o777)
        os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))
        copied[tree.copy].add(name)
        count, total = count + 1, total + len(data)

    for tree, name, _ in islice(links.values(), MAX_FILES, None):
        tree.left_out.append(f"{_shown(name)} (more than {MAX_FILES:,} links)")
    for tree, name, _ in islice(links.values(), MAX_FILES):
        _make_folders(tree, name, into, copied)
        copied[tree.copy].add(name)
    for tree, name, target in islice(links.values(), MAX_FILES):
        # A link within the copy stays within it, also an absolute one; any other means what it meant.
        there = os.path.dirname(f"{tree.source}/{name}")
        meant = os.path.normpath(os.path.join(there, target))
        within = os.path.relpath(meant, tree.source) in copied[tree.copy]
        os.symlink(os.path.relpath(meant, there) if within else meant, f"{into}/{tree.copy}/{name}")


def _make_folders(tree: _Tree, name: str, into: Path, copied: dict[str, set[str]]) -> None:
    folder = os.path.dirname(name)
    if folder and folder not in copied[tree.copy]:
        _make_folders(tree, folder, into, copied)
        os.mkdir(f"{into}/{tree.copy}/{folder}")
        copied[tree.copy].add(folder)


def _listed(words: Iterable[str]) -> list[str]:
    words = list(dict.fromkeys(words))
    more = len(words) - MAX_LISTED
    return [*words[:MAX_LISTED], f"... (and {more:,} more)"] if more > 0 else words


def _shown(name: str) -> str:
    """A name that may be printed: one line, no control characters, no broken text."""
    return name if name.isprintable() else repr(name)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _folder(path: str) -> str:
    return path if os.path.isdir(path) else os.path.dirname(path)
