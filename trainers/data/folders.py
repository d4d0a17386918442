"""Lists the image files in folders by class, for training and for evaluation. This module does not import torch."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from trainers.contract.errors import UserError
from trainers.contract.text import first_few

TRAINING = ("train", "training")
# The first that exists is used. A validation set comes before a test set: it decides which checkpoint is the best one, and a
# test set that decides this says too much for the model.
EVALUATION = ("val", "valid", "validation", "dev", "test", "testing")
TEST = ("test", "testing")  # scored once at the end of a run, if another folder is for evaluation
# Pillow opens these formats, but they are no pictures, or need a program that may be missing.
NO_PICTURES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")

LAYOUT = ("the folder must hold <class>/<image> folders, or train/<class>/<image> and validation/ or test/<class>/<image>")

Files = dict[str, list[str]]  # by class folder: paths in it, in a fixed order


class Listing(NamedTuple):
    """The image files of a training set and an evaluation set, with the classes."""

    classes: list[str]             # sorted by name
    train: list[tuple[Path, int]]  # (file, class number), in a fixed order; empty in an evaluation
    test: list[tuple[Path, int]]   # the same; empty if there is nothing to evaluate on
    about: str                     # which folders are used, for the log
    passed_over: Counter[str]      # files that are not read, by what they are
    facts: Mapping[str, Any] = {}  # what an evaluation and a resumption must know; empty in an evaluation. The keys:
    #   files: a hash of the names of the files from which the training set was taken
    #   held_out: the share of each class that was held out; None if there is an evaluation folder
    #   evaluation, evaluation_files: the name of the evaluation folder, and a hash of the names of its files; None without one
    deep: bool = False             # no class folder holds images itself, but only folders of images
    warning: str = ""              # what makes the evaluation doubtful
    final: list[tuple[Path, int]] = []  # as `test`, of the folder that is scored once at the end; empty in an evaluation


def list_images(path: Path, eval_fraction: float, eval_split: str | None = None,
                trained_on: Mapping[str, Any] | None = None) -> Listing:
    """List the image files under `path`. Images may lie in folders below the class folders.

    Without an evaluation folder, `eval_fraction` of each class is held out: the same files every time, on every machine.
    The files are chosen by a hash of their names, not by the run's seed, so that runs with different seeds are compared on
    the same images.

    Args:
        eval_split: the name of the evaluation folder; None: the first of EVALUATION that exists.
        trained_on: in an evaluation of a trained model, the facts of its training run, with those of `Listing.facts` if it was
            trained on a folder. Then only images to evaluate on are listed. If there is no evaluation folder, these are all
            images, unless the training run held out images of this folder: then they are the images that it held out.

    Raises:
        UserError: the path does not exist or is not a folder; there are no class folders, or two training folders; a class
            folder is empty; links lead nowhere; an evaluation class is not a training class.
    """
    if not path.is_dir():
        raise UserError(f"`data.source`: {path} {'is not a folder' if path.exists() else 'does not exist'}",
                        f"{LAYOUT}; if the images have moved, use data=PATH, which `launch resume` takes too")
    passed_over: Counter[str] = Counter()
    names = [name for name in _names(path) if (path / name).is_dir()]
    folders = {name.lower(): path / name for name in reversed(names)}
    train = next((folders[name] for name in TRAINING if name in folders), None)
    if train is not None and not _holds_folders(train) and folders.keys() - {*TRAINING, *EVALUATION}:
        train = None  # a class of this name
    trainings = [name for name in names if name.lower() in TRAINING and _holds_folders(path / name)]
    if train is not None and len(trainings) > 1 and trained_on is None:
        raise UserError(f"{path} holds {' and '.join(f'{name}/' for name in trainings)}: it is not clear which to train on",
                        "rename one of the folders")
    test = _evaluation_folder(path, folders, eval_split)
    if train is None and test is not None:
        if eval_split is None and not (_holds_folders(test) and not _holds_images(test)):
            test = None  # a class of this name
        elif trained_on is None:
            raise UserError(f"`data.source`: {path} holds {test.name}/ but no train/", LAYOUT)
    if trained_on is not None and test is not None:
        files = _by_class(test, passed_over)
        known = trained_on.get("files") == _hash(files)
        return Listing(list(files), [], _numbered(test, files), f"{path}: {_count(files)} images of {test.name}/", passed_over,
                       warning=f"{test} holds the images from which the training set was taken" if known else "")
    source = train or path
    files = _by_class(source, passed_over)
    hashed, deep = _hash(files), all(os.sep in file for paths in files.values() for file in paths)
    if trained_on is None and len(files) == 1:
        raise UserError(f"{source} holds only one class folder, `{next(iter(files))}`, but a classifier needs two classes",
                        f"give {source / next(iter(files))} if the classes are in there; {LAYOUT}")
    classes = list(files)
    name_of_end = test_folder(path, eval_split) if train and test else None
    end = path / name_of_end if name_of_end else None
    finals = _test_images(end, classes, source) if end else None
    unused = [] if train is None else [f"{name}/" for name in names
                                       if path / name not in (train, test) and (finals is None or path / name != end)]
    passed = f" ({first_few(unused)} not used: data.eval_split chooses)" if unused else ""
    if test is not None:
        tests = _by_class(test, passed_over)
        _check_known(tests, classes, test, source)
        facts = {"files": hashed, "held_out": None, "evaluation": same_class(test.name),
                 "evaluation_files": _hash(tests)}
        return Listing(classes, _numbered(source, files), _numbered(test, tests, classes),
                       f"{path}: {_count(files)} images of {source.name}/ for training, {_count(tests)} of {test.name}/ for "
                       "evaluation" + (f", {_count(finals)} of {end.name}/ for the test at the end" if end and finals else "") +
                       passed, passed_over, facts, deep, final=_numbered(end, finals, classes) if end and finals else [])
    if trained_on is not None:
        return _to_evaluate(source, files, eval_fraction, trained_on, f"{path}: ", passed_over)
    kept, held = _hold_out(files, eval_fraction)
    about = f"{path} has no evaluation folder{passed}: " + (
        f"{_count(held)} of {_count(files)} images are held out (data.eval_fraction={eval_fraction:g}, the same images in "
        "every run)" if _count(held) else f"all {_count(files)} images are for training")
    return Listing(list(files), _numbered(source, kept), _numbered(source, held), about, passed_over,
                   {"files": hashed, "held_out": eval_fraction, "evaluation": None, "evaluation_files": None}, deep)


def test_folder(path: Path, eval_split: str | None) -> str | None:
    """Return the name of the folder that is scored once at the end; None if there is none besides the evaluation folder."""
    folders = {name.lower(): path / name for name in reversed(_names(path)) if (path / name).is_dir()}
    evaluation = _evaluation_folder(path, folders, eval_split)
    end = next((folders[name] for name in TEST if name in folders), None)
    return end.name if end and evaluation and end != evaluation else None


def _test_images(folder: Path, classes: Sequence[str], train: Path) -> Files | None:
    """Return the image files of a test folder; None if they are not images of the training classes in class folders, such as
    unlabelled images: the run can do without them."""
    try:
        files = _by_class(folder, Counter())
        _check_known(files, classes, folder, train)
    except UserError:
        return None
    return files


def _to_evaluate(source: Path, files: Files, eval_fraction: float, trained_on: Mapping[str, Any], where: str,
                 passed_over: Counter[str]) -> Listing:
    """Return the images of a folder without an evaluation folder that a trained model is evaluated on."""
    known, count = trained_on.get("files"), _count(files)
    if known != _hash(files):
        about = f"{where}all {count} images"
        if known:
            about += " (not the training folder as it was: it may hold training images)"
        return Listing(list(files), [], _numbered(source, files), about, passed_over)
    fraction = trained_on.get("held_out", eval_fraction)
    if fraction is None:
        return Listing(list(files), [], _numbered(source, files), f"{where}all {count} images", passed_over,
                       warning=f"the model was trained on all images of {source}: the evaluation says little about other images")
    _, held = _hold_out(files, fraction)
    about = f"{where}{_count(held)} of {count} images, which were held out in training"
    if "held_out" not in trained_on:
        about += f" if that had data.eval_fraction={fraction:g} and no evaluation folder (the checkpoint does not say)"
    elif fraction != eval_fraction:
        about += f" (data.eval_fraction was {fraction:g}: {eval_fraction:g} is not used)"
    return Listing(list(files), [], _numbered(source, held), about, passed_over)


def endings() -> dict[str, str]:
    """Return the endings of the files that Pillow reads as pictures, with the names of the formats."""
    from PIL import Image

    Image.init()
    return {ending: name for ending, name in Image.EXTENSION.items() if name in Image.OPEN and name not in NO_PICTURES}


def same_class(name: str) -> str:
    """Return a class name in the form in which names are compared.

    File systems and archives change how an accented letter is written, and add blanks at the end of a name.
    """
    return unicodedata.normalize("NFC", name).strip()


def _evaluation_folder(path: Path, folders: Mapping[str, Path], eval_split: str | None) -> Path | None:
    if eval_split is None:
        return next((folders[name] for name in EVALUATION if name in folders), None)
    if eval_split.lower() not in folders:
        raise UserError(f"{path} has no folder {eval_split}/ (`data.eval_split`)",
                        f"it has {first_few([f'{folder.name}/' for folder in folders.values()])}" if folders else LAYOUT)
    return folders[eval_split.lower()]


def _holds_folders(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in _names(folder))


def _holds_images(folder: Path) -> bool:
    known = endings()
    return any(os.path.splitext(name)[1].lower() in known and not (folder / name).is_dir() for name in _names(folder))


def _by_class(folder: Path, passed_over: Counter[str]) -> Files:
    """Return the image files of each class folder. Classes and files are sorted by name. Count what is passed over."""
    known, broken = endings(), []
    found: Files = {}
    empty: tuple[str, Counter[str]] | None = None
    loose = 0
    for name in _names(folder):
        if not (folder / name).is_dir():
            loose += os.path.splitext(name)[1].lower() in known
            continue
        other: Counter[str] = Counter()
        found[name] = []
        for file in _files_below(folder / name):
            ending = os.path.splitext(file)[1].lower()
            if ending not in known:
                other[ending or "no ending"] += 1
            elif not (folder / name / file).is_file():
                broken.append(folder / name / file)
            else:
                found[name].append(file)
        if any("\ud800" <= char <= "\udfff" for char in name):
            raise UserError(f"the name of the class folder {os.fsencode(name)!r} in {folder} is not valid UTF-8",
                            "rename the folder")
        if not found[name]:
            empty = empty or (name, other)
        passed_over.update(other)
    if broken:
        what = "is a link that leads nowhere" if broken[0].is_symlink() else "is not a file"
        raise UserError(f"{broken[0]} {what}" if len(broken) == 1 else
                        f"{len(broken)} images are links that lead nowhere, or no files: {first_few(list(map(str, broken)))}",
                        "restore or remove the file" + "s" * (len(broken) > 1))
    if empty:
        name, other = empty
        raise UserError(f"{folder / name} holds no images that can be read" + (f": {said(other)}" if other else ""),
                        f"remove the folder, or put the images of class `{name}` into it")
    if not found:
        raise UserError(f"{folder} holds {'images but ' if loose else ''}no class folders", LAYOUT)
    keys = Counter(map(same_class, found))
    if twice := [name for name in found if keys[same_class(name)] > 1]:
        raise UserError(f"{folder} holds class folders whose names look the same: {first_few([ascii(name) for name in twice])}",
                        "put their images into one folder, or rename them")
    if loose:
        passed_over["images outside the class folders"] += loose
    return found


def said(counts: Counter[str]) -> str:
    """Return '90 .heic, 1 .txt'."""
    return first_few([f"{count:,} {kind}" for kind, count in counts.most_common()])


def _files_below(folder: Path) -> list[str]:
    """Return the paths of all files under a class folder, relative to it and sorted. Links to folders are followed."""
    files: list[str] = []
    seen: set[str] = set()
    pending = [""]
    while pending:
        inner = pending.pop()
        real = os.path.realpath(folder / inner)
        if real in seen:  # a link to a folder above it
            continue
        seen.add(real)
        for name in _names(folder / inner):
            path = os.path.join(inner, name)
            if (folder / path).is_dir():
                pending.append(path)
            else:
                files.append(path)
    return sorted(files)


def _names(folder: Path) -> list[str]:
    """Return the sorted names in a folder that are not hidden."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith(".") and name != "__MACOSX")
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}", "make the folder readable") from error


