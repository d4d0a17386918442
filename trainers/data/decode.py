"""Decodes image files into arrays, as a picture viewer shows them. This module does not import torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainers.contract.cores import usable_cores
from trainers.contract.errors import UserError
from trainers.contract.text import first_few

PHOTOMETRIC = 262  # the TIFF tag PhotometricInterpretation; 0 is WhiteIsZero
WIDE = re.compile(r";16[BLN]")  # in Pillow's name for how pixels are stored: 16 bits a channel (BGR;16 has 16 bits a pixel)


class Decoded(NamedTuple):
    """Image files in memory, and what is known about their pixels."""

    pixels: np.ndarray       # uint8 [N, 3, S, S]
    hashes: list[bytes]      # of each image's pixels
    plain: np.ndarray        # bool [N]: whether an image has a single colour
    brightest: int | None    # the largest value of all 16-bit grey images; None: there are none
    brightest_colour: int | None  # the largest high byte of all 16-bit images with colours or alpha; None: there are none
    several: int             # how many files hold several pictures, of which the first is used
    transparent: int         # how many images have transparent pixels


class OneDecoded(NamedTuple):
    """One image file in memory."""

    pixels: np.ndarray     # uint8 [3, S, S]
    brightest: int = -1    # the largest value of a 16-bit grey image, otherwise -1
    brightest_colour: int = -1  # the largest high byte of a 16-bit image with colours or alpha, otherwise -1
    several: bool = False
    transparent: bool = False


def decode_all(files: Sequence[Path], size: int, bits: int | None) -> Decoded:
    """Decode image files, each as `decode` does.

    Raises:
        UserError: files cannot be read as images. The message names the first few.
    """
    pixels = np.empty((len(files), 3, size, size), np.uint8)
    hashes: list[bytes] = []
    plain, broken = np.zeros(len(files), bool), {}
    brightest = brightest_colour = -1
    several = transparent = 0

    def work(item: tuple[int, Path]) -> tuple[bytes, OneDecoded] | UserError:
        row, file = item
        try:
            image = decode(file, size, bits)
        except UserError as error:
            return error
        pixels[row] = image.pixels
        plain[row] = (image.pixels == image.pixels[:, :1, :1]).all()
        return blake2b(pixels[row], digest_size=16).digest(), image._replace(pixels=pixels[row])

    # Threads are enough: Pillow releases the GIL while it decodes and scales.
    with ThreadPoolExecutor(min(16, usable_cores())) as pool:
        for file, result in zip(files, pool.map(work, enumerate(files))):
            if isinstance(result, UserError):
                broken[file] = result
                continue
            hashes.append(result[0])
            brightest = max(brightest, result[1].brightest)
            brightest_colour = max(brightest_colour, result[1].brightest_colour)
            several += result[1].several
            transparent += result[1].transparent
    if len(broken) == 1:
        raise next(iter(broken.values()))
    if broken:
        raise UserError(f"{len(broken):,} of {len(files):,} files cannot be read as images: {first_few(list(broken), 10)}",
                        f"fix or remove the files; the first: {next(iter(broken.values())).message.rpartition(': ')[2]}")
    return Decoded(pixels, hashes, plain, brightest if brightest >= 0 else None,
                   brightest_colour if brightest_colour >= 0 else None, several, transparent)


def decode(file: Path, size: int, bits: int | None = None) -> OneDecoded:
    """Return an image: the centre square, cropped and scaled to `size` in one resampling.

    Transparent pixels have the colour that they hide, as in earlier versions: older models were trained on it.

    Args:
        bits: of the values of a 16-bit grey image, how many bits are in use; None: all 16. Pillow reads only the high bytes of
            16-bit images with colours or transparency.

    Raises:
        UserError: the file cannot be read as an image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image: Image.Image = opened
            wide = any(WIDE.search(str(tile[3])) for tile in getattr(opened, "tile", ()))
            image.load()
            several = opened.format != "MPO" and _animated(opened)  # the second picture of a camera's MPO file is a preview
            try:
                image = ImageOps.exif_transpose(image)
            except Exception:  # broken EXIF data: viewers show the image as it is stored
                pass
            brightest = brightest_colour = -1
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers, and the file does not say which number is white; "
                                 "convert it to 8 or 16 bits")
            if image.mode.startswith("I;16") and getattr(opened, "tag_v2", {}).get(PHOTOMETRIC) == 0:  # Pillow ignores the tag
                raise ValueError("it is a 16-bit TIFF image in which 0 is white; convert it to 8 bits, or so that 0 is black")
            grey = image.mode.startswith("I")
            transparent = not grey and _has_transparent_pixels(image)
            if grey:  # convert() would clip the values at 255
                values = np.asarray(image)
                brightest = int(values.max())
                if values.min() < 0 or brightest > 2**16 - 1:
                    raise ValueError("its values are not within 0 and 65535, and the file does not say which value is white; "
                                     "convert it to 8 or 16 bits")
                image = Image.fromarray(np.minimum(values >> ((bits or 16) - 8), 255).astype(np.uint8))
            image = image.convert("RGB")
            if wide and not grey:
                brightest_colour = int(np.asarray(image).max())
            if image.size != (size, size):
                (width, height), short = image.size, min(image.size)
                left, top = (width - short) / 2, (height - short) / 2
                image = image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + short, top + short))
            return OneDecoded(np.asarray(image).transpose(2, 0, 1), brightest, brightest_colour, several, transparent)
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file} cannot be read as an image: {reason}", "fix or remove the file") from error


def _animated(opened: Any) -> bool:
    """Return whether the file holds several pictures."""
    try:
        return bool(getattr(opened, "is_animated", False))
    except Exception:  # the pictures after the first may be broken
        return False


def _has_transparent_pixels(image: Any) -> bool:
    if image.mode not in ("RGBA", "LA", "PA") and not (image.mode in ("1", "L", "P", "RGB") and "transparency" in image.info):
        return False
    return image.convert("RGBA").getchannel("A").getextrema()[0] < 255
