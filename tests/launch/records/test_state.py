"""What readers know between two answers of SLURM, and after SLURM has forgotten a job. The output of SLURM's commands is made up
here."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from made import make_checkpoint, make_run

from launch.cluster import reasons, slurm
from launch.records import read as runs
from launch.records.life_sign import LifeSign
from launch.records.run import read_run
from launch.records.state import state_of, true_states
from launch.report.explain import explain
from trainers.contract.clock import utc_now
from trainers.contract.errors import UserError
from trainers.contract.files import read_json, replace_json, update_json
from trainers.contract.paths import RunPaths

JOB = {"kind": "slurm", "cluster": "c", "ids": ["7"], "submission": 1}
ATTEMPT = {"attempt": 1, "outcome": "running", "job": "7", "restart": 0, "submission": 1, "nodes": ["n1", "n2"], "ranks": 2,
           "device": "cpu", "failure": None, "reason": None, "began": "2026-01-02T00:01:00+00:00", "ended": None}
STOPPED = {"outcome": "preempted", "ended": "2026-01-02T00:05:00+00:00"}
QUEUED = slurm.Queued("7", "RUNNING", "None", "2026-01-02T00:00:50+00:00", 1, 2, "n[1-2]", "main", None, None)
ENDED = slurm.Ended("7", "CANCELLED", None, None, "None", "n1", "2026-01-02T00:06:00+00:00")


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A function that makes a run with one attempt on SLURM, and says what SLURM answers from then on."""
    def make(state, attempt=None, queued=None, ended=None, checkpoint=None):
        paths = make_run(tmp_path / "runs/r-1", state=state, job=JOB, checkpoint=checkpoint, updated=utc_now())
        if attempt is not None:
            paths.attempt(1).mkdir(parents=True)
            replace_json(paths.attempt_record(1), {**ATTEMPT, **attempt})
        answer(queued, ended)
        return paths

    def answer(queued=None, ended=None):
        in_queue = {"7": replace(QUEUED, **queued)} if queued is not None else {}
        gone = {"7": replace(ENDED, **ended)} if ended is not None else {}
        monkeypatch.setattr(slurm, "queue", lambda ids: in_queue)
        monkeypatch.setattr(slurm, "look", lambda ids, ended=True: (in_queue, gone))
        monkeypatch.setattr(slurm, "accounted", lambda ids: {})

    make.answer = answer
    return make


def note(paths) -> str | None:
    return true_states([read_run(paths.root)])[0][1].note


def sentence(paths) -> str:
    return explain(read_run(paths.root))["sentence"]


def test_slurms_verdict_counts_after_slurm_has_forgotten_the_job(make):
    paths = make("submitted", ended={})
    assert state_of(read_run(paths.root)) == "cancelled" and read_json(paths.slurm)["7"]["state"] == "CANCELLED"
    make.answer()
    assert state_of(read_run(paths.root)) == "cancelled" and "job 7 ended as CANCELLED on n1" in note(paths)
    assert runs.list_runs(paths.root.parent)[0]["state"] == "cancelled"
    make.answer(queued={"state": "PENDING"})
    assert state_of(read_run(paths.root)) == "submitted", "somebody has requeued the job"
    make.answer()
    paths.attempt(1).mkdir(parents=True)
    replace_json(paths.attempt_record(1), {**ATTEMPT, "began": "2026-01-02T09:00:00+00:00"})
    update_json(paths.record, state="running")
    assert state_of(read_run(paths.root)) == "lost", "the verdict is older than the attempt"


def test_a_verdict_that_cannot_be_written_or_read_is_no_error(make):
    paths = make("submitted", ended={})
    paths.slurm.mkdir()
    assert state_of(read_run(paths.root)) == "cancelled"
    paths.slurm.rmdir()
    paths.slurm.write_text('{"7": {"of another version": 1}}')
    make.answer()
    assert state_of(read_run(paths.root)) == "lost"


