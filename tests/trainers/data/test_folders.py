"""Which image files of a folder are used, for what, and which are passed over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainers.contract.errors import UserError
from trainers.data.folders import list_images


def fill(root: Path, classes="ab", count: int = 4, ending: str = ".png") -> Path:
    """Make empty files: nothing is decoded here."""
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (root / name / f"{number}{ending}").touch()
    return root


def folders_of(files) -> set[str]:
    return {file.parent.parent.name for file, _ in files}


@pytest.mark.parametrize("names, chosen", [
    (("validation", "test"), "validation"), (("valid", "test"), "valid"), (("dev", "test"), "dev"), (("test",), "test"),
    (("Validation", "Test"), "Validation"), (("val", "validation"), "val"),
])
def test_validation_decides_before_test(tmp_path, names, chosen):
    fill(tmp_path / "train")
    for name in names:
        fill(tmp_path / name, count=2)
    listing = list_images(tmp_path, 0.1)
    assert folders_of(listing.test) == {chosen} and len(listing.train) == 8
    assert listing.facts["held_out"] is None and listing.facts["evaluation"] == chosen
    assert f"8 images of train/ for training, 4 of {chosen}/ for evaluation" in listing.about
    final = next((name for name in names if name.lower() == "test" and name != chosen), None)
    assert folders_of(listing.final) == ({final} if final else set())
    assert (f", 4 of {final}/ for the test at the end" in listing.about) == bool(final)
    unused = set(names) - {chosen, final}
    assert all(f"{name}/ not used: data.eval_split chooses" in listing.about for name in unused)


def test_a_test_folder_without_the_training_classes_is_not_used(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "val", count=2)
    fill(tmp_path / "test", ("a", "unknown"))
    listing = list_images(tmp_path, 0.1)
    assert listing.final == [] and "test/ not used: data.eval_split chooses" in listing.about
    assert list_images(tmp_path, 0.1, trained_on={"classes": ["a", "b"]}).final == []


def test_the_folder_to_evaluate_on_can_be_chosen(tmp_path):
    for name in ("train", "validation", "test", "test_hard"):
        fill(tmp_path / name)
    assert folders_of(list_images(tmp_path, 0.1, "test").test) == {"test"}
    assert folders_of(list_images(tmp_path, 0.1, "test_hard").test) == {"test_hard"}
    with pytest.raises(UserError, match=r"has no folder tset/ \(`data.eval_split`\)"):
        list_images(tmp_path, 0.1, "tset")


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    fill(tmp_path, ("bus", "train", "test"))
    assert list_images(tmp_path, 0.0).classes == ["bus", "test", "train"]


def test_images_below_the_class_folders_belong_to_the_class(tmp_path):
    fill(tmp_path, count=2)
    fill(tmp_path / "a", ("2020", "2021"), 5)
    (tmp_path / "a" / "2020" / "back").symlink_to(tmp_path / "a")
    listing = list_images(tmp_path, 0.0)
    assert [label for _, label in listing.train] == [0] * 12 + [1] * 2
    assert listing.train[0][0] == tmp_path / "a/0.png" and tmp_path / "a/2021/4.png" in dict(listing.train)


def test_a_folder_around_the_classes_is_no_class(tmp_path):
    fill(tmp_path / "images")
    with pytest.raises(UserError, match="holds only one class folder, `images`") as error:
        list_images(tmp_path, 0.1)
    assert f"give {tmp_path}/images" in error.value.hint
    fill(tmp_path / "more")
    assert list_images(tmp_path, 0.1).deep and not list_images(tmp_path / "more", 0.1).deep


def test_files_that_are_passed_over_are_counted_by_kind(tmp_path):
    fill(tmp_path, ending=".PNG")
    for ending in (".jfif", ".ppm"):
        fill(tmp_path, ending=ending)
    fill(tmp_path, count=9, ending=".heic")
    (tmp_path / "a" / "README").touch()
    (tmp_path / "a" / ".DS_Store").touch()
    (tmp_path / "loose.png").touch()
    listing = list_images(tmp_path, 0.0)
    assert len(listing.train) == 24
    assert listing.passed_over == {".heic": 18, "no ending": 1, "images outside the class folders": 1}


def test_a_class_without_images_that_can_be_read_says_what_it_holds(tmp_path):
    fill(fill(tmp_path), "c", 7, ".heic")
    with pytest.raises(UserError, match="c holds no images that can be read: 7 .heic"):
        list_images(tmp_path, 0.1)


def test_all_broken_links_are_counted(tmp_path):
    fill(tmp_path)
    for number in range(20):
        (tmp_path / "b" / f"gone {number:02}.png").symlink_to("nowhere")
    with pytest.raises(UserError, match="20 images are links that lead nowhere, or no files: .*gone 03.png and 16 more\n"):
        list_images(tmp_path, 0.1)


def test_an_empty_class_does_not_hide_the_broken_links(tmp_path):
    fill(tmp_path)
    (tmp_path / "Aa").mkdir()
    for number in range(2):
        (tmp_path / "b" / f"gone {number}.png").symlink_to("nowhere")
    with pytest.raises(UserError, match="2 images are links that lead nowhere"):
        list_images(tmp_path, 0.1)


def test_names_that_look_the_same_are_the_same_class(tmp_path):
    fill(tmp_path / "train", ("caf\u00e9", "tea"))
    fill(tmp_path / "test", ("cafe\u0301", "tea "))
    listing = list_images(tmp_path, 0.1)
    assert listing.classes == ["caf\u00e9", "tea"] and [label for _, label in listing.test] == [0] * 4 + [1] * 4
    assert all(file.exists() for file, _ in listing.test)
    fill(tmp_path / "train", ("tea ",))
    with pytest.raises(UserError, match="class folders whose names look the same: 'tea', 'tea '"):
        list_images(tmp_path, 0.1)


def test_all_unknown_classes_are_named(tmp_path):
    fill(tmp_path / "train", ("Cat", "dog"))
    fill(tmp_path / "test", ("cat", "cow", "dog"))
    with pytest.raises(UserError, match="`cat` is not a class of .*, and neither are `cow`") as error:
        list_images(tmp_path, 0.1)
    assert "did you mean `Cat`?" in error.value.hint


# --- An evaluation of a trained model


def test_a_flat_folder_is_evaluated_whole_unless_the_model_was_trained_on_it(tmp_path):
    trained = list_images(fill(tmp_path / "one", count=10), 0.2)
    again = list_images(tmp_path / "one", 0.2, trained_on=trained.facts)
    assert again.test == trained.test and len(again.test) == 4 and again.train == []
    (tmp_path / "one").rename(tmp_path / "moved")
    assert len(list_images(tmp_path / "moved", 0.2, trained_on=trained.facts).test) == 4
    other = list_images(fill(tmp_path / "other", count=11), 0.2, trained_on=trained.facts)
    assert len(other.test) == 22 and "all 22 images (not the training folder as it was: it may hold training" in other.about
    assert list_images(tmp_path / "other", 0.2, trained_on={"classes": ["a", "b"]}).about.endswith("all 22 images")


def test_the_training_decides_which_images_were_held_out(tmp_path):
    trained = list_images(fill(tmp_path, count=10), 0.1)
    again = list_images(tmp_path, 0.5, trained_on=trained.facts)
    assert again.test == trained.test and "data.eval_fraction was 0.1: 0.5 is not used" in again.about
    older = list_images(tmp_path, 0.1, trained_on={"files": trained.facts["files"]})
    assert older.test == trained.test and "if that had data.eval_fraction=0.1 and no evaluation folder" in older.about


def test_an_evaluation_on_the_training_images_is_called_that(tmp_path):
    fill(tmp_path / "train", count=10)
    fill(tmp_path / "test")
    trained = list_images(tmp_path, 0.1)
    again = list_images(tmp_path / "train", 0.1, trained_on=trained.facts)
    assert len(again.test) == 20 and "held out" not in again.about
    assert again.warning.startswith(f"the model was trained on all images of {tmp_path}/train")
    chosen = list_images(tmp_path, 0.1, "train", trained_on=trained.facts)
    assert chosen.warning.startswith(f"{tmp_path}/train holds the images from which the training set was taken")
    assert list_images(tmp_path, 0.1, trained_on=trained.facts).warning == ""


def test_other_evaluation_files_are_other_facts(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test")
    before = list_images(tmp_path, 0.1).facts
    (tmp_path / "test/a/0.png").rename(tmp_path / "test/a/9.png")
    now = list_images(tmp_path, 0.1).facts
    assert {key for key in now if now[key] != before[key]} == {"evaluation_files"}


@pytest.mark.parametrize("evaluation", ["test", None])
def test_folders_that_are_not_used_are_named(tmp_path, evaluation):
    for name in ("train", "eval", "holdout", *([evaluation] if evaluation else [])):
        fill(tmp_path / name)
    assert "(eval/, holdout/ not used: data.eval_split chooses)" in list_images(tmp_path, 0.25).about


def test_two_training_folders_are_refused(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "training")
    with pytest.raises(UserError, match="holds train/ and training/: it is not clear which to train on"):
        list_images(tmp_path, 0.1)
    fill(tmp_path / "flat", ("train", "training"))
    assert list_images(fill(tmp_path / "flat"), 0.1).classes == ["a", "b", "train", "training"]


def test_an_evaluation_needs_no_training_images(tmp_path):
    fill(tmp_path / "test")
    with pytest.raises(UserError, match="no train/"):
        list_images(tmp_path, 0.1)
    assert len(list_images(tmp_path, 0.1, trained_on={}).test) == 8


def test_the_held_out_files_are_those_of_earlier_versions(tmp_path):
    fill(tmp_path, count=20)
    held = {os.path.relpath(file, tmp_path) for file, _ in list_images(tmp_path, 0.1).test}
    assert held == {f"{name}/{number}.png" for name in "ab" for number in (4, 15)}
