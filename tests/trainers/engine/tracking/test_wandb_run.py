"""What an attempt logs to W&B that continues another attempt. tests/test_wandb.py does the same with whole runs."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import wait_until

from trainers.config.schema import RunConfig
from trainers.contract.paths import RunPaths
from trainers.engine.tracking import wandb_run
from trainers.engine.tracking.wandb_run import WandbRun, offline_records

CONFIG = RunConfig.model_validate({"name": "toy", "task": "toy:Toy", "train": {"steps": 6}, "wandb": {"mode": "offline"}})


def train(*steps: int) -> list[dict]:
    return [{"step": step, "split": "train", "loss": step / 10} for step in steps]


def evaluation(step: int, loss: float) -> dict:
    return {"step": step, "split": "eval", "loss": loss}


def attempt(paths: RunPaths, kept: list[dict], rows: list[dict]) -> None:
    """Log one attempt's rows; `kept` are the rows of earlier attempts that are still in metrics.jsonl."""
    notes: list[str] = []
    run = WandbRun(CONFIG, paths, kept, lambda level, message: notes.append(message))
    for row in rows:
        run.log(row)
    run.finish(rows[-1]["step"], paths.figures, finished=True)
    assert notes == []
    (file,) = paths.root.glob("wandb/latest-run/*.wandb")
    # W&B's own process writes the file; in a run, it ends with the rank.
    wait_until(lambda: any(record.WhichOneof("record_type") == "exit" for record in offline_records(file)), 20)


def history(root: Path) -> list[dict]:
    """Return the values of each step in the order in which W&B has them."""
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for path in sorted(root.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
            for record in offline_records(path) if record.WhichOneof("record_type") == "history"]


@pytest.mark.parametrize("first, kept, then", [
    # Stopped after the evaluation of step 2, before it was recorded: the evaluation is repeated.
    ([*train(1, 2), evaluation(2, 0.5)], train(1, 2), [evaluation(2, 0.5), *train(3), *train(4), evaluation(4, 0.25)]),
    # Stopped during the evaluation of step 2, with the last checkpoint at step 1.
    (train(1, 2), train(1), [*train(2), evaluation(2, 0.5), *train(3, 4), evaluation(4, 0.25)]),
    # Two evaluations are repeated.
    ([*train(1, 2), evaluation(2, 0.5), *train(3, 4), evaluation(4, 0.25)], train(1),
     [*train(2), evaluation(2, 0.5), *train(3, 4), evaluation(4, 0.25), *train(5)]),
])
def test_each_step_and_each_evaluation_is_logged_once(tmp_path, first, kept, then):
    paths = RunPaths(tmp_path / "toy-1")
    paths.root.mkdir()
    attempt(paths, [], first)
    time.sleep(1.1)  # W&B names the files of a run by the second
    attempt(paths, kept, then)
    found = history(paths.root)
    steps = [row["_step"] for row in found]
    assert steps == sorted(set(steps)) and steps[:4] == [1, 2, 3, 4]
    assert [row["train/loss"] for row in found] == [step / 10 for step in steps]
    assert [row["eval/loss"] for row in found if "eval/loss" in row] == [0.5, 0.25]


UPLOAD = "`wandb sync /runs/toy-1/wandb/run-1` uploads the rest"


@pytest.mark.parametrize("finished, signalled, limit_s, words", [
    (True, False, 0.6, UPLOAD), (False, False, 0.2, "the next attempt logs the rest"), (True, True, 0.2, UPLOAD)])
def test_a_server_that_does_not_answer_holds_up_the_end_for_a_limited_time(monkeypatch, finished, signalled, limit_s, words):
    monkeypatch.setattr(wandb_run, "FINISH_WITHIN_S", 0.6)
    monkeypatch.setattr(wandb_run, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(wandb_run, "stop_requested", lambda: signalled)
    answered, notes = threading.Event(), []
    run = object.__new__(WandbRun)
    run._run = SimpleNamespace(finish=lambda exit_code: answered.wait(30), mark_preempting=lambda: None,
                               dir="/runs/toy-1/wandb/run-1/files")
    run._broken, run._late, run._stop_within_s = False, {}, 0.2
    run._note = lambda level, message: notes.append(message)
    began = time.monotonic()
    run.finish(6, Path("/none"), finished)
    took_s = time.monotonic() - began
    answered.set()
    assert limit_s <= took_s < limit_s + 0.3
    assert [note.partition("; ")[2] for note in notes] == [words] and "W&B could not take all data in" in notes[0]
