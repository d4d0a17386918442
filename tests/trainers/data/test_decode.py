"""Image files become what a picture viewer shows, or are refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from trainers.contract.errors import UserError
from trainers.data.decode import decode, decode_all

LEFT = np.zeros((8, 8, 3), np.uint8)
LEFT[:, :4] = 200, 30, 90  # only the left half is coloured


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
def test_the_orientation_of_a_photograph_is_heeded(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = save(tmp_path / f"x.{ending}", LEFT, exif=exif, **({"lossless": True} if ending == "webp" else {}))
    with Image.open(file) as image:
        seen = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).transpose(2, 0, 1)
    pixels = decode(file, 8).pixels
    np.testing.assert_array_equal(pixels, seen)
    sides = {1: pixels[0, :, :4], 2: pixels[0, :, 4:], 3: pixels[0, :, 4:], 4: pixels[0, :, :4],
             5: pixels[0, :4], 6: pixels[0, :4], 7: pixels[0, 4:], 8: pixels[0, 4:]}
    assert sides[orientation].mean() > 150


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_data_does_not_matter(tmp_path):
    file = save(tmp_path / "x.jpg", LEFT, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert decode(file, 8)[0][0, :, :3].mean() > 150


def test_a_viewer_shows_the_high_byte_of_16_bits(tmp_path):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    for name in ("x.png", "x.tif"):
        pixels, brightest, *_ = decode(save(tmp_path / name, values), 8)
        np.testing.assert_array_equal(pixels[0], values >> 8)
        assert brightest == 63 * 1024


def test_the_bits_in_use_can_be_set(tmp_path):
    file = save(tmp_path / "x.png", np.arange(64, dtype=np.uint16).reshape(8, 8) * 65)
    pixels, brightest, *_ = decode(file, 8, bits=12)
    assert brightest == 4095 and pixels.max() == 255 and pixels[2, 4, 0] == 32 * 65 >> 4
    assert decode(file, 8, bits=8)[0].max() == 255


@pytest.mark.parametrize("values, message", [
    (np.full((8, 8), 0.5, np.float32), "its pixels are floating-point numbers"),
    (np.full((8, 8), 70_000, np.int32), "its values are not within 0 and 65535"),
    (np.full((8, 8), -5, np.int32), "its values are not within 0 and 65535"),
])
def test_pixels_without_a_known_white_are_refused(tmp_path, values, message):
    with pytest.raises(UserError, match=f"x.tif cannot be read as an image: {message}.* convert it to 8 or 16 bits"):
        decode(save(tmp_path / "x.tif", values), 8)


def test_a_16_bit_tiff_with_a_white_zero_is_refused(tmp_path):
    values = np.full((8, 8), 1000, np.uint16)
    assert decode(save(tmp_path / "x.tif", values, tiffinfo={262: 1}), 8).brightest == 1000
    with pytest.raises(UserError, match="a 16-bit TIFF image in which 0 is white"):
        decode(save(tmp_path / "x.tif", values, tiffinfo={262: 0}), 8)


@pytest.mark.parametrize("ending", ["gif", "tif", "png", "webp"])
def test_files_with_several_pictures_are_counted(tmp_path, ending):
    frames = [Image.fromarray(LEFT), Image.fromarray(LEFT[::-1, ::-1])]
    frames[0].save(tmp_path / f"2.{ending}", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / f"1.{ending}")
    assert decode(tmp_path / f"2.{ending}", 8).several and not decode(tmp_path / f"1.{ending}", 8).several
    assert decode_all([tmp_path / f"2.{ending}", tmp_path / f"1.{ending}"], 8, None).several == 1


def test_images_with_transparent_pixels_are_counted(tmp_path):
    hidden = np.dstack([LEFT, np.full((8, 8), 255, np.uint8)])
    opaque = save(tmp_path / "opaque.png", hidden)
    hidden[0, 0, 3] = 0
    clear = save(tmp_path / "clear.png", hidden)
    decoded = decode_all([opaque, clear], 8, None)
    assert decoded.transparent == 1 and (decoded.pixels[0] == decoded.pixels[1]).all()


def test_all_broken_files_are_named_at_once(tmp_path):
    files = [save(tmp_path / f"{number:02}.png", LEFT) for number in range(30)]
    for file in files[5:17]:
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError) as error:
        decode_all(files, 8, None)
    message = error.value.message
    assert message.startswith("12 of 30 files cannot be read as images: ") and message.endswith(" and 2 more")
    assert all(str(file) in message for file in files[5:15]) and str(files[4]) not in message
    assert len(str(error.value).splitlines()) == 2


def test_a_broken_file_whose_name_is_not_utf8_can_be_named(tmp_path):
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    file.touch()
    with pytest.raises(UserError) as error:
        decode_all([file], 8, None)
    assert "caf\\udce9.png cannot be read as an image" in str(error.value).encode("utf-8").decode("utf-8")
