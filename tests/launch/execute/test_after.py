"""Jobs that wait for a run are told to wait for its new job."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cluster import slurm
from launch.cluster.config import ClusterConfig
from launch.cluster.resources import Resources
from launch.execute import after
from launch.plan.submission import Submission
from trainers.contract.errors import UserError
from trainers.contract.files import replace_json
from trainers.contract.paths import RunPaths


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    made: list[tuple] = []
    monkeypatch.setattr(slurm, "call", lambda *words, **more: made.append(words))
    return made


def job(root: Path, id: str, number: str, ids: list[str] | None, follows: Path | None, state: str = "PENDING",
        options: dict = {}) -> slurm.Queued:
    """A job in the queue, with the folder of its submission. `ids`: the jobs of its run; None: it belongs to a sweep."""
    paths = RunPaths(root / id)
    paths.submission(1).mkdir(parents=True, exist_ok=True)
    cluster = ClusterConfig(name="c", kind="slurm")
    submission = Submission(1, [], cluster, Resources("cpu", 1), "python", "/", 0, None, options,
                            str(follows) if follows else None)
    (paths.submission(1) / "submission.json").write_text(submission.text())
    if ids is not None:
        replace_json(paths.record, {"job": {"ids": ids}})
    return slurm.Queued(number, state, "Dependency", None, 1, 1, "", "main", str(paths.submission(1) / "job.sh"), None)


def test_every_job_that_waits_for_the_run_follows_it_and_no_other(tmp_path, monkeypatch, calls, capsys):
    run = RunPaths(tmp_path / "a-1")
    queue = [
        job(tmp_path, "b-1", "20", ["20", "21"], run.root, options={"dependency": "singleton"}),
        job(tmp_path, "b-1", "21", ["20", "21"], run.root, options={"dependency": "singleton"}),  # the next of a chain
        job(tmp_path, "sweep-1", "30_0", None, run.root), job(tmp_path, "sweep-1", "30_1", None, run.root),
        job(tmp_path, "c-1", "40", ["40"], None),
        job(tmp_path, "d-1", "50", ["50"], tmp_path / "a-12"),
        job(tmp_path, "e-1", "60", ["60"], run.root, state="RUNNING"),
        slurm.Queued("70", "PENDING", "None", None, 1, 1, "", "main", "/home/me/other.sh", None),
    ]
    monkeypatch.setattr(slurm, "queue", lambda: {waiting.id: waiting for waiting in queue})
    after.follow(run, ["80", "81"])
    assert calls == [("scontrol", "update", "JobId=20", "Dependency=afterok:80?afterok:81,singleton"),
                     ("scontrol", "update", "JobId=30", "Dependency=afterok:80?afterok:81")]
    assert "job 20 of b-1 waits for job 80, 81" in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"format": 99}', '{"a": 1}', "[]", "{"])
def test_a_submission_of_another_version_or_tool_is_passed_over(tmp_path, monkeypatch, calls, text):
    run = RunPaths(tmp_path / "a-1")
    other, own = job(tmp_path, "x-1", "20", ["20"], run.root), job(tmp_path, "b-1", "30", ["30"], run.root)
    Path(other.script).with_name("submission.json").write_text(text)
    monkeypatch.setattr(slurm, "queue", lambda: {"20": other, "30": own})
    after.follow(run, ["80"])
    assert calls == [("scontrol", "update", "JobId=30", "Dependency=afterok:80")]


def test_slurm_that_does_not_answer_is_a_warning(tmp_path, monkeypatch, capsys):
    def fail(*words, **more):
        raise UserError("`squeue` did not answer within 30 s")

    monkeypatch.setattr(slurm, "queue", fail)
    after.follow(RunPaths(tmp_path / "a-1"), ["80"])
    assert "warning: runs that wait for a-1 still wait for its last job" in capsys.readouterr().err
