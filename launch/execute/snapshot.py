"""Copies of the code that a run was submitted with, including edits that are not committed.

    runs/<id>/code/snapshot.json   for each tree: commit, branch, hashes of files, files that were not copied; versions
    runs/<id>/code/<tree>/         the copy of the tree, which a queued run executes; a run on this machine needs no copy
    runs/<id>/code/<tree>.diff     the changes that were not committed

A tree is a git work tree or another folder. Git says which files belong to a work tree. In another folder, these are
the files whose names look like code.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from launch.execute import code_trees
from launch.execute.code_trees import MAX_LISTED, RECORD, SECRET, Tree, find_files, find_trees, mib, printable
from trainers.contract.errors import UserError
from trainers.contract.files import read_json, replace_text

MAX_BYTES = 64 * 2**20  # of all trees together
MAX_FILES = 5_000       # of all trees together
MAX_PRINTED = 5         # names in one warning
LIBRARIES = ("launch-training", "torch", "torchvision", "numpy", "transformers", "accelerate", "deepspeed", "scikit-learn")


@dataclass(frozen=True)
class Snapshot:
    """The copies of a run's code, and where each source lies in them."""

    folder: Path                       # runs/<id>/code, absolute
    trees: tuple[dict[str, Any], ...]  # as in snapshot.json
    places: dict[str, str]             # by the absolute path of a source or tree: its path in `folder`
    versions: dict[str, str] = field(default_factory=dict)  # of Python and of libraries

    @property
    def is_copy(self) -> bool:
        """Whether the folder holds the files themselves, and not only their hashes."""
        return not self.trees or any((self.folder / tree["copy"]).exists() for tree in self.trees)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Files that were not copied, each with the reason, as text to print."""
        return tuple(f"{printable(tree['source'])}/{entry}" for tree in self.trees for entry in tree["left_out"])

    @property
    def warnings(self) -> list[str]:
        """What was not copied, and why, as lines to print."""
        lines = []
        for tree in self.trees:
            source, names = printable(tree["source"]), tree["left_out"]
            if note := tree["note"]:
                trust = f"; `git config --global --add safe.directory {source}` lets git read it" if "dubious" in note else ""
                lines.append(f"{source} is copied {note}{trust}" if note.startswith("not by git") else f"{source}: {note}")
            if names:
                lines.append(f"not copied with the code of {source}: {some(names)}; "
                             "run.include=[PATTERN] copies a file, run.leave_out=[PATTERN] ends this warning")
        return lines

    def moved(self, path: str | Path) -> Path:
        """The path of a file or folder of the user's code in the snapshot; the path itself if it was not copied.

        Use this for code only: the copy of a folder lacks the files that git ignores, such as data.
        """
        for absolute in (os.path.realpath(path), os.path.abspath(path)):
            for source in sorted(self.places, key=len, reverse=True):
                if Path(absolute).is_relative_to(source):
                    copied = self.folder / self.places[source] / os.path.relpath(absolute, source)
                    if not self.trees:  # `survey` was called, `take` was not yet
                        return copied
                    if copied.exists() and copied.resolve().is_relative_to(self.folder.resolve()):
                        return copied
        return Path(path)


def survey(sources: Sequence[Path], into: Path) -> Snapshot:
    """The snapshot that `take` would make, without copying anything.

    Its `moved` is right for the sources, since `take` always copies them.

    Raises:
        UserError: a source does not exist.
    """
    trees = find_trees(sources)
    return Snapshot(Path(into).absolute(), (), _places(trees, sources))


def take(sources: Sequence[Path], into: Path, *, include: Sequence[str] = (), leave_out: Sequence[str] = (),
         strict: bool = False, copy: bool = True) -> Snapshot:
    """Copy the code that the sources belong to: of each source, the git work tree that holds it, or else the folder.

    The folder of runs is not copied, and files that may hold secrets are not. A file among the sources is always copied.

    Args:
        sources: files or folders.
        into: a new folder.
        include: patterns of further files to copy, relative to a tree.
        leave_out: patterns of files that are not copied, relative to a tree.
        strict: whether it is an error that a file that git tracks cannot be copied, or that a pattern of `include` fits
            no file.
        copy: whether to copy the files; otherwise they are only described, by their hashes.

    Raises:
        UserError: a source does not exist, the copy cannot be written, or see `strict`. No partial copy is left.
    """
    into, trees, made = Path(into).absolute(), find_trees(sources), False
    try:
        into.mkdir(parents=True)
        made = True
        for tree in trees:
            find_files(tree, into, include, leave_out)
        for pattern in include if strict else ():
            if not any(code_trees.glob_files(tree.source, pattern) for tree in trees):
                raise UserError(f"`run.include`: no file fits `{pattern}`",
                                f"patterns are relative to {' or '.join(printable(tree.source) for tree in trees)}")
        hashes = _copy(trees, into, copy)
        if strict and (missing := [f"{printable(tree.source)}/{entry}" for tree in trees for entry in tree.missing]):
            raise UserError(f"git tracks a file that would not be copied with the code: {some(missing)}",
                            "copy such files with run.include=[PATTERN], or do without them: run.leave_out=[PATTERN]")
        places = _places(trees, sources)
        records = tuple({
            "source": tree.source, "copy": tree.copy, **tree.git, "left_out": _listed(tree.left_out),
            "untracked": _listed(printable(name) for name, tracked in tree.names.items() if not tracked),
            "files": hashes[tree.copy],
        } for tree in trees)
        versions = _versions()
        text = json.dumps({"trees": records, "places": places, "versions": versions}, indent=1, ensure_ascii=False) + "\n"
        # A path that is not UTF-8 has lone surrogates in it. Only JSON's escapes can hold these.
        replace_text(into / RECORD, re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text))
    except BaseException as error:
        if made:
            shutil.rmtree(into, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(f"the code cannot be copied into `{into}`: {error.strerror or error}",
                        "make room there, or choose another place with --runs DIR or LAUNCH_RUNS") from error
    return Snapshot(into, records, places, versions)


def _versions() -> dict[str, str]:
    """The versions of Python and of the libraries on which results depend."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def _places(trees: Sequence[Tree], sources: Sequence[Path]) -> dict[str, str]:
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
        return Snapshot(folder, tuple(record["trees"]), record["places"], record.get("versions", {}))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read `{folder / RECORD}`: {error!r}", "restore that file, or start a new run") from None


