"""Lists the image files in folders by class, for training and for evaluation. This module does not import torch."""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from trainers.contract.errors import UserError

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
EVALUATION = ("val", "valid", "test")  # the first that exists; val comes first, because it is made for frequent evaluation

LAYOUT = "the folder must hold <class>/<image> folders, or train/<class>/<image> and val, valid or test/<class>/<image>"


class Listing(NamedTuple):
    """The image files of a training set and an evaluation set, with the classes."""

    classes: list[str]             # sorted by name
    train: list[tuple[Path, int]]  # (file, class number), in a fixed order
    test: list[tuple[Path, int]]   # the same; empty if there is nothing to evaluate on
    held_out: bool                 # `test` was taken from the training images


def list_images(path: Path, eval_fraction: float) -> Listing:
    """List the image files under `path`.

    Without an evaluation folder, `eval_fraction` of each class is held out: the same files every time, on every machine.
    The files are chosen by a hash of their names, not by the run's seed, so that runs with different seeds are compared on
    the same images.

    Raises:
        UserError: the path does not exist or is not a folder; there are no class folders; a class folder is empty; a link
            leads nowhere; an evaluation class is not a training class.
    """
    if not path.is_dir():
        raise UserError(f"`data.source`: {path} {'is not a folder' if path.exists() else 'does not exist'}", LAYOUT)
    folder = next((path / name for name in EVALUATION if (path / name).is_dir()), None)
    if not (path / "train").is_dir():
        if folder is not None and not _names(folder, images=True) and _class_folders(folder):
            raise UserError(f"`data.source`: {path} holds {folder.name}/ but no train/", LAYOUT)
        train, folder = _by_class(path), None
    else:
        train = _by_class(path / "train")
    classes = list(train)
    if folder is not None:
        test = _by_class(folder)
        if unknown := [name for name in test if name not in train]:
            raise UserError(f"{folder / unknown[0]}: `{unknown[0]}` is not a class of {path / 'train'}",
                            "every evaluation class needs a training folder of the same name")
        return Listing(classes, _numbered(train, classes), _numbered(test, classes), held_out=False)
    kept, held = {}, {}
    for name, files in train.items():
        count = min(round(eval_fraction * len(files)), len(files) - 1)
        chosen = set(sorted(files, key=lambda file: blake2b(os.fsencode(file.name)).digest())[:count])
        held[name] = [file for file in files if file in chosen]
        kept[name] = [file for file in files if file not in chosen]
    return Listing(classes, _numbered(kept, classes), _numbered(held, classes), held_out=True)


def _by_class(folder: Path) -> dict[str, list[Path]]:
    """Return the image files of each class folder. Classes and files are sorted by name."""
    by_class = {name: [folder / name / file for file in _names(folder / name, images=True)]
                for name in _class_folders(folder)}
    if not by_class:
        loose = "images but no class folders" if _names(folder, images=True) else "no class folders"
        raise UserError(f"{folder} holds {loose}", LAYOUT)
    for name, files in by_class.items():
        if any("\ud800" <= char <= "\udfff" for char in name):
            raise UserError(f"the name of the class folder {os.fsencode(name)!r} in {folder} is not valid UTF-8",
                            "rename the folder")
        if not files:
            raise UserError(f"{folder / name} holds no images ({', '.join(sorted(ending[1:] for ending in ENDINGS))})",
                            f"remove the folder, or put the images of class `{name}` into it")
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} is {'a link that leads nowhere' if file.is_symlink() else 'not a file'}",
                                "restore or remove the file")
    return by_class


def _class_folders(folder: Path) -> list[str]:
    return [name for name in _names(folder) if (folder / name).is_dir()]


def _names(folder: Path, images: bool = False) -> list[str]:
    """Return the sorted names in a folder that are not hidden. With `images`, only files with the ending of an image."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}", "make the folder readable") from error
    if not images:
        return names
    return [name for name in names
            if os.path.splitext(name)[1].lower() in ENDINGS and not (folder / name).is_dir()]


def _numbered(files: dict[str, list[Path]], classes: list[str]) -> list[tuple[Path, int]]:
    numbers = {name: number for number, name in enumerate(classes)}
    return [(file, numbers[name]) for name in files for file in files[name]]
