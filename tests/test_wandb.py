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


DRAWS = '''
import torch
from blobs import BlobsTask
from PIL import Image

class Draws(BlobsTask):
    def draw(self, models, folder, step):
        values = models["model"](torch.randn(16, 3, 6, 6)).softmax(1)  # under fsdp, ranks need each other
        if folder is not None:
            Image.fromarray((255 * values.numpy()).astype("uint8")).save(folder / "values.png")
'''


@pytest.mark.slow
def test_pictures_of_evaluations_change_no_loss_and_are_logged_with_their_step(launch):
    folder = launch.folder
    (folder / "draws.py").write_text(DRAWS)
    (folder / "draws.yaml").write_text(BLOBS.read_text().replace("blobs:BlobsTask", "draws:Draws"))
    args = ["--procs", 2, "--strategy", "fsdp", "train.steps=24", "eval.every=8", "checkpoint.every=4", "optim.warmup=0"]
    done = launch(BLOBS, *args, "--runs", "plain")
    assert done.returncode == 0, done.stderr
    process = launch.start("draws.yaml", *args, "--wandb", "offline", "model.pause_s=0.2", PYTHONPATH=str(BLOBS.parent))
    wait_until(lambda: logged_steps(folder) >= 11, process=process)
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    process.communicate(timeout=100)
    run = launch.run()
    done = launch("resume", run.name, PYTHONPATH=str(BLOBS.parent))
    assert done.returncode == 0 and f"figure  runs/{run.name}/figures/step_24/values.png" in done.stdout, done.stderr
    (plain,) = (folder / "plain").iterdir()
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(plain)]
    pictures = sorted(path.relative_to(run / "figures").as_posix() for path in (run / "figures").rglob("*"))
    assert pictures == sorted([f"step_{step}{name}" for step in (8, 16, 24) for name in ("", "/values.png")])
    assert not (plain / "figures").exists() or not any((plain / "figures").glob("step_*"))
    logged = [history(path) for path in sorted(run.glob("wandb/offline-run-*/*.wandb"))]
    images = {step: name for values in logged for step, value in values.items() for name in value if "figures/values" in name}
    assert set(images) == {8, 16, 24} and len(list(run.glob("wandb/*/files/media/images/figures/*.png"))) >= 3
    # An evaluation of a checkpoint draws too.
    assert launch("eval", run.name, PYTHONPATH=str(BLOBS.parent)).returncode == 0
    (picture,) = run.glob("evals/*/figures/step_24/values.png")
    assert picture.read_bytes() == (run / "figures/step_24/values.png").read_bytes()
