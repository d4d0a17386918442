"""A folder of images is loaded, and what looks like a mistake is said."""

from __future__ import annotations

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainers.contract.errors import UserError
from trainers.data.image_folder import load_folder
from trainers.engine.world import World

ONE = World(0, 1, 0, 1, torch.device("cpu"))
RNG = np.random.default_rng(0)


def fill(root: Path, classes="ab", count: int = 4, image=lambda: RNG.integers(0, 256, (8, 8, 3), np.uint8)) -> Path:
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.fromarray(image()).save(root / name / f"{number}.png")
    return root


def test_nothing_is_wrong_with_good_images(tmp_path, capsys):
    fill(tmp_path / "train")
    fill(tmp_path / "test")
    load_folder(tmp_path, 8, ONE)
    out = capsys.readouterr().out
    assert "8 images of train/ for training, 8 of test/ for evaluation; 2 classes: a, b" in out and "warning" not in out


@pytest.mark.parametrize("image, warning", [
    (lambda: np.full((8, 8, 3), 7, np.uint8), "all 8 training images are equal"),
    (lambda: np.full((8, 8, 3), RNG.integers(256), np.uint8), "16 of 16 images have a single colour"),
])
def test_images_without_content_deserve_a_warning(tmp_path, capsys, image, warning):
    fill(tmp_path / "train", image=image)
    fill(tmp_path / "test", image=image)
    load_folder(tmp_path, 8, ONE)
    assert warning in capsys.readouterr().out


def test_an_evaluation_set_with_training_images_deserves_a_warning(tmp_path, capsys):
    fill(tmp_path / "train")
    fill(tmp_path / "test")
    shutil.copy(tmp_path / "train/a/0.png", tmp_path / "test/b/copy.png")
    load_folder(tmp_path, 8, ONE)
    assert "1 of 9 evaluation images are training images too" in capsys.readouterr().out


def test_many_files_that_are_not_used_deserve_a_warning(tmp_path, capsys):
    fill(tmp_path)
    (tmp_path / "a" / "x.heic").touch()
    load_folder(tmp_path, 8, ONE)
    assert "warning: 1 files are not used: 1 .heic" in capsys.readouterr().out


def test_dark_16_bit_images_are_refused_unless_their_bits_are_known(tmp_path):
    fill(tmp_path, image=lambda: RNG.integers(0, 4096, (8, 8), np.uint16))
    with pytest.raises(UserError) as error:
        load_folder(tmp_path, 8, ONE)
    assert "nearly black" in error.value.message and "data.bits=12" in error.value.hint
    assert load_folder(tmp_path, 8, ONE, bits=12).train.pixels.max() > 200
    assert load_folder(tmp_path, 8, ONE, bits=16).train.pixels.max() == 15
    Image.fromarray(np.full((8, 8), 60_000, np.uint16)).save(tmp_path / "a" / "bright.png")
    load_folder(tmp_path, 8, ONE)


def png16(rgb: np.ndarray) -> bytes:
    """A PNG file of 16-bit colours, which Pillow does not write."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    size = struct.pack(">IIBBBBB", rgb.shape[1], rgb.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_dark_16_bit_colours_are_refused(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(2):
            (tmp_path / name / f"{number}.png").write_bytes(png16(RNG.integers(0, 4096, (8, 8, 3), np.uint16)))
    for bits in (None, 12):
        with pytest.raises(UserError, match="16-bit images with colours .* no value above 4,095 of 65,535") as error:
            load_folder(tmp_path, 8, ONE, bits=bits)
        assert "data.bits is for grey images only" in error.value.hint
    assert load_folder(tmp_path, 8, ONE, bits=16).train.pixels.max() == 15
    (tmp_path / "a/bright.png").write_bytes(png16(np.full((8, 8, 3), 60_000, np.uint16)))
    assert load_folder(tmp_path, 8, ONE).train.pixels.max() == 60_000 >> 8
    with pytest.raises(UserError, match="data.bits=12, but some 16-bit images have colours or transparency"):
        load_folder(tmp_path, 8, ONE, bits=12)


def test_frames_and_transparent_pixels_deserve_a_warning(tmp_path, capsys):
    fill(tmp_path, image=lambda: RNG.integers(0, 255, (8, 8, 4), np.uint8))
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "a/x.gif", save_all=True, append_images=[Image.new("L", (8, 8))])
    load_folder(tmp_path, 8, ONE)
    out = capsys.readouterr().out
    assert "warning: 1 of 9 files hold several pictures" in out and "warning: 8 of 9 images have transparent pixels" in out


def test_an_evaluation_without_images_is_refused(tmp_path):
    facts = load_folder(fill(tmp_path), 8, ONE).facts
    with pytest.raises(UserError, match="has no images to evaluate on"):
        load_folder(tmp_path, 8, ONE, trained_on=facts)


def test_an_evaluation_on_training_images_deserves_a_warning(tmp_path, capsys):
    fill(tmp_path / "train")
    fill(tmp_path / "test")
    facts = load_folder(tmp_path, 8, ONE).facts
    assert len(load_folder(tmp_path / "train", 8, ONE, trained_on=facts).train.labels) == 8
    assert "warning: the model was trained on all images of" in capsys.readouterr().out
