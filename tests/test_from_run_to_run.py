"""From one run to another: an evaluation of a run's checkpoint, and a run that starts from another's weights."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
from conftest import BLOBS, Command, logged_steps, ranks_of, record, rows, wait_until

pytestmark = pytest.mark.slow
SENTENCES = BLOBS.parents[1] / "sentences/sentences.yaml"
# BatchNorm, dropout and noise that depends on the rank: what is the same here is the same to the bit.
ARGS = [BLOBS, "train.steps=30", "eval.every=10", "checkpoint.every=10", "checkpoint.keep_last=9"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A command's folder with a run of two ranks, which was evaluated from outside while it went on."""
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


def untouched(run) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file() and "evals" not in path.parts}


def test_an_evaluation_gives_the_runs_own_numbers_to_the_bit(source):
    run = source.run()
    before = untouched(run)
    own = {row["step"]: {"loss": row["loss"], "top1": row["top1"]} for row in rows(run, "eval")}
    last = source("eval", run.name[:-2])
    assert last.returncode == 0, last.stderr
    assert f"evaluating run {run.name}, step 30" in last.stdout and "2 CPU ranks" in last.stdout
    found = json.loads(source.meanwhile.stdout)
    assert (found["run"], found["step"], found["ranks"], found["metrics"]) == (run.name, 10, 2, own[10])
    records = [record(path) for path in (run / "evals").iterdir()]
    assert {each["init"]["step"]: each["metrics"] for each in records} == {10: own[10], 30: own[30]}
    assert {each["state"] for each in records} == {"finished"}
    assert untouched(run) == before and len(source.runs()) == 1
    assert not list(run.glob("evals/*/init")), "a deleted checkpoint would keep its room"


def test_what_cannot_be_evaluated_ends_with_a_word(source):
    folder = source.folder
    (folder / "noeval.py").write_text(
        "from blobs import BlobsTask\nclass Task(BlobsTask):\n"
        "    def data(self, world):\n        return super().data(world)[0], None\n")
    text = BLOBS.read_text().replace("blobs:BlobsTask", "noeval:Task")
    (folder / "noeval.yaml").write_text(text)
    done = source(folder / "noeval.yaml", "--runs", "others", "eval.only=true", "--from", source.run(), "--procs", 1,
                  PYTHONPATH=str(BLOBS.parent))
    assert (done.returncode, done.stderr) == (2, "error: the task `noeval:Task` has no evaluation set\n"
                                              "hint: give data=PATH that has one, or let the task's `data` return one\n")
    done = source(SENTENCES, "--runs", "others", "--from", source.run(), "--procs", 1)
    assert done.returncode == 2 and done.stderr.startswith("error: the weights of `") and len(done.stderr.splitlines()) == 2
    assert "do not fit the model: there is no `words.weight`, " in done.stderr and "are they of this model?" in done.stderr


def test_a_run_keeps_the_weights_it_starts_from_until_it_has_its_own(source, tmp_path):
    shutil.copytree(source.run(), tmp_path / "runs/source")
    args = [BLOBS, "--procs", 1, "train.steps=12", "checkpoint.every=6", "optim.warmup=0", "--from", "source@20"]
    whole, cut = Command(tmp_path), Command(tmp_path / "cut")
    cut.folder.mkdir()
    shutil.copytree(source.run(), cut.folder / "source")
    done = whole(*args)
    assert done.returncode == 0, done.stderr
    (new,) = [run for run in whole.runs() if run.name != "source"]
    assert "step_20`: " in done.stdout and "tensors taken" in done.stdout
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
