"""Complete runs of a small task, started as a user starts them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BLOBS, Command, attempt, environment, fill, logged_steps, record, rows, set_pause, small_disk, wait_until

README = Path(__file__).parents[1] / "README.md"


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows(run)]


def runs_with(tmp_path: Path, *variants: list) -> list[list[tuple[int, float]]]:
    """Start one run for each list of arguments, and return the losses of each run."""
    losses_by_run = []
    for number, args in enumerate(variants):
        command = Command(tmp_path / str(number))
        command.folder.mkdir()
        done = command(BLOBS, *args)
        assert done.returncode == 0, done.stderr
        losses_by_run.append(losses(command.run()))
    return losses_by_run


@pytest.mark.slow
def test_accumulation_and_ranks_change_no_loss(tmp_path):
    exact = ["model.exact_over_ranks=true", "train.steps=40"]
    one, accumulated, two = runs_with(
        tmp_path, [*exact, "--procs", 1], [*exact, "--procs", 1, "train.micro_batch_size=4"],
        [*exact, "--procs", 2, "train.micro_batch_size=8"])
    assert [step for step, _ in one] == list(range(1, 41))
    for other in (accumulated, two):
        assert max(abs(a - b) for (_, a), (_, b) in zip(one, other, strict=True)) < 1e-5
    assert one[-1][1] < one[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("precision, tolerance", [("bf16", 2e-2), ("fp16", 2e-2)])
def test_half_precision_follows_fp32(tmp_path, precision, tolerance):
    exact = ["model.exact_over_ranks=true", "train.steps=30", "--procs", 2]
    # No warm-up: fp16 may skip the first steps, and then its learning-rate schedule lags behind.
    exact += ["optim.schedule=constant", "optim.warmup=0"]
    full, half = runs_with(tmp_path, exact, [*exact, f"train.precision={precision}"])
    assert full != half
    assert max(abs(a - b) for (_, a), (_, b) in zip(full, half, strict=True)) < tolerance


@pytest.mark.slow
def test_a_compiled_model_has_the_same_losses(tmp_path):
    exact = ["model.exact_over_ranks=true", "train.steps=20", "--procs", 1]
    eager, compiled = runs_with(tmp_path, exact, [*exact, "train.compile=true"])
    assert max(abs(a - b) for (_, a), (_, b) in zip(eager, compiled, strict=True)) < 1e-4


@pytest.mark.slow
def test_the_torchrun_line_gives_the_same_losses(launch, tmp_path):
    args = [BLOBS, "--procs", 2, "train.steps=30"]
    plan = json.loads(launch(*args, "--dry-run", "--json").stdout)
    assert launch(*args).returncode == 0
    expected = losses(launch.run())
    folder = Path(plan["folder"])
    for path, text in plan["files"].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    assert "torchrun --nproc-per-node 2 -m trainers.run" in plan["equivalent"]
    words = shlex.split(plan["equivalent"])
    words[words.index("torchrun")] = str(Path(sys.executable).with_name("torchrun"))
    done = subprocess.run(words, cwd=plan["cwd"], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert losses(folder) == expected


@pytest.mark.slow
def test_the_accelerate_line_gives_the_same_losses(launch):
    """The accelerate config is that of a GPU run, changed to use the CPU."""
    from launch.cluster.config import load_cluster
    from launch.cluster.resources import Resources
    from launch.plan.plan import make_plan
    from launch.plan.spec import load_spec

    assert launch(BLOBS, "--procs", 1, "train.steps=10").returncode == 0
    spec = load_spec(str(BLOBS), ["train.steps=10"], cluster=load_cluster("local"), environment={})
    plan = make_plan("by-hand", spec, load_cluster("local"), Resources("cuda", 1), runs=launch.folder,
                     python=sys.executable, cwd=launch.folder)
    for path, text in plan.files.items():
        target = Path(plan.folder) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text.replace("use_cpu: false", "use_cpu: true"))
    words = shlex.split(plan.equivalent)
    words[words.index("accelerate")] = str(Path(sys.executable).with_name("accelerate"))
    done = subprocess.run(words, cwd=plan.cwd, env=environment(OMP_NUM_THREADS=str(os.cpu_count())), text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected, got = losses(launch.run()), losses(Path(plan.folder))
    assert max(abs(a - b) for (_, a), (_, b) in zip(expected, got, strict=True)) < 1e-6


@pytest.mark.slow
def test_no_secret_is_written(launch):
    secrets = {"WANDB_API_KEY": "f" * 20 + "0123456789abcdef" + "e" * 4, "HF_TOKEN": "hf_" + "Planted" * 4}
    done = launch(BLOBS, "--procs", 2, "--wandb", "offline", "train.steps=20", **secrets)
    assert done.returncode == 0, done.stderr
    run = launch.run()
    logged = list(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(logged) == 1 and run.name in logged[0].name
    for path in run.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret.encode() in content for secret in secrets.values()), path


@pytest.mark.slow
def test_an_online_run_without_an_api_key_continues_offline(launch):
    done = launch(BLOBS, "--procs", 1, "train.steps=5", WANDB_MODE="online", HOME=str(launch.folder))
    assert done.returncode == 0, done.stderr
    assert "W&B is not online (no API key" in done.stdout
    assert list(launch.run().glob("wandb/offline-run-*"))


FAILING = """
import os, time
from trainers.engine.saving import storage
from blobs import BlobsTask

