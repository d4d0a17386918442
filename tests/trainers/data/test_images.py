"""Images for classification: augmentation, folders of images, CIFAR-10 and the sample set."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainers.cifar10.shapes import draw_shapes
from trainers.contract.errors import UserError
from trainers.data.augment import NOTHING, Augment
from trainers.data.decode import decode_all
from trainers.data.folders import list_images
from trainers.data.image_folder import load_folder
from trainers.data.images import Images, Raw, load_cifar10, mean_and_std, resident
from trainers.engine.task import Share
from trainers.engine.world import World

CPU = torch.device("cpu")
ONE = World(0, 1, 0, 1, CPU)
FULL = Augment(pad=3, flip=True, cutout=5)


def random_raw(count: int = 40, side: int = 12) -> Raw:
    rng = np.random.default_rng(0)
    return Raw(rng.integers(0, 256, (count, 3, side, side), np.uint8), rng.integers(0, 4, count))


def images(raw: Raw, augment: Augment = NOTHING) -> Images:
    return Images(raw, ["a", "b", "c", "d"], CPU, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), augment=augment)


def share(slots: np.ndarray, size: int = 16, seed: int = 7) -> Share:
    return Share(indices=slots * 2 + 1, slots=slots, size=size, seed=seed)


def write(file: Path, side: tuple[int, int] = (8, 8), colour: tuple[int, int, int] = (200, 30, 90)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", side, colour).save(file)
    return file


def flat(folder: Path, count: int = 10, classes: tuple[str, ...] = ("ant", "bee")) -> Path:
    for name in classes:
        for number in range(count):
            write(folder / name / f"{number}.png")
    return folder


def pixels_of(folder: Path) -> np.ndarray:
    return decode_all(sorted(file for file in folder.rglob("*") if file.is_file()), 8, None).pixels


# --- Augmentation


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_augmentation_of_a_sample_does_not_depend_on_the_division_of_the_batch(parts):
    data = images(random_raw(), FULL)
    whole, labels = data.batch(share(np.arange(16)))
    pieces = [data.batch(share(slots)) for slots in np.split(np.arange(16), parts)]
    assert torch.equal(torch.cat([piece for piece, _ in pieces]), whole)
    assert torch.equal(torch.cat([piece for _, piece in pieces]), labels)


@pytest.mark.parametrize("augment", [FULL, Augment(pad=4), Augment(flip=True), Augment(cutout=4), Augment(pad=11)])
def test_augmentation_equals_a_plain_version_of_it(augment):
    """The plain version takes one sample at a time: it pads, crops, mirrors and blanks the image."""
    raw, side = random_raw(), 12
    part = share(np.arange(3, 16))
    got, _ = images(raw, augment).batch(part)
    drawn = augment.draw(part, side)
    for image, index, (top, left, mirrored, row, column) in zip(got, part.indices, drawn.T):
        p = augment.pad
        padded = np.pad(raw.pixels[index], ((0, 0), (p, p), (p, p)), mode="reflect")
        want = padded[:, top:top + side, left:left + side]
        want = want[:, :, ::-1] if mirrored else want
        want = (want / 255 - np.reshape((0.4, 0.5, 0.6), (3, 1, 1))) / np.reshape((0.2, 0.25, 0.3), (3, 1, 1))
        if augment.cutout:
            y, x = row - augment.cutout // 2, column - augment.cutout // 2
            want[:, max(0, y):y + augment.cutout, max(0, x):x + augment.cutout] = 0
        np.testing.assert_allclose(image, want, atol=1e-5)


def test_augmentation_varies_over_its_whole_range():
    drawn = FULL.draw(share(np.arange(2000), size=2000), 12)
    assert [set(row) for row in drawn] == [set(range(end)) for end in (7, 7, 2, 12, 12)]
    again, other = (FULL.draw(share(np.arange(2000), size=2000, seed=seed), 12) for seed in (7, 8))
    assert (again == drawn).all() and (other != drawn).any()


def test_without_augmentation_the_pixels_can_be_computed_back():
    raw = random_raw()
    got, labels = images(raw).batch(share(np.arange(16)))
    back = got * torch.tensor((0.2, 0.25, 0.3)).view(3, 1, 1) + torch.tensor((0.4, 0.5, 0.6)).view(3, 1, 1)
    index = np.arange(16) * 2 + 1
    np.testing.assert_allclose(back * 255, raw.pixels[index], atol=1e-3)
    assert labels.tolist() == raw.labels[index].tolist() and labels.dtype == torch.int64


@pytest.mark.parametrize("augment", [Augment(), FULL])
def test_an_empty_share_gives_an_empty_batch(augment):
    got, labels = images(random_raw(), augment).batch(share(np.arange(0)))
    assert got.shape == (0, 3, 12, 12) and got.dtype == torch.float32 and labels.shape == (0,)


def test_mean_and_std():
    raw = random_raw(5000)
    mean, std = mean_and_std(raw.pixels)
    np.testing.assert_allclose(mean, (raw.pixels / 255).mean((0, 2, 3)))
    np.testing.assert_allclose(std, (raw.pixels / 255).std((0, 2, 3)))
    assert mean_and_std(np.full((2, 3, 4, 4), 51, np.uint8)) == ([0.2] * 3, [1.0] * 3)


def test_resident_scales_and_uses_the_training_statistics_for_both():
    train, test = resident(draw_shapes(), CPU, 16, FULL)
    assert train.pixels.shape == (1000, 3, 16, 16) and test.pixels.shape == (500, 3, 16, 16)
    assert train.augment == FULL and not test.augment.active
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in mean_and_std(train.pixels.numpy()))
    got = test.batch(Share(np.arange(500), np.arange(500), 500, 0))[0]
    torch.testing.assert_close(got, (test.pixels / 255 - mean) / std, atol=1e-5, rtol=0)
    plain, _ = resident(draw_shapes(), CPU, 32, Augment())
    got = plain.batch(Share(np.arange(1000), np.arange(1000), 1000, 0))[0]
    assert torch.allclose(got.mean((0, 2, 3)), torch.zeros(3), atol=1e-3)
    assert torch.allclose(got.std((0, 2, 3)), torch.ones(3), atol=1e-3)


# --- Folders


@pytest.mark.parametrize("name", ["test", "val", "valid"])
def test_a_folder_with_training_and_evaluation_images(tmp_path, name):
    root = tmp_path / "my 图片"
    flat(root / "train", 3, ("猫", "a dog", "bee"))
    flat(root / name, 2, ("bee", "猫"))
    sets = load_folder(root, 8, ONE, eval_fraction=0.1)
    assert sets.classes == ["a dog", "bee", "猫"]
    assert sets.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and sets.test.labels.tolist() == [1, 1, 2, 2]
    assert (sets.train.pixels[0, :, 0, 0] == (200, 30, 90)).all() and sets.train.pixels.flags.c_contiguous


def test_a_validation_folder_is_used_before_a_test_folder(tmp_path):
    flat(tmp_path / "train", 3)
    flat(tmp_path / "val", 2)
    write(tmp_path / "test" / "unlabelled.png")
    assert len(list_images(tmp_path, 0.1).test) == 4


def test_without_an_evaluation_folder_a_share_of_each_class_is_held_out(tmp_path, capsys):
    flat(tmp_path, 20)
    listing = list_images(tmp_path, 0.25)
    assert listing.facts["held_out"] == 0.25 and [label for _, label in listing.test] == [0] * 5 + [1] * 5
    assert sorted(listing.train + listing.test) == [(tmp_path / name / file, label) for label, name in
                                                    enumerate(("ant", "bee")) for file in sorted(
                                                        f"{n}.png" for n in range(20))]
    assert list_images(tmp_path, 0.25) == listing
    load_folder(tmp_path, 8, ONE, eval_fraction=0.25)
    assert "10 of 40 images are held out (data.eval_fraction=0.25" in capsys.readouterr().out
    assert load_folder(tmp_path, 8, ONE, eval_fraction=0.0).test is None


def test_the_only_image_of_a_class_is_a_training_image(tmp_path):
    flat(tmp_path, 1)
    listing = list_images(tmp_path, 0.9)
    assert len(listing.train) == 2 and not listing.test


def test_files_that_are_not_images_are_ignored(tmp_path):
    flat(tmp_path / "train", 2)
    flat(tmp_path / "test", 1)
    for stray in ("train/.cache/x.png", "train/ant/.hidden.png", "train/ant/notes.txt", "train/list.csv", "readme.md"):
        (tmp_path / stray).parent.mkdir(exist_ok=True)
        (tmp_path / stray).write_text("not an image")
    (tmp_path / "train/ant/folder.png").mkdir()
    sets = load_folder(tmp_path, 8, ONE, eval_fraction=0.1)
    assert sets.classes == ["ant", "bee"] and len(sets.train.labels) == 4


@pytest.mark.parametrize("ending", [".png", ".jpg", ".jfif", ".jpe", ".bmp", ".webp", ".gif", ".tif", ".ppm", ".tga", ".jp2"])
def test_every_image_format_is_read(tmp_path, ending):
    write(tmp_path / "a" / f"X{ending.upper()}", (10, 8))
    pixels = pixels_of(tmp_path)
    np.testing.assert_allclose(pixels[0, :, 4, 4].astype(int), (200, 30, 90), atol=20)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "LA", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = np.full((8, 8), 128, np.uint8)
    (tmp_path / "a").mkdir()
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    image.save(tmp_path / "a" / "x.tif")
    pixels = pixels_of(tmp_path).astype(int)
    assert pixels.shape == (1, 3, 8, 8) and abs(pixels.mean() - 128) < 20


def test_other_sizes_are_scaled_by_the_shorter_side_and_cut_at_the_centre(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (16, 48, 3), np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(noise).save(tmp_path / "a" / "wide.png")
    Image.fromarray(noise.transpose(1, 0, 2)).save(tmp_path / "a" / "tall.png")
    tall, wide = pixels_of(tmp_path).astype(int)
    scaled = np.asarray(Image.fromarray(noise).resize((24, 8), Image.Resampling.BILINEAR)).astype(int)
    assert abs(wide - scaled[:, 8:16].transpose(2, 0, 1)).max() <= 1
    assert abs(tall - wide.transpose(0, 2, 1)).max() <= 1


def test_links_are_followed(tmp_path):
    flat(tmp_path / "real", 2, ("ant",))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked class").symlink_to(tmp_path / "real" / "ant")
    (tmp_path / "data" / "bee").mkdir()
    (tmp_path / "data" / "bee" / "one.png").symlink_to(tmp_path / "real" / "ant" / "0.png")
    sets = load_folder(tmp_path / "data", 8, ONE, eval_fraction=0.0)
    assert sets.classes == ["bee", "linked class"] and sets.train.labels.tolist() == [0, 1, 1]


def broken_image(root: Path) -> Path:
    file = write(flat(root) / "bee" / "bad.png")
    file.write_bytes(file.read_bytes()[:40])
    return file


def text_as_image(root: Path) -> Path:
    file = flat(root) / "bee" / "text.jpg"
    file.write_text("no image")
    return file


def dangling_link(root: Path) -> Path:
    file = flat(root) / "bee" / "gone.png"
    file.symlink_to("nowhere.png")
    return file


def circular_link(root: Path) -> Path:
    file = flat(root) / "bee" / "round.png"
    file.symlink_to("round.png")
    return file


def empty_class(root: Path) -> Path:
    (flat(root) / "cow").mkdir()
    return root / "cow"


def no_classes(root: Path) -> Path:
    write(root / "loose.png")
    return root


def nothing(root: Path) -> Path:
    root.mkdir()
    return root


def a_file(root: Path) -> Path:
    return write(root.with_suffix(".png")).rename(root)


def strange_class(root: Path) -> Path:
    flat(root / "train")
    flat(root / "test", 1, ("bee", "cow"))
    return root / "test" / "cow"


def no_training(root: Path) -> Path:
    flat(root / "test")
    return root


@pytest.mark.parametrize("make, message", [
    (broken_image, "cannot be read as an image"), (text_as_image, "cannot be read as an image"),
    (dangling_link, "leads nowhere"), (circular_link, "leads nowhere"), (empty_class, "holds no images"),
    (no_classes, "images but no class folders"), (nothing, "no class folders"), (a_file, "is not a folder"),
    (strange_class, "`cow` is not a class of"), (no_training, "no train/"), (lambda root: root, "does not exist"),
])
def test_bad_folders_are_refused_by_name(tmp_path, make, message):
    bad = make(tmp_path / "set")
    with pytest.raises(UserError) as error:
        load_folder(tmp_path / "set", 8, ONE, eval_fraction=0.1)
    assert str(bad) in error.value.message and message in error.value.message
    assert error.value.hint and len(str(error.value).splitlines()) == 2


def test_a_class_folder_whose_name_is_not_utf8_is_refused_at_the_start(tmp_path):
    flat(tmp_path / "set")
    os.rename(os.fsencode(tmp_path / "set/bee"), os.fsencode(tmp_path / "set") + b"/caf\xe9")
    with pytest.raises(UserError, match=r"the class folder b'caf\\xe9' in .* is not valid UTF-8"):
        load_folder(tmp_path / "set", 8, ONE, eval_fraction=0.1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder_is_refused(tmp_path):
    (flat(tmp_path) / "ant").chmod(0)
    try:
        with pytest.raises(UserError, match="ant cannot be listed: Permission denied"):
            list_images(tmp_path, 0.1)
    finally:
        (tmp_path / "ant").chmod(0o700)


# --- CIFAR-10 and the sample


@pytest.fixture
def small_cifar10(monkeypatch):
    """Make torchvision's CIFAR10 accept a small archive of 30 images. Return the bytes of the archive."""
    import hashlib
    import io
    import pickle
    import tarfile

    from torchvision.datasets import CIFAR10

    rng = np.random.default_rng(0)
    files = {"batches.meta": {"label_names": [f"class {n}" for n in range(10)]}}
    for name in [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]:
        files[name] = {"data": rng.integers(0, 256, (5, 3072), np.uint8), "labels": [0, 1, 2, 3, 9]}
    packed = {name: pickle.dumps(content) for name, content in files.items()}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in packed.items():
            info = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

    def md5(content: bytes) -> str:
        return hashlib.md5(content).hexdigest()

    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(stream.getvalue()))
    monkeypatch.setattr(CIFAR10, "train_list", [[n, md5(c)] for n, c in packed.items() if n.startswith("data")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(packed["test_batch"])]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(packed["batches.meta"])})
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # no server listens there
    return stream.getvalue()


