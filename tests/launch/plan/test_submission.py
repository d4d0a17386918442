"""submission.json, written by another version of launch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cluster.config import ClusterConfig
from launch.cluster.resources import Resources
from launch.plan.spec import load_spec, spec_of
from launch.plan.submission import Submission, read_submission
from launch.records.run import read_run
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths

SUBMISSION = Submission(2, ["/runs/r"], ClusterConfig(name="c", kind="slurm"), Resources("cuda", 8, 2, 3, 8), "python", "/", 3,
                        "4h", {"qos": "high"}, True)


def test_a_reader_ignores_keys_of_another_version_and_gives_missing_keys_a_default(tmp_path: Path) -> None:
    content = json.loads(SUBMISSION.text())
    for part in (content, content["cluster"], content["resources"]):
        part["added later"] = {"x": 1}
    del content["here"], content["cluster"]["srun"], content["resources"]["gpus"], content["format"]
    (tmp_path / "submission.json").write_text(json.dumps(content))
    read = read_submission(tmp_path)
    assert (read.number, read.options, read.here, read.resources) == (2, {"qos": "high"}, False, Resources("cuda", 8, 2, 3))
    (tmp_path / "submission.json").write_text(SUBMISSION.text())
    assert read_submission(tmp_path) == SUBMISSION


@pytest.mark.parametrize("change, words", [({"format": 2}, "a newer version of launch"), ({"cluster": None}, "submission.json"),
                                           ({"resources": {"device": "cpu"}}, "ranks")])
def test_a_file_that_cannot_be_understood_is_refused(tmp_path: Path, change: dict, words: str) -> None:
    (tmp_path / "submission.json").write_text(json.dumps(json.loads(SUBMISSION.text()) | change))
    with pytest.raises(UserError, match=words):
        read_submission(tmp_path)


def test_a_record_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    record = {"id": "r", "task": "t", "state": "failed", "step": 0, "attempt": 1, "created": "2026-01-01T00:00:00+00:00"}
    (tmp_path / "run.json").write_text(json.dumps({**record, "added": 1}))
    assert read_run(tmp_path).record["added"] == 1
    (tmp_path / "run.json").write_text(json.dumps({**record, "format": 2}))
    with pytest.raises(UserError, match="a newer version of launch"):
        read_run(tmp_path)


def test_a_broken_changes_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(load_spec("cifar10", [], cluster=ClusterConfig(name="c"), environment={}).text)
    (tmp_path / "changes.json").write_text("{")
    with pytest.raises(UserError, match="changes.json` is not JSON"):
        spec_of(RunPaths(tmp_path))
