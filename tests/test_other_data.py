"""A run on a folder of images: what it was trained with is kept, used in evaluations, and compared when it resumes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from conftest import record
from PIL import Image
from safetensors import safe_open

ARGS = ["data.size=8", "data.pad=0", "data.flip=false", "model.width=0.15", "train.epochs=20", "train.batch_size=20",
        "optim.lr=0.02", "log.every=50", "eval.every=60", "checkpoint.every=60", "--procs", 1]
COLOURS = {"1": (220, 40, 40), "10": (40, 220, 40), "2": (40, 40, 220), "3": (220, 220, 40)}


def fill(root, classes, dim=False, count=20, seed=0):
    rng = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(COLOURS[name] + rng.normal(0, 20, (8, 8, 3)), 0, 255)
            Image.fromarray((pixels * 0.35 + 130 if dim else pixels).astype(np.uint8)).save(root / name / f"{number}.png")
    return root


@pytest.mark.slow
def test_what_a_model_was_trained_with_stays_with_it(launch):
    """The classes of the run are 1, 10 and 2, in this order."""
    fill(launch.folder / "own/train", ("1", "10", "2"))
    for name in ("validation", "test"):
        fill(launch.folder / "own" / name, ("1", "10", "2"), count=5, seed=1 + (name == "test"))
    done = launch("cifar10", "data=own", *ARGS)
    assert done.returncode == 0, done.stderr
    assert "15 of validation/ for evaluation, 15 of test/ for the test at the end; 3 classes: 1, 10, 2" in done.stdout
    run = launch.run()
    assert record(run)["metrics"]["top1"] == 1.0

    def evaluated(*words):
        done = launch("eval", run.name, "--json", *words)
        return json.loads(done.stdout)["metrics"] if done.returncode == 0 else done.stderr

    metrics = record(run)["metrics"]
    assert evaluated() == {name: value for name, value in metrics.items() if not name.startswith("test_")}
    tested = evaluated("--step", "best", "data.eval_split=test")
    rows = launch("predict", run.name, "--set", "test")
    assert rows.returncode == 0 and len(rows.stdout.splitlines()) == 15, rows.stderr
    assert metrics["test_loss"] == tested["loss"] != metrics["loss"] and metrics["test_class/10"] == tested["class/10"]
    # The statistics of other images would make dimmed images look like the training images.
    fill(launch.folder / "dim/test", ("1", "10", "2"), dim=True)
    assert evaluated("data=dim")["loss"] > 10 * record(run)["metrics"]["loss"]
    # A flat folder with two of the classes: all of it counts, and 2 is the third output of the model.
    fill(launch.folder / "flat", ("1", "2"), seed=3)
    other = evaluated("data=flat")
    assert other["top1"] == 1.0 and other.keys() == {"loss", "top1", "class/1", "class/2"}
    fill(launch.folder / "more/test", ("10", "2", "3"))
    assert "trained on the classes 1, 10, 2, which do not include `3`" in evaluated("data=more")

    assert launch("export", run.name, "-o", "m.safetensors").returncode == 0
    with safe_open(launch.folder / "m.safetensors", "np") as file:
        assert json.loads(file.metadata()["classes"]) == ["1", "10", "2"]

    # The record says that the run has not finished, so it can be resumed. Its data has moved.
    (run / "run.json").write_text(json.dumps({**record(run), "state": "preempted"}))
    shutil.copytree(launch.folder / "own", launch.folder / "renamed")
    for name in ("train", "validation", "test"):
        (launch.folder / "renamed" / name / "2").rename(launch.folder / "renamed" / name / "3")
    (launch.folder / "own").rename(launch.folder / "moved")
    refused = launch("resume", run.name)
    assert refused.returncode == 2 and "own does not exist" in refused.stderr and "data=PATH" in refused.stderr
    refused = launch("resume", run.name, "data=renamed")
    assert refused.returncode == 2 and "`classes` was [1, 10, 2], and is [1, 10, 3]" in refused.stderr
    # Images of two of the classes, without their data set. The paths are relative, and one file is no image.
    (launch.folder / "files.txt").write_text("flat/2/0.png\nflat/1/3.png\nflat/2/1.png")
    done = launch("predict", run.name, "files.txt", "--procs", 2)
    assert done.returncode == 0, done.stderr
    assert [json.loads(row)["class"] for row in done.stdout.splitlines()] == ["2", "1", "2"]
    (launch.folder / "files.txt").write_text("flat/2/0.png\n\nnone.png")
    done = launch("predict", run.name, "files.txt")
    assert done.returncode == 2 and "error: 2 of 3 lines are not the path of a file: ``, `none.png`" in done.stderr
    (launch.folder / "files.txt").write_text("flat/2/0.png\nfiles.txt")
    done = launch("predict", run.name, "files.txt", "--procs", 1)
    assert done.returncode == 2 and "error: files.txt cannot be read as an image" in done.stderr and not done.stdout

    done = launch("resume", run.name, "data=moved")
    assert done.returncode == 0 and record(run)["state"] == "finished", done.stderr