def test_a_verdict_on_another_clusters_job_of_the_same_number_is_not_this_runs(make):
    paths = make("running", {}, ended={"script": "/home/other/runs/x-1/submissions/1/job.sh"})
    assert state_of(read_run(paths.root)) == "running" and "job 7 here is not this run's" in note(paths)
    assert not paths.slurm.exists()
    make.answer(ended={"script": f"{paths.root}/submissions/1/job.sh"})
    assert state_of(read_run(paths.root)) == "cancelled"


def test_a_verdict_with_a_key_of_another_version_still_counts(make):
    paths = make("submitted", ended={})
    assert state_of(read_run(paths.root)) == "cancelled"
    replace_json(paths.slurm, {"7": {**read_json(paths.slurm)["7"], "of another version": 1}})
    make.answer()
    assert state_of(read_run(paths.root)) == "cancelled"


NOTE = "; waited 2:00 until the run directory could be written (No space left on device)"


@pytest.mark.parametrize("reason", [reasons.CANCELLED, reasons.CANCELLED + NOTE])
def test_a_job_that_was_cancelled_by_hand_stays_cancelled_although_nobody_looked(make, reason):
    paths = make("preempted", {**STOPPED, "reason": reason})
    assert state_of(read_run(paths.root)) == "cancelled"


@pytest.mark.parametrize("reason, flag, text", [
    ("time limit", "requeue-7-0", "job 7 is being requeued"),
    (reasons.REQUEUED, None, "job 7 is being requeued"),
    (reasons.CANCELLED, None, "SLURM is ending job 7"),
    (reasons.REQUEUED + NOTE, None, "job 7 is being requeued"),
    (reasons.CANCELLED + NOTE, None, "SLURM is ending job 7"),
    ("preempted: another job took its nodes", None, "job 7 is ending; whether SLURM starts it again is not known yet"),
])
@pytest.mark.parametrize("job_state", ["RUNNING", "COMPLETING"])
def test_from_an_attempts_end_until_its_job_waits_again(make, reason, flag, text, job_state):
    paths = make("preempted", {**STOPPED, "reason": reason}, queued={"state": job_state})
    paths.submission(1).mkdir(parents=True)
    if flag:
        (paths.submission(1) / flag).touch()
    status = runs.status(read_run(paths.root))
    assert (status["state"], status["note"]) == ("preempted", text)
    assert sentence(paths) == f"stopped in attempt 1 ({reason}); {text}"


@pytest.mark.parametrize("left, text", [
    ("again-7-0-137", "the node process on n1 was killed"),
    ("again-7-0-76", "it stopped at the time limit, but its record could not be written"),
    ("again-7-1-137", "its processes are gone, and the reason is not known"),
])
def test_what_the_batch_shell_left_explains_an_attempt_without_an_end(make, left, text):
    paths = make("running", {})
    paths.submission(1).mkdir(parents=True)
    (paths.submission(1) / left).touch()
    assert text in sentence(paths)


def test_a_job_that_has_started_again_has_its_next_attempt_started(make):
    """At first the records are those of the last attempt, whatever they say."""
    again = {"start": "2026-01-02T00:07:00+00:00"}
    paths = make("preempted", STOPPED, queued=again)
    assert state_of(read_run(paths.root)) == "running"
    assert sentence(paths).startswith("attempt 2 is being started on n1, n2, since 2026-01-0")
    update_json(paths.record, state="running")
    update_json(paths.attempt_record(1), outcome="running", ended=None)
    assert sentence(paths).startswith("attempt 2 is being started") and runs.status(read_run(paths.root))["attempts"][0][
        "outcome"] == "lost"
    paths.attempt(2).mkdir()  # taken; its record is still to come
    assert sentence(paths).startswith("attempt 2 is being started")


