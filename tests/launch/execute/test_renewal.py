"""The code and the cluster file of a run that is resumed: as they are at the resumption."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from launch.cluster.config import ClusterConfig
from launch.cluster.resources import Resources
from launch.execute import renewal, snapshot
from launch.execute.submission_plan import as_copied, take_code
from launch.plan.spec import Spec, script_spec
from trainers.contract.errors import UserError


def git(top: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(top), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    top = tmp_path / "proj"
    top.mkdir()
    for name in ("train.py", "old.py"):
        (top / name).write_text("1")
    git(top, "init", "-q")
    git(top, "add", "-A")
    git(top, "commit", "-qm", "first")
    return top


def stopped_run(project: Path, code: Path, copy: bool = True) -> Spec:
    """The spec in the run.yaml of a run whose code is in `code`."""
    spec = script_spec(str(project / "train.py"), [], [], cluster=ClusterConfig(name="c", kind="slurm"))
    return as_copied(spec, take_code([spec], code, copy=copy))[0]


def renew(spec: Spec, code: Path, number: int = 1) -> snapshot.Snapshot | None:
    specs, planned = renewal.survey([spec], code)
    renewal.renew(specs, code, f"code-until-attempt-{number}")
    return planned


def test_a_fix_is_used_and_the_old_copy_is_kept(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code = tmp_path / "runs/r/code"
    spec = stopped_run(project, code)
    script = Path(spec.config.script)
    assert script == code / "proj/train.py"
    (project / "train.py").write_text("2")
    (project / "new.py").write_text("2")
    (project / "old.py").unlink()
    git(project, "add", "-A")
    git(project, "commit", "-qm", "second")
    (code / "proj/made").mkdir()
    (code / "proj/made/checkpoint.pt").write_text("made by a rank")
    planned = renew(spec, code)
    assert planned is not None and planned.moved(project / "train.py") == script
    assert script.read_text() == "2" and (code / "proj/new.py").exists() and not (code / "proj/old.py").exists()
    assert (code / "proj/made/checkpoint.pt").read_text() == "made by a rank"
    assert (code.with_name("code-until-attempt-1") / "proj/train.py").read_text() == "1"
    said = capsys.readouterr().err
    assert "changed: train.py; new: new.py; gone: old.py" in said and "commit " in said and "code-until-attempt-1" in said
    assert {path.name for path in code.parent.iterdir()} == {"code", "code-until-attempt-1"}


def test_a_second_fix_before_the_next_attempt_keeps_only_the_code_that_was_used(project: Path, tmp_path: Path) -> None:
    code = tmp_path / "runs/r/code"
    spec = stopped_run(project, code)
    for text in "23":
        (project / "train.py").write_text(text)
        renew(spec, code)
    assert Path(spec.config.script).read_text() == "3"
    assert (code.with_name("code-until-attempt-1") / "proj/train.py").read_text() == "1"
    assert len([*code.parent.iterdir()]) == 2


def test_code_that_has_not_changed_stays(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code = tmp_path / "runs/r/code"
    spec = stopped_run(project, code)
    before = code.stat().st_ino
    renew(spec, code)
    assert code.stat().st_ino == before and capsys.readouterr().err == "" and [*code.parent.iterdir()] == [code]


def test_code_that_is_gone_is_used_as_it_was_submitted(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code = tmp_path / "runs/r/code"
    spec = stopped_run(project, code)
    project.rename(tmp_path / "elsewhere")
    planned = renew(spec, code)
    assert planned is not None and Path(spec.config.script).read_text() == "1"
    assert "the code is used as it was submitted: `" in capsys.readouterr().err


def test_the_path_in_run_yaml_holds_if_the_code_gets_another_place(project: Path, tmp_path: Path) -> None:
    code = tmp_path / "runs/r/code"
    spec = stopped_run(project, code)
    (project / ".git").rename(tmp_path / ".git")  # the work tree begins one folder higher
    (project / "train.py").write_text("2")
    renew(spec, code)
    assert Path(spec.config.script) == code / "proj/train.py" and Path(spec.config.script).read_text() == "2"


def test_a_changed_loss_of_a_run_on_this_machine_is_noticed(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code = tmp_path / "runs/r/code"
    spec = stopped_run(project, code, copy=False)
    assert spec.config.script == str(project / "train.py")
    (project / "train.py").write_text("2")
    renew(spec, code)
    assert f"{project}: changed: train.py" in capsys.readouterr().err
    assert not (code / "proj").exists() and (code.with_name("code-until-attempt-1") / "snapshot.json").exists()


def test_a_copy_that_cannot_be_put_in_place_leaves_the_old_copy(project: Path, tmp_path: Path, monkeypatch) -> None:
    code = tmp_path / "runs/r/code"
    spec = stopped_run(project, code)
    (project / "train.py").write_text("2")
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if target == code and source.name.startswith(".code."):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match="cannot be replaced: Disk quota exceeded"):
        renew(spec, code)
    assert Path(spec.config.script).read_text() == "1" and not code.with_name("code-until-attempt-1").exists()


def test_copies_of_earlier_versions_lose_no_file(project: Path, tmp_path: Path) -> None:
    """Earlier versions did not record which files belong to the copy."""
    code = tmp_path / "runs/r/code"
    spec = stopped_run(project, code)
    record = snapshot.read_json(code / "snapshot.json")
    for tree in record["trees"]:
        del tree["files"]
    snapshot.replace_text(code / "snapshot.json", snapshot.json.dumps({key: record[key] for key in ("trees", "places")}))
    (code / "proj/checkpoint.pt").write_text("made by a rank")
    (project / "train.py").write_text("2")
    renew(spec, code)
    assert Path(spec.config.script).read_text() == "2" and (code / "proj/checkpoint.pt").exists()


def test_resources_follow_the_clusters_file_where_it_has_changed(project: Path) -> None:
    spec = script_spec(str(project / "train.py"), [], [], cluster=ClusterConfig(name="c", kind="slurm"))
    before = ClusterConfig(name="c", kind="slurm", gpus_per_node=8, setup=["a"])
    last = Resources("cuda", 8, 2, 3, 8)  # two nodes, as the command asked
    again = renewal.resources_again
    assert again(spec, last, before, before.model_copy(update={"setup": ["b"]})) == last
    assert again(spec, last, before, before.model_copy(update={"cpus_per_gpu": 6})) == Resources("cuda", 8, 2, 6, 8)
    assert again(spec, last, before, before.model_copy(update={"gpus_per_node": 2})) == Resources("cuda", 8, 4, 1, 8)
    with pytest.raises(UserError):
        again(spec, last, before, before.model_copy(update={"gpus_per_node": 2, "max_nodes": 2}))
    assert renewal.cluster_changes(before, before.model_copy(update={"setup": ["b"]})) == ["setup: ['a'] -> ['b']"]
