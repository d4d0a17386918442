"""`launch predict`: a row for each line, with a task of texts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import Command, environment, ranks_of, wait_until

pytestmark = pytest.mark.slow

TASK = '''
import os, time
import torch
from torch import nn
from trainers.engine.task import Loss, Task
from trainers.errors import UserError

class Texts:
    def __init__(self, texts, device):
        self.texts, self.device = texts, device
        self.lengths = torch.tensor([1 + len(text.encode()) for text in texts]).numpy()
    def __len__(self):
        return len(self.texts)
    def batch(self, share):
        texts = [self.texts[i] for i in share.indices.tolist()]
        codes = [torch.tensor([0, *(1 + byte for byte in text.encode())]) for text in texts]
        codes = nn.utils.rnn.pad_sequence(codes, True, 299)
        print(len(texts), "samples in a batch of", codes.numel(), "tokens")
        return texts, codes.to(self.device)

class Model(nn.Module):
    def __init__(self, words):
        super().__init__()
        self.embed, self.norm, self.out = nn.Embedding(300, 8, padding_idx=299), nn.BatchNorm1d(8), nn.Linear(8, len(words))
    def forward(self, codes):
        return self.out(self.norm(self.embed(codes).sum(1)))

class Labels(Task):
    """Labels a text with a word. The words are facts of the training data."""
    def data(self, world):
        self.words = open("words.txt").read().split()
        texts = Texts([chr(97 + n % 26) * (1 + n % 5) for n in range(64)], world.device)
        return texts, Texts(texts.texts[:7], world.device)
    def facts(self):
        return {"words": self.words}
    def inputs(self, lines, world):
        self.words = self.trained_facts["words"]
        if self.config.model["fault"] == "short":
            lines = lines[1:]
        return Texts(lines, world.device)
    def model(self):
        return Model(self.words)
    def loss(self, model, batch):
        logits = model(batch[1])
        return Loss(nn.functional.cross_entropy(logits, batch[1].sum(1) % len(self.words), reduction="sum"), len(logits))
    def rows(self, models, batch):
        assert not models["model"].training
        texts, codes = batch
        if self.config.model["fault"] == "hang":
            open("started", "w").close()
            time.sleep(60)
        if self.config.model["fault"] == "crash" and os.environ["RANK"] == "1":
            raise ValueError("a fault of the task")
        scores, words = models["model"](codes).softmax(1).max(1)
        return [f"{self.words[word]} {score:.3f} {text}" for text, score, word in zip(texts, scores.tolist(), words.tolist())]

    def test_set(self, world):
        return Texts(["x", "yy"], world.device)

class Silent(Labels):
    rows = Task.rows

class Deaf(Labels):
    inputs = Task.inputs
'''
SPEC = "task: labels:Labels\nmodel: {fault: none}\ntrain: {steps: 3, batch_size: 8}\ncheckpoint: {every: 2, metric: loss}\n" \
       "eval: {every: 2, batch_size: 2}\n"
LINES = ["one", "", "two  words ", "\u4e2d\u6587", "line\u2028separator", "\x0b\x85", "a" * 500,
         *(f"line {n}" for n in range(20))]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A command whose folder holds one trained run. The training data is gone."""
    command = Command(tmp_path_factory.mktemp("source"))
    (command.folder / "labels.py").write_text(TASK)
    (command.folder / "labels.yaml").write_text(SPEC)
    (command.folder / "words.txt").write_text("red green blue")
    done = command("labels.yaml", "--procs", 1)
    assert done.returncode == 0, done.stderr
    (command.folder / "words.txt").rename(command.folder / "words")
    (command.folder / "lines.txt").write_bytes("\r\n".join(LINES).encode())  # and no line end after the last line
    return command