@pytest.mark.parametrize("job_state, text", [
    ("SUSPENDED", "SLURM has suspended job 7: its ranks stand still until SLURM continues it"),
    ("COMPLETING", "job 7 is ending, and how its attempt ended is not recorded yet"),
])
def test_a_job_that_does_not_run_on_is_not_called_right(make, job_state, text):
    paths = make("running", {}, queued={"state": job_state})
    assert note(paths) == text and runs.list_runs(paths.root.parent)[0]["note"] == text
    assert sentence(paths).endswith(f"; {text}")


def test_a_late_sign_of_life_and_a_problem_of_a_rank_are_told(make):
    paths = make("running", {}, queued={})
    for node in (0, 1):
        LifeSign(paths.life_sign(1, node)).turn(None)
    assert sentence(paths).endswith("nothing is wrong")
    problem = "the checkpoint of step 20 could not be written: 没有空间"
    LifeSign(paths.life_sign(1, 1)).turn(problem)
    assert sentence(paths).endswith(f"; {problem}") and runs.status(read_run(paths.root))["note"] == problem
    sign = paths.life_sign(1, 1)
    sign.write_text(json.dumps({"at": "2026-01-02T00:04:00+00:00", "problem": None}).ljust(4096))
    assert "; the process on n2 gave its last sign of life " in sentence(paths)
    sign.write_text('{"at": "20')  # a reader may come while the file is written
    assert sentence(paths).endswith("nothing is wrong")


def test_a_sign_of_life_is_overwritten_in_place(tmp_path):
    """On a full disk no file can be replaced or grow."""
    sign = LifeSign(tmp_path / "alive/0.json")
    sign.turn("a problem " * 1000)
    file = tmp_path / "alive/0.json"
    before = file.stat()
    assert len(json.loads(file.read_text())["problem"]) == 500
    sign.turn(None)
    after = file.stat()
    assert json.loads(file.read_text())["problem"] is None
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)
    file.unlink()
    sign.turn(None)
    assert not file.exists(), "it is not due yet"


def test_a_renamed_run_is_asked_about_and_explained(make):
    paths = make("submitted", queued={"state": "PENDING", "reason": "Resources", "script": None})
    renamed = paths.root.rename(paths.root.with_name("other"))
    assert true_states([read_run(renamed)])[0][1].jobs and state_of(read_run(renamed)) == "submitted"
    assert "no longer knows" not in sentence(RunPaths(renamed))
    for name in ("r-1", "other"):  # submitted before and after the renaming
        make.answer({"state": "PENDING", "script": f"/runs/{name}/submissions/1/job.sh"})
        assert true_states([read_run(renamed)])[0][1].jobs
    make.answer({"state": "PENDING", "script": "/runs/foreign/submissions/1/job.sh"})
    assert not true_states([read_run(renamed)])[0][1].jobs


def test_whether_a_run_continues_is_not_known_while_slurm_cannot_be_asked(make, monkeypatch):
    paths = make("preempted", {**STOPPED, "reason": "time limit"})

    def absent(*args):
        raise UserError("`squeue` failed: no controller")

    monkeypatch.setattr(slurm, "look", absent)
    assert sentence(paths).endswith("; whether it continues is not known: SLURM cannot be asked here: `squeue` failed: no "
                                    "controller")


def test_the_newest_checkpoint_on_disk_counts(make):
    paths = make("preempted", {**STOPPED, "reason": "time limit"}, checkpoint=75)
    paths.log(1, 0).parent.mkdir()
    paths.log(1, 0).write_text("training from step 0 of 300:\nstep 111/300  loss 1\n")
    make_checkpoint(paths, 100, {"weight": torch.zeros(2)})
    paths.checkpoint(110).mkdir()  # broken
    found = explain(read_run(paths.root))
    assert found["next"][0]["why"] == "it continues from its checkpoint of step 100 (11 steps are repeated)"
    assert found["attempts"][0]["checkpoint"] == 100
    assert runs.status(read_run(paths.root))["checkpoint_path"] == str(paths.checkpoint(100))
