"""What a run logs to Weights & Biases, read from the files of W&B's offline mode."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from conftest import BLOBS, logged_steps, ranks_of, rows, wait_until

from trainers.engine.tracking.wandb_run import offline_records


def history(path: Path) -> dict[int, dict]:
    """Return the values that were logged at each step."""
    return {record.history.step.num: {item.key or "/".join(item.nested_key): json.loads(item.value_json)
                                      for item in record.history.item}
            for record in offline_records(path) if record.WhichOneof("record_type") == "history"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_all_attempts_are_one_wandb_run_and_each_step_is_logged_once(launch, number):
    process = launch.start(BLOBS, "--procs", 2, "--wandb", "offline", "wandb.project=a project", "model.pause_s=0.03")
    wait_until(lambda: logged_steps(launch.folder) >= 40, process=process)
    os.kill(ranks_of(process.pid)[0] if number == signal.SIGKILL else process.pid, number)
    process.communicate(timeout=100)
    run = launch.run()
    assert launch("resume", run.name).returncode == 0
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    for path in files:
        opened = [record.run for record in offline_records(path) if record.WhichOneof("record_type") == "run"]
        if opened or number == signal.SIGTERM:  # W&B may have written nothing yet when it was killed
            assert (opened[0].run_id, opened[0].project) == (run.name, "a project")
            assert "batch_size" in {item.key: item.value_json for item in opened[0].config.update}["train"]
    before, after = map(history, files)
    assert [*before, *after] == list(range(1, 121))
    losses = {row["step"]: row["loss"] for row in rows(run)}
    assert {step: values["train/loss"] for step, values in {**before, **after}.items()} == losses
    evaluated = {step: values["eval/top1"] for step, values in {**before, **after}.items() if "eval/top1" in values}
    assert evaluated == {row["step"]: row["top1"] for row in rows(run, "eval")}
