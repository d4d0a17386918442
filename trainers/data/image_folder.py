"""Loads a folder of images by class, and says which images are used and what looks like a mistake."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainers.contract.errors import UserError
from trainers.contract.events import emit
from trainers.contract.text import first_few
from trainers.data.decode import Decoded, decode_all
from trainers.data.folders import Listing, list_images, said
from trainers.data.images import Raw, RawSets
from trainers.engine.world import World

DARK = 2**12  # 16-bit images without a value of at least this are nearly black


def load_folder(path: Path, size: int, world: World, *, eval_fraction: float = 0.1, eval_split: str | None = None,
                bits: int | None = None, trained_on: Mapping[str, Any] | None = None) -> RawSets:
    """Load a folder of images by class, as RGB, each image's centre square scaled to `size`.

    `folders.LAYOUT` states which layouts are possible.

    Args:
        eval_fraction, eval_split, trained_on: as in `list_images`. In an evaluation (`trained_on` is not None), the training set
            of the result is the evaluation set.
        bits: as in `decode`.

    Raises:
        UserError: `list_images` refuses the folder, or images cannot be read.
    """
    listing = list_images(path, eval_fraction, eval_split, trained_on)
    if trained_on is not None and not listing.test:
        raise UserError(f"`data.source`: {path} has no images to evaluate on",
                        "no images were held out in training: use another folder")
    if world.main:
        _describe(listing)
    files = [*listing.train, *listing.test]
    decoded = decode_all([file for file, _ in files], size, bits)
    final = (Raw(decode_all([file for file, _ in listing.final], size, bits).pixels,
                 np.array([label for _, label in listing.final])) if listing.final else None)
    labels, cut = np.array([label for _, label in files]), len(listing.train)
    if trained_on is None:
        _check_brightness(decoded, bits)
    if world.main:
        for warning in _oddities(decoded, cut):
            _note("warning", warning)
    test = Raw(decoded.pixels[cut:], labels[cut:]) if listing.test else None
    train = Raw(decoded.pixels[:cut], labels[:cut]) if trained_on is None else test
    assert train is not None  # an evaluation has images to evaluate on
    return RawSets(train, test, listing.classes, listing.facts, final)


def _describe(listing: Listing) -> None:
    _note("info", f"{listing.about}; {len(listing.classes):,} classes: {first_few(listing.classes, 10)}")
    if listing.warning:
        _note("warning", listing.warning)
    if listing.deep:
        file, label = listing.train[0]
        _note("warning", f"all images lie in folders below the class folders: {file} belongs to class {listing.classes[label]}")
    if listing.passed_over:
        many = 10 * listing.passed_over.total() > len(listing.train) + len(listing.test)
        _note("warning" if many else "info", f"{listing.passed_over.total():,} files are not used: {said(listing.passed_over)}")


def _check_brightness(decoded: Decoded, bits: int | None) -> None:
    """Raise a UserError if 16-bit images use so few of their bits that they would be nearly black, or if `bits` cannot help."""
    if decoded.brightest_colour is not None and bits != 16:
        if (brightest := 256 * decoded.brightest_colour + 255) < DARK:
            raise UserError(f"the 16-bit images with colours or transparency have no value above {brightest:,} of 65,535: they "
                            "would be nearly black",
                            "convert them to 8 bits: data.bits is for grey images only; if they are that dark, data.bits=16")
        if bits is not None:
            raise UserError(f"data.bits={bits}, but some 16-bit images have colours or transparency, and only their high byte "
                            "is read", "convert those images to 8 bits")
    if bits is None and decoded.brightest is not None and decoded.brightest < DARK:
        used = max(9, decoded.brightest.bit_length())
        raise UserError(f"the 16-bit images have no value above {decoded.brightest:,} of 65,535, so they would be nearly black",
                        f"if {2**used - 1:,} is white in these images, use data.bits={used}; if they are that dark, data.bits=16")


def _oddities(decoded: Decoded, cut: int) -> list[str]:
    """Return sentences about images that look like a mistake. The first `cut` images are for training."""
    found = []
    train, test = decoded.hashes[:cut], decoded.hashes[cut:]
    distinct, plain = set(train), int(decoded.plain.sum())
    if len(train) > 1 and len(distinct) == 1:
        found.append(f"all {len(train):,} training images are equal")
    elif plain:
        found.append(f"{plain:,} of {len(decoded.plain):,} images have a single colour")
    if decoded.several:
        found.append(f"{decoded.several:,} of {len(decoded.plain):,} files hold several pictures (frames or pages): only the "
                     "first is used")
    if decoded.transparent:
        found.append(f"{decoded.transparent:,} of {len(decoded.plain):,} images have transparent pixels: they get the colour "
                     "that they hide")
    both = sum(image in distinct for image in test)
    if 100 * both > len(test):
        found.append(f"{both:,} of {len(test):,} evaluation images are training images too: the evaluation says little about "
                     "other images")
    return found


def _note(level: str, message: str) -> None:
    emit({"event": "note", "level": level, "message": message})
