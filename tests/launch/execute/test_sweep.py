"""Sweeps: their plans and refusals, and sweeps on this machine, one run after another."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from conftest import BLOBS, Command, attempt, record, wait_until

from launch.cluster.config import ClusterConfig
from launch.cluster.resources import Resources
from launch.execute.sweep_plan import load_specs, make_sweep
from launch.plan.grid import Point, grid
from launch.plan.job_script import Request
from launch.plan.spec import load_spec
from launch.records import read as runs
from launch.records.cancel import cancel, cancel_sweep
from launch.records.seeds import means
from trainers.config import yaml12
from trainers.contract.errors import UserError

LOCAL = ClusterConfig(name="local")
HERE = ClusterConfig(name="here", kind="slurm", device="cpu")


def blobs(words):
    return load_spec(BLOBS, words, cluster=LOCAL, environment={})


def test_an_error_names_the_point():
    with pytest.raises(UserError, match="^error: at optim.lr=zero: .*`optim.lr` is `zero`"):
        load_specs(grid(["optim.lr=0.1,zero"]), blobs)


def test_two_points_must_not_be_the_same_run():
    with pytest.raises(UserError, match="the same run: optim.lr=0.1 and optim.lr=1e-1"):
        load_specs(grid(["optim.lr=0.1,0.2,1e-1"]), blobs)


def plan_sweep(points: list[Point], cluster: ClusterConfig, ranks: int = 1, parallel: int | None = None):
    specs = load_specs(points, blobs)
    sweep_points = [{"run": f"s-{place}", "overrides": list(point.overrides)} for place, point in enumerate(points)]
    return make_sweep("s", sweep_points, dict(enumerate(specs)), Request(cluster), Resources("cpu", ranks), root=Path("/runs"),
                      cwd=Path("/home"), copy=None, parallel=parallel)


def test_the_batch_must_divide_at_each_point():
    with pytest.raises(UserError, match="^error: at train.batch_size=30: .*not a multiple of 4 ranks"):
        plan_sweep(grid(["train.batch_size=32,30"]), HERE, ranks=4)


def test_settings_that_an_array_cannot_have_are_refused():
    with pytest.raises(UserError, match="`run.\\*` differs"):
        plan_sweep(grid(["run.grace_s=10,20"]), HERE)
    assert len(plan_sweep(grid(["run.grace_s=10,20"]), LOCAL).plans) == 2
    with pytest.raises(UserError, match="--max-parallel is for arrays"):
        plan_sweep(grid(["train.seed=1,2"]), LOCAL, parallel=2)


def test_where_jobs_cannot_be_requeued_each_run_has_its_own_chain():
    cluster = HERE.model_copy(update={"requeue": False, "chain": 3})
    sweep = plan_sweep(grid(["train.seed=1,2"]), cluster)
    assert sweep.array is None
    assert [(job.folder, job.links, job.elements) for job in sweep.jobs] == [
        ("/runs/s-0/submissions/1", 3, None), ("/runs/s-1/submissions/1", 3, None)]
    with pytest.raises(UserError, match="--max-parallel is for arrays") as raised:
        plan_sweep(grid(["train.seed=1,2"]), cluster, parallel=2)
    assert "forbids requeueing" in raised.value.hint


def test_an_array_of_some_of_the_points():
    points = grid(["train.seed=" + ",".join(map(str, range(8)))])
    specs = load_specs(points, blobs)
    sweep_points = [{"run": f"s-{place}", "overrides": list(point.overrides)} for place, point in enumerate(points)]
    sweep = make_sweep("s", sweep_points, {place: specs[place] for place in (0, 1, 2, 5, 7)}, Request(HERE), Resources("cpu", 1),
                       root=Path("/runs"), cwd=Path("/home"), copy=None, number=2, parallel=3)
    assert "\n#SBATCH --array=0-2,5,7%3\n" in sweep.array.script
    assert "/runs/s/submissions/2/%A_%a_%t_log.out" in sweep.array.script
    assert [plan.run_id for plan in sweep.plans] == ["s-0", "s-1", "s-2", "s-5", "s-7"]
    assert sweep.submission.runs == [f"/runs/s-{place}" for place in range(8)]  # an element has the index of its point


# One run after another


WORK = """
import os, signal, sys, time
word, again = sys.argv[1], os.environ["LAUNCH_ATTEMPT"] != "1"
print("this is", word, flush=True)
if word == "wait" and not again:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("up", flush=True)
    time.sleep(600)