def _check_known(tests: Files, names: Sequence[str], test: Path, train: Path) -> None:
    """Raise a UserError if an evaluation class is not one of the training classes `names`."""
    known = set(map(same_class, names))
    if unknown := [name for name in tests if same_class(name) not in known]:
        near = get_close_matches(unknown[0], names, n=1, cutoff=0.7) or [
            name for name in names if name.casefold() == unknown[0].casefold()]
        raise UserError(f"{test / unknown[0]}: `{unknown[0]}` is not a class of {train}" +
                        (f", and neither are {first_few([f'`{name}`' for name in unknown[1:]])}" if unknown[1:] else ""),
                        (f"did you mean `{near[0]}`? " if near else "") +
                        "every evaluation class needs a training folder of the same name")


def _hold_out(files: Files, fraction: float) -> tuple[Files, Files]:
    """Divide the files of each class in two: those that are kept for training, and those that are held out."""
    kept: Files = {}
    held: Files = {}
    for name, paths in files.items():
        count = min(round(fraction * len(paths)), len(paths) - 1)
        chosen = set(sorted(paths, key=lambda file: blake2b(os.fsencode(file)).digest())[:count])
        held[name] = [file for file in paths if file in chosen]
        kept[name] = [file for file in paths if file not in chosen]
    return kept, held


def _hash(files: Files) -> str:
    lines = (f"{same_class(name)}/{unicodedata.normalize('NFC', file)}\0" for name, paths in files.items() for file in paths)
    return blake2b(b"".join(map(os.fsencode, lines)), digest_size=8).hexdigest()


def _count(files: Files) -> int:
    return sum(map(len, files.values()))


def _numbered(folder: Path, files: Files, classes: Sequence[str] | None = None) -> list[tuple[Path, int]]:
    numbers = {same_class(name): number for number, name in enumerate(classes or files)}
    return [(folder / name / file, numbers[same_class(name)]) for name in files for file in files[name]]
