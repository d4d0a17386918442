"""Runs whose batches worker processes make: stopped, killed, resumed, and failed."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import TESTS, Command, alive, attempt, logged_steps, ranks_of, record, rows, set_pause, wait_until

sys.path.append(str(TESTS / "pictures"))
PICTURES = TESTS / "pictures" / "pictures.yaml"
STEPS = 50  # 8 epochs of 150 samples, 24 a batch


@pytest.fixture
def source(tmp_path) -> str:
    from pictures import draw_pictures

    draw_pictures(tmp_path / "data")
    return f"data.source={tmp_path / 'data'}"


def values(run: Path) -> tuple[list, list]:
    """Return each step's loss and gradient norm, and each evaluation's loss."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(run)], [row["loss"] for row in rows(run, "eval")]


def workers_of(rank: int) -> list[int]:
    """Return the worker processes of a rank: forked by it, with its command line."""
    command = Path(f"/proc/{rank}/cmdline").read_bytes()
    children = [int(pid) for task in Path(f"/proc/{rank}/task").iterdir() for pid in (task / "children").read_text().split()]
    return [pid for pid in children if Path(f"/proc/{pid}/cmdline").read_bytes() == command]


@pytest.mark.slow
def test_a_run_with_workers_is_the_same_run_killed_stopped_and_with_another_number_of_workers(tmp_path, source):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    done = Command(whole)(PICTURES, source, "--procs", 2, "data.workers=0")
    assert done.returncode == 0, done.stderr
    expected = values(Command(whole).run())
    assert len(expected[0]) == STEPS and len(set(expected[0])) == STEPS

    launch = Command(cut)
    # 1. The rank is killed. Its workers die with it.
    process = launch.start(PICTURES, source, "--procs", 2, "model.pause_s=0.005")
    wait_until(lambda: logged_steps(cut) >= 8, process=process)
    set_pause(launch.run(), 0.05)
    ranks = ranks_of(process.pid)
    workers = [pid for rank in ranks for pid in workers_of(rank)]
    assert len(workers) == 2 * 2 * 2, "each rank has two workers that train and two that evaluate"
    os.kill(ranks[1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 1
    wait_until(lambda: not any(map(alive, workers)), 10)
    run = launch.run()
    # 2. As SLURM does, send the signals of a time limit and of a preemption to every process of the ranks.
    set_pause(run, 0.005)
    already = len(rows(run))
    process = launch.start("resume", run.name, "data.workers=1")
    wait_until(lambda: len(rows(run)) >= already + 6, process=process)
    set_pause(run, 0.05)
    ranks = ranks_of(process.pid)
    workers = [pid for rank in ranks for pid in workers_of(rank)]
    assert len(workers) == 4
    for number in (signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):
        for pid in workers:
            os.kill(pid, number)
    time.sleep(0.2)
    assert all(map(alive, workers))
    for rank in ranks:
        os.killpg(rank, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75 and record(run)["state"] == "preempted", out + err
    assert record(run)["checkpoint"] == record(run)["step"] < STEPS and not any(map(alive, workers))
    # 3. The rest without workers.
    set_pause(run, 0)
    resumed = launch("resume", run.name, "data.workers=0")
    assert resumed.returncode == 0, resumed.stderr
    assert values(run) == expected and record(run)["attempt"] == 3


@pytest.mark.slow
def test_the_order_and_the_noise_of_samples_do_not_depend_on_ranks(tmp_path, source):
    folders = []
    for ranks, workers in ((1, 2), (3, 1)):
        folders.append(tmp_path / f"{ranks}")
        folders[-1].mkdir()
        done = Command(folders[-1])(PICTURES, source, "--procs", ranks, f"data.workers={workers}", "train.steps=10",
                                    "train.precision=fp32", "task=pictures:Exact")
        assert done.returncode == 0, done.stderr
    (one, evaluated), (three, also) = (values(Command(folder).run()) for folder in folders)
    assert max(abs(a[1] - b[1]) for a, b in zip(one, three)) < 1e-5 and abs(evaluated[0] - also[0]) < 1e-5


@pytest.mark.slow
def test_what_a_user_reads_when_a_sample_or_a_worker_fails(launch, source):
    broken = Path(source.removeprefix("data.source=")) / "train" / "left" / "10.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:50])
    failed = launch(PICTURES, source, "--procs", 1)
    assert failed.returncode == 1
    assert re.search(r"error: the training set: row \d+ of Paced: \w+: .*\nhint: the traceback is in the log", failed.stderr)
    log = (launch.run() / "attempts/1/logs/0.log").read_text()
    assert "in __getitem__" in log and "map_style.py" not in log, "the user's traceback alone"

    broken.write_bytes(whole)
    process = launch.start("resume", launch.run().name, "run.max_restarts=1")
    wait_until(lambda: logged_steps(launch.folder) >= 5, process=process)
    set_pause(launch.run(), 0.1)
    (rank,) = ranks_of(process.pid)
    victim = workers_of(rank)[0]
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: (launch.run() / "attempts/3").exists(), 30, process=process)  # another attempt may have more memory
    set_pause(launch.run(), 0)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    failure = attempt(launch.run(), 2)["failure"]
    assert failure["message"] == f"the training set: a worker (process {victim}, one of 2) was ended by SIGKILL"
    assert "memory" in failure["hint"] and len(rows(launch.run())) == STEPS


@pytest.mark.slow
def test_the_example_of_the_readme_works(launch, source):
    text = (TESTS.parent / "README.md").read_text()
    for name, body in re.findall(r"```(?:yaml|python)\n# (photos\.\w+)\n(.*?)```", text, re.DOTALL):
        (launch.folder / name).write_text(body)
    done = launch("photos.yaml", source, "--procs", 1, "train.steps=3")
    assert done.returncode == 0, done.stderr
    assert "finished at step 3/3" in done.stdout
    again = launch("eval", launch.run().name)
    assert again.returncode == 0, again.stderr
    (evaluation,) = (launch.run() / "evals").iterdir()
    assert record(evaluation)["metrics"] == record(launch.run())["metrics"]


@pytest.mark.slow
def test_debug_trains_and_ends_with_workers(launch, source):
    done = launch(PICTURES, source, "--debug")
    assert done.returncode == 0, done.stderr
    assert "finished at step 3/3" in done.stdout
