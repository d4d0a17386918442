"""Use the checkpoint of one run in another: evaluate the checkpoint, or start a run from its weights."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
from conftest import BLOBS, Command, logged_steps, ranks_of, record, rows, wait_until

pytestmark = pytest.mark.slow
SENTENCES = BLOBS.parents[1] / "sentences/sentences.yaml"
# The task has BatchNorm, dropout, noise that depends on the rank, and averaged weights. Equal results here are equal to the last
# bit.
ARGS = [BLOBS, "train.steps=30", "eval.every=10", "checkpoint.every=10", "checkpoint.keep_last=9", "train.ema=0.9"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A command whose folder holds a run of two ranks. The run was evaluated by a second command while it was running."""
    command = Command(tmp_path_factory.mktemp("source"))
    process = command.start(*ARGS, "--procs", 2, "model.pause_s=0.2")
    wait_until(lambda: list(command.folder.glob("runs/*/checkpoints/step_10")), process=process)
    ranks = ranks_of(process.pid)
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    assert record(command.run())["state"] == "running"
    command.meanwhile = command("eval", command.run(), "--step", 10, "--json")
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return command


def files_without_evals(run) -> dict[str, bytes]:
    """Return the content of every file of the run, except those of evaluations."""
    return {str(path): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file() and "evals" not in path.parts}


def test_an_evaluation_gives_the_metrics_of_the_run_to_the_last_bit(source):
    run = source.run()
    before = files_without_evals(run)
    own = {row["step"]: {"loss": row["loss"], "top1": row["top1"]} for row in rows(run, "eval")}
    last = source("eval", run.name[:-2])
    assert last.returncode == 0, last.stderr
    assert f"evaluating run {run.name}, step 30" in last.stdout and "2 CPU ranks" in last.stdout
    result = json.loads(source.meanwhile.stdout)
    assert (result["run"], result["step"], result["ranks"], result["metrics"]) == (run.name, 10, 2, own[10])
    records = [record(path) for path in (run / "evals").iterdir()]
    assert {row["init"]["step"]: row["metrics"] for row in records} == {10: own[10], 30: own[30]}
    assert {row["state"] for row in records} == {"finished"}
    assert files_without_evals(run) == before and len(source.runs()) == 1
    assert not list(run.glob("evals/*/init")), "the disk space of a deleted checkpoint would not be freed"


def test_other_weights_of_a_checkpoint_are_evaluated_and_exported(source):
    """The trained weights instead of their average, and the mean of three checkpoints."""
    run, losses = source.run(), []
    for words, about in ((["--raw"], "trained weights"), (["--average", 3], "the mean of steps 10, 20, 30")):
        evaluated = source("eval", run, *words, "--json")
        exported = source("export", run, *words)
        assert (evaluated.returncode, exported.returncode) == (0, 0), evaluated.stderr + exported.stderr
        assert f"step 30, {about}, " in exported.stderr
        again = source(BLOBS, "--runs", "others", "--procs", 2, "eval.only=true", "--from", exported.stdout.strip())
        assert again.returncode == 0, again.stderr
        newest = max((source.folder / "others").iterdir(), key=lambda path: path.stat().st_mtime)
        metrics = json.loads(evaluated.stdout)["metrics"]
        assert record(newest)["metrics"] == metrics
        losses.append(metrics["loss"])
        shutil.rmtree(run / "evals" / json.loads(evaluated.stdout)["id"])
    assert len({*losses, rows(run, "eval")[-1]["loss"]}) == 3
    assert sorted(path.name for path in (run / "export").iterdir()) == ["step_30-average-3", "step_30-raw"]
    shutil.rmtree(run / "export")
    refused = source("eval", run, "--average", 4)
    assert (refused.returncode, refused.stderr) == (
        2, f"error: `{run.name}` has 3 whole checkpoints up to step 30, but the weights of 4 are to be averaged\n"
        "hint: use --average 3 (init.average=3); a run keeps as many of its newest checkpoints as `checkpoint.keep_last` says\n")


def test_an_evaluation_that_is_not_possible_ends_with_a_short_error(source):
    folder = source.folder
    (folder / "noeval.py").write_text(
        "from blobs import BlobsTask\nclass Task(BlobsTask):\n"
        "    def data(self, world):\n        return super().data(world)[0], None\n")
    text = BLOBS.read_text().replace("blobs:BlobsTask", "noeval:Task")
    (folder / "noeval.yaml").write_text(text)
    done = source(folder / "noeval.yaml", "--runs", "others", "eval.only=true", "--from", source.run(), "--procs", 1,
                  PYTHONPATH=str(BLOBS.parent))
    assert (done.returncode, done.stderr) == (2, "error: the task `noeval:Task` has no evaluation set\n"
                                              "hint: use data=PATH with an evaluation set, or return an evaluation set "
                                              "from the task's `data`\n")
    done = source(SENTENCES, "--runs", "others", "--from", source.run(), "--procs", 1)
    assert done.returncode == 2 and done.stderr.startswith("error: the weights of `") and len(done.stderr.splitlines()) == 2
    assert "do not fit the model: `words.weight` is missing, " in done.stderr and "belong to this model" in done.stderr


def test_a_run_keeps_its_initial_weights_until_it_has_a_checkpoint(source, tmp_path):
    shutil.copytree(source.run(), tmp_path / "runs/source")
    args = [BLOBS, "--procs", 1, "train.steps=12", "checkpoint.every=6", "optim.warmup=0", "--from", "source@20"]
    whole, cut = Command(tmp_path), Command(tmp_path / "cut")
    cut.folder.mkdir()
    shutil.copytree(source.run(), cut.folder / "source")
    done = whole(*args)
    assert done.returncode == 0, done.stderr
    (new,) = [run for run in whole.runs() if run.name != "source"]
    assert "step_20` (averaged weights: train.ema): " in done.stdout and "tensors loaded" in done.stdout
    assert record(new)["init"]["step"] == 20 and not (new / "init").exists()
    assert rows(new)[0]["loss"] < rows(source.run())[0]["loss"]

    process = cut.start(*args[:-1], cut.folder / "source@20", "model.pause_s=1")
    wait_until(lambda: logged_steps(cut.folder) >= 1, process=process)
    os.kill(ranks_of(process.pid)[0], signal.SIGKILL)
    process.communicate(timeout=120)
    run = cut.run()
    assert record(run)["state"] == "failed" and record(run)["checkpoint"] is None
    shutil.rmtree(cut.folder / "source")
    resumed = cut("resume", run.name)
    assert resumed.returncode == 0, resumed.stderr
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(new)]
