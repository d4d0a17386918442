"""Jobs that wait for a run are told to wait for its new job."""

from __future__ import annotations

from pathlib import Path

import pytest
from made import make_run

from launch.cluster import slurm
from launch.cluster.config import ClusterConfig
from launch.cluster.resources import Resources, Wanted
from launch.execute import after, on_slurm, sweep
from launch.plan.job_script import Request
from launch.plan.spec import script_spec
from launch.plan.submission import Submission
from launch.records.run import read_run
from trainers.contract.errors import UserError
from trainers.contract.files import replace_json, update_json
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
    cluster = ClusterConfig(name="slurm", kind="slurm")
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
    after.follow({run: ["80", "81"], RunPaths(tmp_path / "z-1"): ["90"]})
    assert calls == [("scontrol", "update", "JobId=20", "Dependency=afterok:80?afterok:81,singleton"),
                     ("scontrol", "update", "JobId=30", "Dependency=afterok:80?afterok:81")]
    assert "job 20 of b-1 waits for job 80, 81" in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"format": 99}', '{"a": 1}', "[]", "{"])
def test_a_submission_of_another_version_or_tool_is_passed_over(tmp_path, monkeypatch, calls, text):
    run = RunPaths(tmp_path / "a-1")
    other, own = job(tmp_path, "x-1", "20", ["20"], run.root), job(tmp_path, "b-1", "30", ["30"], run.root)
    Path(other.script).with_name("submission.json").write_text(text)
    monkeypatch.setattr(slurm, "queue", lambda: {"20": other, "30": own})
    after.follow({run: ["80"]})
    assert calls == [("scontrol", "update", "JobId=30", "Dependency=afterok:80")]


def test_slurm_that_does_not_answer_is_a_warning(tmp_path, monkeypatch, capsys):
    def fail(*words, **more):
        raise UserError("`squeue` did not answer within 30 s")

    monkeypatch.setattr(slurm, "queue", fail)
    after.follow({RunPaths(tmp_path / "a-1"): ["80"]})
    assert "warning: runs that wait for a-1 still wait for its last job" in capsys.readouterr().err


@pytest.fixture
def waiting(tmp_path, monkeypatch):
    """Run b-1, which was cancelled while its job waited for run a-1. Returns (b-1, what was submitted, what was called)."""
    monkeypatch.setenv("LAUNCH_RUNS", str(tmp_path))
    run = make_run(tmp_path / "a-1", state="running", job={"kind": "slurm", "cluster": "slurm", "ids": ["80"], "submission": 1})
    paths = make_run(tmp_path / "b-1", state="cancelled", attempt=0, checkpoint=None,
                     job={"kind": "slurm", "cluster": "slurm", "ids": ["20"], "submission": 1})
    (tmp_path / "train.py").write_text("print(1)\n")
    paths.spec.write_text(script_spec(str(tmp_path / "train.py"), [], [], cluster=ClusterConfig(name="c")).text)
    job(tmp_path, "b-1", "20", None, run.root)
    queued = {"80": slurm.Queued("80", "RUNNING", "None", None, 1, 1, "n1", "main", str(run.submission(1) / "job.sh"), None)}
    monkeypatch.setattr(slurm, "queue", lambda ids=None: {id: row for id, row in queued.items() if ids is None or id in ids})
    monkeypatch.setattr(slurm, "look", lambda ids, ended=True: (slurm.queue(ids), {}))
    monkeypatch.setattr(slurm, "accounted", lambda ids: {})
    submitted, called = [], []
    for module in (on_slurm, sweep):
        monkeypatch.setattr(module, "try_out", lambda job, resources: None)
        monkeypatch.setattr(module, "hand_over", lambda job, files, root: submitted.append((job.script, files)) or ["30"])
        monkeypatch.setattr(module, "release", lambda ids: called.append(("release", *ids)))
    monkeypatch.setattr(after, "follow", lambda jobs: called.append(("follow", *jobs)))
    return paths, queued, submitted, called


def resume(paths: RunPaths) -> int:
    return on_slurm.resume(read_run(paths.root), request=None, wanted=Wanted(procs=1), json=True, show_log=None)


def test_a_run_that_is_resumed_still_waits_for_the_other_run(waiting, capsys):
    paths, _, submitted, called = waiting
    assert resume(paths) == 0
    (script, files), = submitted
    assert "\n#SBATCH --dependency=afterok:80\n" in script
    assert f'"after": "{paths.root.parent / "a-1"}"' in files["submissions/2/submission.json"]
    assert called == [("follow", paths), ("release", "30")]
    assert "--after a-1: as before" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["20", None], ids=["on hold", "not recorded"])
def test_a_job_of_an_interrupted_submission_is_followed_before_it_is_released(waiting, number):
    paths, queued, _, called = waiting
    ids = [number] if number else []
    update_json(paths.record, state="submitted", job={"kind": "slurm", "cluster": "slurm", "ids": ids, "submission": 1,
                                                      "host": "another", "pid": 1, "started": None})
    queued["20"] = slurm.Queued("20", "PENDING", "JobHeldUser", None, 1, 1, "", "main", str(paths.submission(1) / "job.sh"), None)
    assert resume(paths) == 0
    assert called == [("follow", paths), ("release", "20")]


def test_whether_a_resumption_still_waits(waiting, capsys):
    paths, queued, _, _ = waiting
    run = RunPaths(paths.root.parent / "a-1")
    before, request = after.read_submission(paths.submission(1)), Request(ClusterConfig(name="slurm", kind="slurm"))
    assert after.as_before(request, before, begun=False).after == ("80",)
    assert after.as_before(request, before, begun=True) is request
    queued.clear()
    with pytest.raises(UserError, match="run a-1 is lost: nothing to wait for") as raised:
        after.as_before(request, before, begun=False)
    assert "launch resume a-1" in raised.value.hint
    update_json(run.record, state="finished")
    assert after.as_before(request, before, begun=False).after == ()
    run.record.unlink()
    assert after.as_before(request, before, begun=False) is request and "has been deleted" in capsys.readouterr().err


def test_a_sweep_that_is_resumed_waits_as_before_and_is_followed(waiting, tmp_path, monkeypatch):
    member, _, submitted, called = waiting
    update_json(member.record, sweep="s")
    member.submission(1).rename(tmp_path / "moved")
    home = RunPaths(tmp_path / "s")
    home.submission(1).parent.mkdir(parents=True)
    (tmp_path / "moved").rename(home.submission(1))
    replace_json(home.root / "sweep.json", {"id": "s", "points": [{"run": "b-1", "overrides": []}], "max_parallel": None,
                                            "job": {"kind": "slurm", "cluster": "slurm", "ids": ["20"], "submission": 1}})
    monkeypatch.setattr(sweep.renewal, "survey", lambda specs, code: ([], None))
    assert sweep.resume(tmp_path, "s", request=None, wanted=Wanted(procs=1), parallel=None, json=True) == 0
    assert "\n#SBATCH --dependency=afterok:80\n" in submitted[0][0]
    assert called == [("follow", member), ("release", "30")]


def test_a_sweeps_jobs_on_hold_are_followed_before_they_are_released(waiting, tmp_path):
    member, queued, _, called = waiting
    update_json(member.record, state="submitted", sweep="s")
    home = RunPaths(tmp_path / "s")
    script = str(home.submission(1) / "job.sh")
    queued["20_0"] = slurm.Queued("20_0", "PENDING", "JobHeldUser", None, 1, 1, "", "main", script, None)
    sweep._adopt_jobs(home, {0: read_run(member.root)})
    assert called == [("follow", member), ("release", "20_0")]