sys.exit(3 if word == "fail" and not again else 0)
"""


@pytest.fixture
def script(launch: Command) -> Command:
    (launch.folder / "work.py").write_text(WORK)
    return launch


def sweep_of(launch: Command) -> Path:
    (file,) = launch.folder.glob("runs/*/sweep.json")
    return file.parent


def states(launch: Command) -> list[str]:
    points = json.loads((sweep_of(launch) / "sweep.json").read_text())["points"]
    return [record(launch.folder / "runs" / point["run"])["state"] for point in points]


def words_printed(text: str) -> list[str]:
    return [line.removeprefix("this is ") for line in text.splitlines() if line.startswith("this is ")]


def waits(launch: Command) -> bool:
    return any("up" in log.read_text() for log in launch.folder.glob("runs/*/attempts/1/logs/0.log"))


def test_the_sweep_continues_after_a_run_that_failed(script):
    done = script("sweep", "work.py", "args=[one],[fail],[three]", "--procs", 1)
    assert done.returncode == 1
    assert words_printed(done.stdout) == ["one", "fail", "three"]
    assert "rank 0 ended with exit code 3" in done.stderr and "2 finished, 1 failed" in done.stdout
    sweep = json.loads((sweep_of(script) / "sweep.json").read_text())
    assert [point["overrides"] for point in sweep["points"]] == [["args=[one]"], ["args=[fail]"], ["args=[three]"]]
    assert [point["run"] for point in sweep["points"]] == [f"{sweep['id']}-{place}" for place in range(3)]
    assert sweep["task"] == "work" and sweep["job"]["kind"] == "local"
    rows = runs.list_runs(script.folder / "runs", sweep=sweep["id"])
    assert [row["state"] for row in rows] == ["finished", "failed", "finished"]
    assert all(row["sweep"] == sweep["id"] for row in rows)

    again = script("sweep", "--resume", sweep["id"])
    assert again.returncode == 0, again.stderr
    assert words_printed(again.stdout) == ["fail"]
    assert states(script) == ["finished"] * 3 and record(script.folder / "runs" / f"{sweep['id']}-1")["attempt"] == 2
    assert "nothing to resume" in script("sweep", "--resume", sweep["id"]).stdout


def test_ctrl_c_stops_the_run_and_the_sweep(script):
    process = script.start("sweep", "work.py", "args=[one],[wait],[three]", "--procs", 1)
    wait_until(lambda: waits(script), process=process)
    assert states(script) == ["finished", "running", "submitted"]
    second = script("sweep", "--resume", sweep_of(script).name)
    assert second.returncode == 0 and "2 runs running or waiting, left alone" in second.stdout
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and words_printed(out) == ["one", "wait"] and "launch sweep --resume" in out
    assert states(script) == ["finished", "preempted", "preempted"]
    assert attempt(script.folder / "runs" / f"{sweep_of(script).name}-1", 1)["outcome"] == "preempted"

    again = script("sweep", "--resume", sweep_of(script).name)
    assert again.returncode == 0, again.stderr
    assert states(script) == ["finished"] * 3 and words_printed(again.stdout) == ["wait", "three"]


def test_a_sweep_that_was_killed_can_be_resumed(script):
    process = script.start("sweep", "work.py", "args=[wait],[two]", "--procs", 1)
    wait_until(lambda: waits(script), process=process)
    process.kill()
    process.communicate(timeout=60)
    rows = runs.list_runs(script.folder / "runs", sweep=sweep_of(script).name)
    assert [row["state"] for row in rows] == ["lost", "lost"]
    assert script("sweep", "--resume", sweep_of(script).name).returncode == 0
    assert states(script) == ["finished", "finished"]


def test_runs_whose_folders_were_deleted_are_skipped(script):
    assert script("sweep", "work.py", "args=[one],[fail],[three]", "--procs", 1).returncode == 1
    folder = sweep_of(script)
    shutil.rmtree(folder.parent / f"{folder.name}-0")
    again = script("sweep", "--resume", folder.name)
    assert again.returncode == 0 and words_printed(again.stdout) == ["fail"], again.stderr
    assert "1 unreadable, 2 finished" in again.stdout


def test_the_sweep_continues_after_a_run_that_was_cancelled(script):
    process = script.start("sweep", "work.py", "args=[wait],[two],[three]", "--procs", 1)
    wait_until(lambda: waits(script), process=process)
    root, name = script.folder / "runs", sweep_of(script).name
    assert cancel(runs.find_run(root, f"{name}-1")) == "cancelled"  # it has not started yet
    assert cancel(runs.find_run(root, f"{name}-0")) == "cancelled"
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and words_printed(out) == ["wait", "three"]
    assert states(script) == ["cancelled", "cancelled", "finished"]


def test_a_cancelled_sweep_ends(script):
    process = script.start("sweep", "work.py", "args=[one],[wait],[three],[four]", "--procs", 1)
    wait_until(lambda: waits(script), process=process)
    cancel_sweep(script.folder / "runs", sweep_of(script).name)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert states(script) == ["finished", "cancelled", "cancelled", "cancelled"]
    assert script("sweep", "--resume", sweep_of(script).name).returncode == 0
    assert states(script) == ["finished"] * 4


def test_json_is_one_object_a_line(script):
    done = script("sweep", "work.py", "args=[one],[two]", "--procs", 1, "--json")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"event": "text", "line": "this is two"} in events and "2 finished" in events[-1]["message"]


def test_the_dry_run_writes_nothing_and_is_what_runs(script):
    words = ("sweep", "work.py", "args=[one],['a b']", "run.grace_s=5", "--procs", 1)
    dry = script(*words, "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    assert list(script.folder.iterdir()) == [script.folder / "work.py"]
    dry_run = json.loads(dry.stdout)
    assert script(*words).returncode == 0
    folder = sweep_of(script)
    for file, text in dry_run["files"].items():
        assert (folder / file).read_text() == text.replace(dry_run["id"], folder.name)
    for plan in dry_run["plans"]:
        run = folder.parent / plan["run_id"].replace(dry_run["id"], folder.name)
        assert {file: (run / file).read_text() for file in plan["files"]} == plan["files"]
    shown = script(*words, "--dry-run").stdout
    assert "\n-args: [one]\n+args: [a b]\n" in shown and shown.count("# file run.yaml") == 1


SEEDED = """
from blobs import BlobsTask
from trainers.errors import UserError