def predict(source, *args, text=None):
    """Run `launch predict RUN`, with `text` (bytes) as standard input. Returns (exit code, output, errors)."""
    run = source.run()
    done = subprocess.run([sys.executable, "-P", "-m", "launch", "predict", str(run), *map(str, args)], cwd=source.folder,
                          input=text or b"", capture_output=True, env=environment(), timeout=300)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_rows_come_in_the_order_of_the_lines_at_any_number_of_ranks(source):
    folder = source.folder
    before = sorted(source.run().rglob("*"))
    code, out, err = predict(source, "lines.txt", "--procs", 3, "--step", 2)
    assert code == 0, err
    assert "step 2: 3 CPU ranks" in err and "27 samples, " in err and "samples in a batch of" in err
    assert [row.split(" ", 2)[2] for row in out.split("\n")[:-1]] == LINES
    assert {row.split(" ", 1)[0] for row in out.split("\n")[:-1]} <= {"red", "green", "blue"}
    # One rank, standard input, and a file: the same rows.
    code, other, err = predict(source, "--procs", 1, "--step", 2, "-o", "rows.txt", text=(folder / "lines.txt").read_bytes())
    assert (code, other, (folder / "rows.txt").read_bytes().decode()) == (0, "", out), err
    # Batches of similar length, up to 40 tokens: other samples together, and the same rows in the same order.
    code, tokens, err = predict(source, "lines.txt", "--procs", 3, "--step", 2, "eval.batch_size=null", "eval.batch_tokens=40")
    assert (code, tokens) == (0, out) and "1 samples in a batch of 501 tokens" in err, err
    # More ranks than lines, and several files: each ends its last line.
    (folder / "one.txt").write_text("one")
    code, out, err = predict(source, "one.txt", "-", "--procs", 3, "--format", "json", "eval.batch_size=1",
                             text=b"\xef\xbb\xbftwo")
    assert code == 0, err
    assert [json.loads(row).split(" ", 2)[2] for row in out.splitlines()] == ["one", "two"]
    assert sorted(source.run().rglob("*")) == before, "a prediction leaves nothing behind"


def test_an_empty_input_has_no_rows(source):
    assert predict(source, "--procs", 1) == (0, "", "")
    assert predict(source, "--procs", 1, "-o", "empty.txt") == (0, "", "")
    assert (source.folder / "empty.txt").read_bytes() == b""


def test_the_evaluation_set_is_predicted_with_its_data(source):
    code, _, err = predict(source, "--set", "eval", "--procs", 1)
    assert code == 1 and "words.txt" in err
    shutil.rmtree(source.run() / "evals")  # the log of this failure
    (source.folder / "words.txt").write_text("red green blue")
    try:
        code, out, err = predict(source, "--set", "eval", "--procs", 2)
        _, test, _ = predict(source, "--set", "test", "--procs", 1)
    finally:
        (source.folder / "words.txt").unlink()
    assert code == 0 and [row.split(" ", 2)[2] for row in out.splitlines()] == ["a", "bb", "ccc", "dddd", "eeeee", "f", "gg"], err
    assert [row.split(" ", 2)[2] for row in test.splitlines()] == ["x", "yy"]