write = storage.write


def slow_write(*args):
    time.sleep(2)
    return write(*args)


class Failing(BlobsTask):
    def data(self, world):
        self.rank = world.rank
        if self.rank == 0:
            storage.write = slow_write
        return super().data(world)

    def report(self, measured, figures):
        if self.rank == 1 and os.environ["LAUNCH_ATTEMPT"] == "1":
            raise RuntimeError("the report fails")
        return super().report(measured, figures)
"""


@pytest.mark.slow
def test_a_rank_whose_evaluation_fails_waits_for_the_commit_of_the_same_step(launch):
    """Rank 0 still writes when the report of rank 1 fails."""
    (launch.folder / "failing.py").write_text(FAILING)
    (launch.folder / "failing.yaml").write_text(BLOBS.read_text().replace("blobs:BlobsTask", "failing:Failing"))
    done = launch("failing.yaml", "--procs", 2, "train.steps=30", "eval.every=20", "checkpoint.every=20", "run.max_restarts=1",
                  PYTHONPATH=str(BLOBS.parent))
    assert done.returncode == 0, done.stderr
    assert "RuntimeError: the report fails; trying again" in done.stdout and "resuming at step 20 of 30" in done.stdout
    run = launch.run()
    assert [step for step, _ in losses(run)] == list(range(1, 31)) and [row["step"] for row in rows(run, "eval")] == [20, 30]


@pytest.mark.slow
def test_resume_skips_a_broken_checkpoint(launch):
    """Flip a bit of the newest checkpoint. tests/trainers/engine/saving/test_checkpoint.py damages each file in each way."""
    assert launch(BLOBS, "--procs", 1).returncode == 0
    run = launch.run()
    expected = losses(run)
    (run / "run.json").write_text(json.dumps({**record(run), "state": "failed"}))
    newest, before = run / "checkpoints/step_120", run / "checkpoints/step_105"
    assert before.is_dir()
    victim = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    done = launch("resume", run.name)
    assert done.returncode == 0, done.stderr
    assert "step 120" in done.stdout and victim.name in done.stdout and "resuming at step 105 " in done.stdout
    assert losses(run) == expected

    for folder in (run / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
    (run / "run.json").write_text(json.dumps({**record(run), "state": "failed"}))
    done = launch("resume", run.name)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 2
    assert losses(run) == expected


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_does_not_stop_a_run(launch):
    with small_disk(launch.folder / "disk", "1m") as disk:
        process = launch.start(BLOBS, "--runs", disk, "--procs", 2, "train.steps=600", "eval.every=100", "model.pause_s=0.01",
                               "checkpoint.keep_best=0", "checkpoint.keep_last=1")
        whole = wait_until(lambda: list(disk.glob("*/checkpoints/step_15")), process=process)[0]
        filler = fill(disk)
        run = whole.parent.parent
        seen: list[str] = []
        for line in process.stdout:
            seen.append(line)
            if "could not be written" in line:
                break
        kept = sorted(path.name for path in whole.parent.iterdir())
        assert kept and not any(name.endswith(".tmp") for name in kept), kept
        for line in process.stdout:  # training continues while the disk is full
            seen.append(line)
            if line.startswith("eval 400/"):
                break
        filler.unlink()
        set_pause(run, 0)
        out, err = process.communicate(timeout=200)
        output = "".join(seen) + out
        assert process.returncode == 0, output + err
        assert "training continues" in output and "No space left on device" in output
        assert [step for step, _ in losses(run)] == list(range(1, 601))  # the rows were kept in memory while the disk was full
        assert record(run)["checkpoint"] == 600


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_run_that_is_stopped_on_a_full_disk_has_not_failed(launch):
    with small_disk(launch.folder / "disk", "2m") as disk:
        process = launch.start(BLOBS, "--runs", disk, "--procs", 1, "model.pause_s=0.05")
        run = wait_until(lambda: list(disk.glob("*/checkpoints/step_15")), process=process)[0].parents[1]
        filler = fill(disk)
        process.terminate()
        out, err = process.communicate(timeout=120)
        assert process.returncode == 75 and "the run continues from the checkpoint before" in out, out + err
        filler.unlink()
        set_pause(run, 0)
        resumed = launch("resume", run)
        assert resumed.returncode == 0 and "resuming at step" in resumed.stdout, resumed.stderr
        assert [step for step, _ in losses(run)] == list(range(1, 121))


@pytest.mark.slow
def test_the_example_task_of_the_readme_works(launch):
    text = README.read_text()
    for name, body in re.findall(r"```(?:yaml|python)\n# (stripes\.\w+)\n(.*?)```", text, re.DOTALL):
        (launch.folder / name).write_text(body)
    assert len((launch.folder / "stripes.py").read_text().splitlines()) < 60
    for misspelled, key in (("model.hiden=512", "model.hiden"), ("data=other.txt", "data.source")):
        refused = launch("stripes.yaml", misspelled)
        assert refused.returncode == 2 and refused.stderr.startswith(f"error: `{key}` is not a key of this task")
    done = launch("stripes.yaml", "--procs", 2)
    assert done.returncode == 0, done.stderr
    assert record(launch.run())["metrics"]["top1"] > 0.95


@pytest.mark.slow
def test_a_users_files_named_like_our_packages_shadow_nothing(launch):
    for name in ("blobs.py", "blobs.yaml"):
        (launch.folder / name).write_text(BLOBS.with_name(name).read_text())
    (launch.folder / "trainers").mkdir()
    (launch.folder / "trainers/__init__.py").write_text("raise SystemExit('shadowed')")
    (launch.folder / "launch.py").write_text("raise SystemExit('shadowed')")
    done = launch("blobs.yaml", "--procs", 2, "train.steps=4")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_loss_that_is_not_finite_fails_the_run_without_a_retry(launch):
    done = launch(BLOBS, "--procs", 1, "optim.lr=1e30", "optim.clip_norm=null", "optim.warmup=0",
                  "optim.momentum=0", "run.max_restarts=2")
    assert done.returncode == 1
    assert re.match(r"error: update `model`, step \d+: the gradient of `[\w.]+` is not finite \(the last loss is (nan|inf)\)\n"
                    r"hint: lower optim.lr", done.stderr)
    assert record(launch.run())["attempt"] == 1  # a retry would fail in the same way


def test_debug_trains_three_steps(launch):
    process = launch.start(BLOBS, "--debug", "checkpoint.every=never")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert logged_steps(launch.folder) == 4 and "finished at step 3/3" in out  # 3 steps, 1 evaluation


@pytest.mark.slow
def test_a_checkpoint_metric_that_the_evaluation_does_not_give_is_reported_once(launch):
    done = launch(BLOBS, "--procs", 1, "train.steps=60", "checkpoint.metric=acc")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("`checkpoint.metric` is `acc`, but the evaluation reports only loss, top1") == 1


@pytest.mark.slow
def test_environment_variables_of_accelerate_change_no_loss(tmp_path):
    args = [BLOBS, "train.steps=5", "--procs", 1]
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    plain, odd = Command(tmp_path / "a"), Command(tmp_path / "b")
    assert plain(*args).returncode == 0
    assert odd(*args, ACCELERATE_MIXED_PRECISION="bf16", ACCELERATE_USE_FSDP="true").returncode == 0
    assert losses(plain.run()) == losses(odd.run())


@pytest.mark.slow
def test_a_moved_run_resumes_but_not_with_changed_data(launch):
    assert launch(BLOBS, "--procs", 1, "train.steps=20").returncode == 0
    run = launch.run()
    expected = losses(run)
    elsewhere = launch.folder / "else where"
    elsewhere.mkdir()
    moved = run.rename(elsewhere / run.name)
    for path in (moved / "checkpoints").glob("step_20"):
        (path / "manifest.json").unlink()
    (moved / "run.json").write_text(json.dumps({**record(moved), "state": "failed"}))
    done = launch("resume", run.name, "--runs", "else where")
    assert done.returncode == 0, done.stderr
    assert "resuming at step 15 " in done.stdout and losses(moved) == expected

    spec = moved / "run.yaml"
    (launch.folder / "blobs.py").write_text(BLOBS.with_name("blobs.py").read_text().replace("Blobs(300,", "Blobs(301,"))
    spec.write_text(re.sub("path: .*", f"path: {launch.folder}", spec.read_text()))
    (moved / "run.json").write_text(json.dumps({**record(moved), "state": "failed"}))
    done = launch("resume", moved)
    assert done.returncode == 2 and "it had 300 training and 101 evaluation samples, now it has 301 and 101" in done.stderr


@pytest.mark.slow
def test_debug_shows_the_traceback_of_a_users_mistake(launch):
    (launch.folder / "blobs.py").write_text(BLOBS.with_name("blobs.py").read_text().replace("images, labels = batch", "1 / 0"))
    (launch.folder / "blobs.yaml").write_text(BLOBS.read_text())
    done = launch("blobs.yaml", "--debug")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "in loss" in done.stderr


@pytest.mark.slow
def test_a_grace_that_is_too_short_for_a_checkpoint_gives_a_warning(launch):
    done = launch(BLOBS, "--procs", 1, "train.steps=20", "run.grace_s=0.001")
    assert done.returncode == 0
    assert re.search(r"warning: a checkpoint took \d\.\d s, but ranks that must stop have only 0.001 s \(run.grace_s\)",
                     done.stdout)
    assert attempt(launch.run(), 1)["checkpoint_s"] > 0.001
    assert "warning: a checkpoint took" not in launch(BLOBS, "--procs", 1, "train.steps=20").stdout


@pytest.mark.slow
def test_a_run_that_stops_early_is_finished_and_can_go_on(launch):
    """The learning rate is so small that no evaluation is better than the first one."""
    words = ["model.exact_over_ranks=true", "train.steps=20", "optim.lr=1e-20", "eval.every=2", "train.patience=2"]
    done = launch(BLOBS, *words, "--procs", 2)
    assert done.returncode == 0, done.stderr
    run = launch.run()
    reason = "top1 has not become better in 2 evaluations"
    assert f"finished at step 6/20, stopped early: {reason}" in done.stdout
    assert record(run)["state"] == "finished" and record(run)["stopped_early"].startswith(reason)
    assert "finished early  6/20" in launch("runs").stdout
    assert f"finished (stopped early: {reason}" in launch("status", run.name).stdout
    told = launch("explain", run.name).stdout
    assert f"it stopped early, because {reason}" in told and f"launch resume {run.name} train.patience=4" in told
    again = launch("resume", run.name)
    assert again.returncode == 0 and "stopped early at step 6 of 20" in again.stdout and "train.patience=N" in again.stdout
    more = launch("resume", run.name, "train.patience=3")
    assert more.returncode == 0 and "finished at step 8/20, stopped early" in more.stdout, more.stderr
    assert [row["step"] for row in rows(run, "eval")] == [2, 4, 6, 8]