class Seeded(BlobsTask):
    def data(self, world):
        if self.config.train.seed == 5:
            raise UserError("seed 5 is unlucky")
        return super().data(world)
"""


@pytest.mark.slow
def test_seeds_make_a_sweep_with_means_at_the_end(launch):
    (launch.folder / "blobs.py").write_text((BLOBS.parent / "blobs.py").read_text())
    (launch.folder / "seeded.py").write_text(SEEDED)
    (launch.folder / "seeded.yaml").write_text("task: seeded:Seeded\nmodel: {}\ndata: {}\ntrain: {steps: 4}\n")
    words = ("seeded.yaml", "--seeds", "3,5,4", "--procs", 1)
    dry = launch(*words, "--dry-run")
    assert dry.returncode == 0 and "-seed4  train.seed=4" in dry.stdout, dry.stderr
    done = launch(*words)
    assert done.returncode == 1 and "seed 5 is unlucky" in done.stderr
    folder = sweep_of(launch)
    runs_of = [launch.folder / "runs" / f"{folder.name}-seed{seed}" for seed in (3, 4)]
    losses = [record(run)["metrics"]["loss"] for run in runs_of]
    mean = sum(losses) / 2
    [point] = means(folder.parent, folder.name, runs.list_runs(folder.parent, folder.name))
    assert losses[0] != losses[1] and point["metrics"]["loss"] == {
        "mean": pytest.approx(mean), "deviation": pytest.approx(abs(losses[0] - losses[1]) / 2**0.5), "n": 2}
    told = done.stdout.splitlines()[-1]
    assert told.startswith("2 of 3 runs  loss ") and told == launch("runs", "--sweep", folder.name).stdout.splitlines()[-1]


def test_a_search_has_seeds_too(launch):
    dry = launch("sweep", "wine", "data=sample", "search.cv=3,5", "--seeds", 2, "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    specs = [yaml12.read(plan["files"]["run.yaml"], "run.yaml").value for plan in json.loads(dry.stdout)["plans"]]
    assert [(spec["search"]["cv"], spec["search"]["seed"], spec["model"]["params"]["random_state"]) for spec in specs] == [
        (3, 0, 0), (3, 1, 1), (5, 0, 0), (5, 1, 1)]


@pytest.mark.parametrize("words, message", [
    (["args=[a],[b]", "--max-parallel", "2"], "--max-parallel is for arrays on SLURM"),
    (["args=[a],[b]", "--nodes", "2"], "`--nodes` is for SLURM"),
    (["args=[a]"], "no key has several values"),
    (["args=[a],[b]", "--gpus", "1"], "this machine has 0"),
])
def test_refusals_write_nothing(script, words, message):
    done = script("sweep", "work.py", *words, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) <= 2
    assert list(script.folder.iterdir()) == [script.folder / "work.py"]


def test_an_unknown_sweep_is_an_error(script):
    done = script("sweep", "--resume", "nope")
    assert done.returncode == 2 and "there is no sweep `nope`" in done.stderr
    assert script("sweep").returncode == 2