def test_cifar10_is_read_from_an_archive_that_is_already_there(tmp_path, small_cifar10):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(small_cifar10)
    sets = load_cifar10(tmp_path, ONE)
    assert sets.train.pixels.shape == (25, 3, 32, 32) and sets.train.labels.tolist() == [0, 1, 2, 3, 9] * 5
    assert len(sets.test.labels) == 5 and sets.classes[9] == "class 9"
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    assert (load_cifar10(tmp_path, ONE).train.pixels == sets.train.pixels).all()
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-batches-py"]


def test_a_broken_cifar10_is_replaced(tmp_path, small_cifar10):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(small_cifar10)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    batch.parent.mkdir()
    batch.write_bytes(b"cut off")
    assert len(load_cifar10(tmp_path, ONE).train.labels) == 25 and batch.stat().st_size > 1000


@pytest.mark.parametrize("archive", [None, b"broken"])
def test_cifar10_that_cannot_be_downloaded_is_an_error(tmp_path, small_cifar10, archive):
    root = tmp_path / "new" / "data"
    if archive:
        root.mkdir(parents=True)
        (root / "cifar-10-python.tar.gz").write_bytes(archive)
    with pytest.raises(UserError) as error:
        load_cifar10(root, ONE)
    text = str(error.value)
    assert str(root) in text and "data=sample" in text and "127.0.0.1" in text and "refused" in text
    assert ("is broken" in text) == (archive is not None) and len(text.splitlines()) == 2
    assert not list(root.glob(".cifar10-*"))


def test_a_root_that_cannot_be_written_is_an_error(tmp_path, small_cifar10):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        load_cifar10(tmp_path / "file" / "data", ONE)


def test_the_sample_set_is_balanced_and_repeatable():
    sets = draw_shapes()
    assert sets.train.pixels.shape == (1000, 3, 32, 32) and sets.train.pixels.dtype == np.uint8
    assert (np.bincount(sets.train.labels) == 100).all() and (np.bincount(sets.test.labels) == 50).all()
    assert len(sets.classes) == 10
    assert (draw_shapes().train.pixels == sets.train.pixels).all()
    assert (draw_shapes(1).train.pixels != sets.train.pixels).any()
    assert len(np.unique(sets.train.pixels.reshape(1000, -1), axis=0)) == 1000