def _copy(trees: list[Tree], into: Path, copy: bool) -> dict[str, dict[str, str]]:
    """Copy the files of all trees, then the links.

    Sources are copied first, then Python files: files after MAX_FILES or MAX_BYTES are left out.

    Args:
        copy: whether to copy; otherwise the files are only read.

    Returns:
        For each tree's copy: the hash of each file, and the target of each link, by name.

    Raises:
        OSError: a copy cannot be written, or a source cannot be read.
    """
    files: list[tuple[tuple[bool, ...], Tree, str, os.stat_result]] = []
    links: dict[tuple[str, str], tuple[Tree, str, str]] = {}
    copied: dict[str, set[str]] = {tree.copy: {"."} for tree in trees}  # files, folders and links
    hashes: dict[str, dict[str, str]] = {tree.copy: {} for tree in trees}
    for tree in trees:
        own = tuple(path if os.path.isfile(path) else f"{path}/" for path in tree.own)
        if copy:
            os.mkdir(into / tree.copy)
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
                _leave_out(tree, name, error.strerror)
                continue
            wanted = path in tree.own or name in tree.included
            if SECRET.match(os.path.basename(name)) and not wanted:
                _leave_out(tree, name, "may hold secrets")
            elif target is not None:
                links[tree.copy, name] = tree, name, target
            elif stat.S_ISREG(info.st_mode):
                order = not wanted, not name.endswith(".py"), not path.startswith(own), not tracked
                files.append((order, tree, name, info))

    count = total = 0
    for _, tree, name, info in sorted(files, key=lambda file: file[0]):
        if links and any((tree.copy, str(above)) in links for above in Path(name).parents):
            continue  # a link has replaced the file's folder: for git, the file is deleted
        wanted = f"{tree.source}/{name}" in tree.own or name in tree.included
        why = (None if wanted else mib(info.st_size) if info.st_size > code_trees.MAX_FILE_BYTES else
               f"more than {MAX_FILES:,} files" if count >= MAX_FILES else
               f"more than {mib(MAX_BYTES)} in all" if total + info.st_size > MAX_BYTES else None)
        try:
            data = b"" if why else Path(tree.source, name).read_bytes()
        except FileNotFoundError:
            continue  # deleted just now
        except OSError as error:
            if wanted:
                raise
            why = error.strerror
        if why:
            _leave_out(tree, name, why)
            continue
        hashes[tree.copy][name] = blake2b(data, digest_size=8).hexdigest()
        count, total = count + 1, total + len(data)
        if copy:
            _make_folders(tree, name, into, copied)
            target = f"{into}/{tree.copy}/{name}"
            with open(target, "wb") as file:
                file.write(data)
            os.chmod(target, info.st_mode & 0o777)
            os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns))
            copied[tree.copy].add(name)

    for tree, name, _ in islice(links.values(), MAX_FILES, None):
        _leave_out(tree, name, f"more than {MAX_FILES:,} links")
    for tree in trees:
        for name in tree.others:
            _leave_out(tree, name, "may hold secrets" if SECRET.match(os.path.basename(name)) else "does not look like code")
    for tree, name, target in islice(links.values(), MAX_FILES):
        hashes[tree.copy][name] = f"-> {target}"
    if not copy:
        return hashes
    for tree, name, _ in islice(links.values(), MAX_FILES):
        _make_folders(tree, name, into, copied)
        copied[tree.copy].add(name)
    for tree, name, target in islice(links.values(), MAX_FILES):
        # A link whose target was copied points to the copy. Any other link points to its old target, by an absolute path.
        folder = os.path.dirname(f"{tree.source}/{name}")
        absolute = os.path.normpath(os.path.join(folder, target))
        inside = os.path.relpath(absolute, tree.source) in copied[tree.copy]
        os.symlink(os.path.relpath(absolute, folder) if inside else absolute, f"{into}/{tree.copy}/{name}")
    return hashes


def _leave_out(tree: Tree, name: str, why: str | None) -> None:
    """Note that a file is not copied."""
    entry = f"{printable(name)} ({why})"
    tree.left_out.append(entry)
    if tree.names.get(name) and tree.git["commit"]:
        tree.missing.append(entry)


def _make_folders(tree: Tree, name: str, into: Path, copied: dict[str, set[str]]) -> None:
    """Make the folder of a file in the tree's copy, and note it in `copied`."""
    folder = os.path.dirname(name)
    if folder and folder not in copied[tree.copy]:
        _make_folders(tree, folder, into, copied)
        os.mkdir(f"{into}/{tree.copy}/{folder}")
        copied[tree.copy].add(folder)


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:MAX_PRINTED]) + (f" and {len(names) - MAX_PRINTED:,} more" if len(names) > MAX_PRINTED else "")


def _listed(words: Iterable[str]) -> list[str]:
    """The words without duplicates, at most MAX_LISTED. If words are cut off, a last entry says how many."""
    unique = list(dict.fromkeys(words))
    more = len(unique) - MAX_LISTED
    return [*unique[:MAX_LISTED], f"... (and {more:,} more)"] if more > 0 else unique
