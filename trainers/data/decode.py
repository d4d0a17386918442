"""Decodes image files into arrays, as a picture viewer shows them. This module does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainers.contract.cores import usable_cores
from trainers.contract.errors import UserError
from trainers.contract.text import first_few


class Decoded(NamedTuple):
    """Image files in memory, and what is known about their pixels."""

    pixels: np.ndarray       # uint8 [N, 3, S, S]
    hashes: list[bytes]      # of each image's pixels
    plain: np.ndarray        # bool [N]: whether an image has a single colour
    brightest: int | None    # the largest value of all 16-bit images; None: there are none


def decode_all(files: Sequence[Path], size: int, bits: int | None) -> Decoded:
    """Decode image files, each as `decode` does.

    Raises:
        UserError: files cannot be read as images. The message names the first few.
    """
    pixels = np.empty((len(files), 3, size, size), np.uint8)
    hashes: list[bytes] = []
    plain, brightest, broken = np.zeros(len(files), bool), -1, {}

    def work(item: tuple[int, Path]) -> tuple[bytes, int] | UserError:
        row, file = item
        try:
            image, value = decode(file, size, bits)
        except UserError as error:
            return error
        pixels[row] = image
        plain[row] = (image == image[:, :1, :1]).all()
        return blake2b(pixels[row], digest_size=16).digest(), value

    # Threads are enough: Pillow releases the GIL while it decodes and scales.
    with ThreadPoolExecutor(min(16, usable_cores())) as pool:
        for file, result in zip(files, pool.map(work, enumerate(files))):
            if isinstance(result, UserError):
                broken[file] = result
                continue
            hashes.append(result[0])
            brightest = max(brightest, result[1])
    if len(broken) == 1:
        raise next(iter(broken.values()))
    if broken:
        raise UserError(f"{len(broken):,} of {len(files):,} files cannot be read as images: {first_few(list(broken), 10)}",
                        f"fix or remove the files; the first: {next(iter(broken.values())).message.rpartition(': ')[2]}")
    return Decoded(pixels, hashes, plain, brightest if brightest >= 0 else None)


def decode(file: Path, size: int, bits: int | None = None) -> tuple[np.ndarray, int]:
    """Return (an image as uint8 [3, size, size], the largest value of a 16-bit image or -1).

    The image is the centre square, cropped and scaled to `size` in one resampling.

    Args:
        bits: of the values of a 16-bit image, how many bits are in use; None: all 16.

    Raises:
        UserError: the file cannot be read as an image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image: Image.Image = opened
            image.load()
            try:
                image = ImageOps.exif_transpose(image)
            except Exception:  # broken EXIF data: viewers show the image as it is stored
                pass
            brightest = -1
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers, and the file does not say which number is white; "
                                 "convert it to 8 or 16 bits")
            if image.mode.startswith("I"):  # convert() would clip the values at 255
                values = np.asarray(image)
                brightest = int(values.max())
                if values.min() < 0 or brightest > 2**16 - 1:
                    raise ValueError("its values are not within 0 and 65535, and the file does not say which value is white; "
                                     "convert it to 8 or 16 bits")
                image = Image.fromarray(np.minimum(values >> ((bits or 16) - 8), 255).astype(np.uint8))
            image = image.convert("RGB")
            if image.size != (size, size):
                (width, height), short = image.size, min(image.size)
                left, top = (width - short) / 2, (height - short) / 2
                image = image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + short, top + short))
            return np.asarray(image).transpose(2, 0, 1), brightest
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file} cannot be read as an image: {reason}", "fix or remove the file") from error