@pytest.mark.parametrize("words, text, errors", [
    (["none.txt"], b"", ["error: there is no file `none.txt`", "hint: give files of lines, or key=value"]),
    (["--set", "eval", "lines.txt"], b"", ["error: --set eval predicts the run's own data, and takes no files",
                                           "hint: leave out --set, or the files"]),
    (["-o", "no/file"], b"a", ["error: the folder of `-o no/file` does not exist", "hint: mkdir -p no"]),
    (["-o", "/dev/null"], b"a", ["error: `-o /dev/null` is not a file", "hint: leave out -o to write to standard output"]),
    (["--step", "7"], b"a", ["error: `RUN` has no checkpoint of step 7", "hint: the run has step 2, step 3"]),
    (["train.steps=4"], b"a", ["error: `train.steps` cannot be overridden in an evaluation: nothing is trained", "hint: "]),
    ([], b"a\nb\xff\n", ["error: line 2 of standard input is not valid UTF-8",
                         "hint: convert the text, for example: iconv -f GB18030 -t UTF-8"]),
    (["--slurm"], b"a", ["error: a prediction on SLURM ends after this command, so its rows need a file", "hint: add -o FILE"]),
    (["--slurm", "-o", "x"], b"a", ["error: a prediction on SLURM reads its lines when its job starts, so they must lie in one ",
                                    "hint: launch predict RUN FILE -o ROWS --slurm"]),
    (["--time", "1h"], b"a", ["error: `--time` is for SLURM", "hint: add --slurm, or --cluster NAME"]),
    (["."], b"", ["error: `.`: Is a directory"]),
])
def test_what_the_user_can_fix_starts_no_ranks_and_leaves_nothing(source, words, text, errors):
    code, out, err = predict(source, *words, text=text)
    lines = err.replace(source.run().name, "RUN").splitlines()
    assert (code, out, len(lines)) == (2, "", len(errors)) and all(map(str.startswith, lines, errors)), err
    assert not (source.run() / "evals").exists()


@pytest.fixture
def faulty(source, tmp_path):
    """A function that gives a copy of the run whose task has a fault."""

    def make(fault="none", task="Labels"):
        shutil.copytree(source.folder, tmp_path / "copy")
        command = Command(tmp_path / "copy")
        spec = command.run() / "run.yaml"
        text = spec.read_text().replace("fault: none", f"fault: {fault}").replace("labels:Labels", f"labels:{task}")
        spec.write_text(text.replace(str(source.folder), str(command.folder)))
        return command

    return make


@pytest.mark.parametrize("fault, error", [
    ({"task": "Silent"}, "error: the task `labels:Silent` gives no rows to predict\nhint: your own task can define rows(self, "),
    ({"task": "Deaf"}, "error: the task `labels:Deaf` takes no lines of text\nhint: `launch predict RUN --set eval` predicts"),
    ({"fault": "short"}, "error: the task's `inputs` returns 26 samples for 27 lines\nhint: return one sample for each line"),
])
def test_a_task_that_cannot_predict_is_named(faulty, fault, error):
    command = faulty(**fault)
    code, out, err = predict(command, "lines.txt", "--procs", 1)
    assert (code, out) == (2, "") and error in err and "Traceback" not in err
    assert not (command.run() / "evals").exists()


def test_a_rank_that_fails_leaves_its_log(faulty):
    command = faulty("crash")
    (command.folder / "rows.txt").write_text("old")
    code, out, err = predict(command, "lines.txt", "--procs", 2, "-o", "rows.txt")
    assert (code, out, (command.folder / "rows.txt").read_text()) == (1, "", "old")
    assert err.count("ValueError: a fault of the task") == 2 and "hint: its log is " in err  # the traceback, and the message
    (log,) = command.run().glob("evals/*/attempts/1/logs/1.log")
    assert "a fault of the task" in log.read_text()


def test_a_prediction_that_is_stopped_writes_no_rows(faulty):
    command = faulty("hang")
    process = command.start("predict", command.run(), "lines.txt", "--procs", 1, "run.grace_s=1", "-o", "new.txt")
    wait_until((command.folder / "started").exists, process=process)
    (rank,) = ranks_of(process.pid)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "") and "stopped: no rows were written" in err and "Traceback" not in err
    assert not (command.run() / "evals").exists() and not (command.folder / "new.txt").exists()
    assert not os.path.exists(f"/proc/{rank}")


def test_a_closed_pipe_is_no_error(source):
    folder = source.folder
    (folder / "many.txt").write_text("line\n" * 20000)
    command = f"{sys.executable} -P -m launch predict {source.run()} many.txt --procs 1 eval.batch_size=5000 | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.stdout.endswith(" line\n") and done.stdout.count("\n") == 1
    assert "rror" not in done.stderr and "Broken" not in done.stderr, done.stderr
