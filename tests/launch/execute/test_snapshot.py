"""Snapshots of the code, taken of real git repositories and of plain folders."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from launch.execute import code_trees, snapshot
from launch.execute.snapshot import load, survey, take
from trainers.contract.errors import UserError

ODD = ["with space.py", "quote'\"$(touch x).py", "new\nline.py", "中文/模块.py", "-dash.py", "[a]*.py"]


def git(top: Path, *args: str) -> str:
    settings = ["user.name=a", "user.email=a@b", "protocol.file.allow=always", "init.defaultBranch=main"]
    words = ["git", "-C", str(top), *(word for setting in settings for word in ("-c", setting)), *args]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def write(top: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)


def repository(top: Path, files: dict[str, str]) -> Path:
    top.mkdir(parents=True)
    write(top, files)
    git(top, "init", "-q")
    git(top, "add", "-A")
    git(top, "commit", "-qm", "first")
    return top


def names(folder: Path) -> set[str]:
    """The files and links in a folder, by their relative paths."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "run-1" / "code"


def test_the_working_copy_is_copied_and_recorded(tmp_path: Path, into: Path) -> None:
    top = repository(tmp_path / "proj", {"train.py": "old", "gone.py": "x", "src/model.py": "m", ".gitignore": "data/\n"})
    write(top, {"train.py": "new", "src/new.py": "n", "data/big.txt": "d"})
    (top / "gone.py").unlink()
    taken = take([top / "train.py", top / "src"], into)
    assert names(into) == {"snapshot.json", "proj.diff", "proj/train.py", "proj/src/model.py", "proj/src/new.py",
                           "proj/.gitignore"}
    write(top, {"train.py": "newer", "src/model.py": "newer"})
    assert (taken.moved(top / "train.py").read_text(), taken.moved(top / "src/model.py").read_text()) == ("new", "m")
    (tree,) = json.loads((into / "snapshot.json").read_text())["trees"]
    assert tree == {
        "source": str(top), "copy": "proj", "commit": git(top, "rev-parse", "HEAD"), "branch": "main", "dirty": True,
        "diff": "proj.diff", "untracked": ["src/new.py"], "left_out": [], "note": None, "files": tree["files"],
    }
    assert tree["files"].keys() == {"train.py", "src/model.py", "src/new.py", ".gitignore"}
    assert taken.versions["python"] == load(into).versions["python"] == platform.python_version()
    assert taken.left_out == ()


def test_commit_diff_and_untracked_files_reproduce_the_copy(tmp_path: Path, into: Path) -> None:
    top = repository(tmp_path / "proj", {"a.py": "1\n2\n3\n", "b.py": "b\n", "c.py": "c\n", "blob.txt": "\0old",
                                            ".gitattributes": "*.py diff=count\n"})
    write(top, {"a.py": "1\nzwei\n3\n", "blob.txt": "\0new", "new.py": "n"})
    git(top, "add", "a.py")  # staged or not
    (top / "b.py").unlink()
    for setting in ("diff.noprefix=true", "color.diff=always", "diff.external=false", "color.ui=always",
                    "diff.count.textconv=wc -c"):
        git(top, "config", *setting.split("="))
    taken = take([top], into)
    git(top, "worktree", "add", "-q", "--detach", str(tmp_path / "again"), taken.trees[0]["commit"])
    git(tmp_path / "again", "apply", str(into / "proj.diff"))
    for name in taken.trees[0]["untracked"]:
        shutil.copy(into / "proj" / name, tmp_path / "again" / name)
    (tmp_path / "again" / ".git").unlink()
    assert names(tmp_path / "again") == names(into / "proj") == {"a.py", "c.py", "blob.txt", "new.py", ".gitattributes"}
    for name in names(into / "proj"):
        assert (tmp_path / "again" / name).read_bytes() == (into / "proj" / name).read_bytes(), name


def test_a_clean_tree(tmp_path: Path, into: Path) -> None:
    top = repository(tmp_path / "proj", {"a.py": "1"})
    git(top, "checkout", "-q", "--detach")
    os.utime(top / "a.py", (10**9, 10**9))  # only its time has changed
    (top / ".git/index.lock").touch()  # another git process is running
    tree = take([top], into).trees[0]
    assert (tree["branch"], tree["dirty"], tree["diff"], tree["untracked"]) == (None, False, None, [])
    assert names(into) == {"snapshot.json", "proj/a.py"}


def test_a_branch_whose_name_is_not_utf8(tmp_path: Path, into: Path) -> None:
    top = repository(tmp_path / "proj", {"a.py": "1"})
    branch = os.fsdecode(b"caf\xe9")
    git(top, "checkout", "-qb", branch)
    taken = take([top], into)
    assert taken.trees[0]["branch"] == load(into).trees[0]["branch"] == branch


def test_odd_names_arrive_and_execute_nothing(tmp_path: Path, into: Path) -> None:
    top = repository(tmp_path / os.fsdecode(b"\xff") / "中文 $(touch y) it's", {name: f"text of {name}" for name in ODD})
    bad = os.fsdecode(b"no-utf8-\xff.py")
    write(top, {f"new/{name}": "n" for name in ODD} | {bad: "bad", "big\n.txt": "x" * (code_trees.MAX_FILE_BYTES + 1)})
    write(top, {name: "edited" for name in ODD})
    before = set(os.listdir())
    taken = take([top], into)
    copy = taken.moved(top)
    assert copy.parent == into and copy.name.isprintable() and not set(" $()'") & set(copy.name)
    assert names(copy) == {*ODD, *(f"new/{name}" for name in ODD), bad}
    assert all(taken.moved(top / name).read_text() == "edited" for name in ODD)
    assert set(os.listdir()) == before
    assert load(into) == taken
    shown = [*taken.left_out, *taken.trees[0]["untracked"]]
    assert len(shown) == 1 + len(ODD) + 2 and all(word.isprintable() and word.encode() for word in shown)


def test_modes_and_times_stay(tmp_path: Path, into: Path) -> None:
    top = repository(tmp_path / "proj", {"run.sh": "#!/bin/sh\n", "read_only.py": "x", "plain.py": "y"})
    for name, mode in {"run.sh": 0o755, "read_only.py": 0o444, "plain.py": 0o640}.items():
        (top / name).chmod(mode)
        os.utime(top / name, ns=(5, 10**18 + mode))
    take([top], into)
    for name in names(top) & names(into / "proj"):
        was, now = (top / name).stat(), (into / "proj" / name).stat()
        assert (now.st_mode, now.st_mtime_ns) == (was.st_mode, was.st_mtime_ns), name
    assert names(into / "proj") == {"run.sh", "read_only.py", "plain.py"}


def test_links_still_point_to_the_right_files(tmp_path: Path, into: Path) -> None:
    write(tmp_path, {"elsewhere/data.txt": "far"})
    top = repository(tmp_path / "proj", {"src/a.py": "a", ".gitignore": "big/\n", "big/x.txt": "big"})
    links = {"out": "../elsewhere", "in.py": "src/a.py", "src/up.py": "../in.py", "absolute": str(top / "src"),
             "ignored": "big", "broken": "nowhere"}
    for name, target in links.items():
        (top / name).symlink_to(target)
    taken = take([top], into)
    write(top, {"src/a.py": "edited"})
    copy = into / "proj"
    assert all((copy / name).is_symlink() for name in links)
    assert (copy / "out/data.txt").read_text() == "far" and (copy / "ignored/x.txt").read_text() == "big"
    assert {(copy / name).read_text() for name in ("in.py", "src/up.py", "absolute/a.py")} == {"a"}
    assert taken.moved(top / "absolute/a.py") == copy / "src/a.py"
    assert taken.moved(top / "out/data.txt") == top / "out/data.txt"
    assert not (copy / "broken").exists()


def test_a_link_that_replaced_a_folder(tmp_path: Path, into: Path) -> None:
    top = repository(tmp_path / "proj", {"lib/a.py": "a", "main.py": "m"})
    shutil.move(top / "lib", tmp_path / "lib")
    (top / "lib").symlink_to("../lib")
    take([top], into)
    assert names(into / "proj") == {"lib", "main.py"} and os.readlink(into / "proj/lib") == str(tmp_path / "lib")


def test_a_source_reached_through_a_link(tmp_path: Path, into: Path) -> None:
    top = repository(tmp_path / "v1", {"sub/train.py": "v1"})
    other = repository(tmp_path / "v2", {"sub/train.py": "v2"})
    (tmp_path / "now").symlink_to(top)
    taken = take([tmp_path / "now/sub"], into)
    assert taken.moved(tmp_path / "now/sub/train.py") == taken.moved(top / "sub/train.py") == into / "v1/sub/train.py"
    (tmp_path / "now").unlink()
    (tmp_path / "now").symlink_to(other)
    assert load(into).moved(tmp_path / "now/sub/train.py").read_text() == "v1"


def test_moved_returns_paths_that_were_not_copied_unchanged(tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = repository(tmp_path / "proj", {"a.py": "a", ".gitignore": "data\n", "data/x.csv": "x"})
    taken = take([top], into)
    for path in (top / "data", top / "none.py", tmp_path / "proj2/a.py", Path("/"), Path("a.py"), Path("../x")):
        assert taken.moved(path) == path
    monkeypatch.chdir(top)
    assert taken.moved("a.py") == taken.moved("../proj/./a.py") == into / "proj/a.py"


def test_several_sources_and_their_names(tmp_path: Path, into: Path) -> None:
    tops = [repository(tmp_path / word / "Proj", {"a.py": word}) for word in ("x", "y")]
    tops.append(repository(tmp_path / "z" / "proj.diff", {"a.py": "z"}))
    tops.append(repository(tmp_path / "snapshot.json", {"a.py": "s"}))
    tops.append(repository(tmp_path / "...", {"a.py": "dots"}))
    write(tops[0], {"a.py": "x edited"})
    taken = take([*tops, tops[0] / "a.py"], into)
    assert [taken.moved(top / "a.py").read_text() for top in tops] == ["x edited", "y", "z", "s", "dots"]
    copies = [tree["copy"].lower() for tree in taken.trees]
    assert len(copies) == 5 and len({*copies, *(f"{copy}.diff" for copy in copies), "snapshot.json"}) == 11
    assert not any(copy.startswith(".") for copy in copies)


def test_a_submodule_and_a_nested_repository(tmp_path: Path, into: Path) -> None:
    lib = repository(tmp_path / "lib", {"lib.py": "l", ".gitignore": "*.log\n"})
    top = repository(tmp_path / "proj", {"main.py": "m"})
    for name in ("deps/lib", "deps/absent"):
        git(top, "submodule", "add", "-q", str(lib), name)
    git(top, "commit", "-qam", "submodules")
    git(top, "submodule", "-q", "deinit", "-f", "deps/absent")
    repository(top / "nested", {"n.py": "n"})
    git(top, "config", "diff.submodule", "log")
    write(top, {"deps/lib/lib.py": "edited", "deps/lib/new.py": "new", "deps/lib/x.log": "no"})
    taken = take([top], into)
    assert names(into / "proj") == {"main.py", ".gitmodules", "deps/lib/lib.py", "deps/lib/.gitignore",
                                    "deps/lib/new.py", "nested/n.py"}
    assert (into / "proj/deps/lib/lib.py").read_text() == "edited"
    assert taken.trees[0]["untracked"] == ["nested/n.py"]
    assert f"+Subproject commit {git(lib, 'rev-parse', 'HEAD')}-dirty" in (into / "proj.diff").read_text()
    assert taken.left_out == ()


def test_runs_inside_the_tree_are_not_copied(tmp_path: Path) -> None:
    top = repository(tmp_path / "proj", {"a.py": "a", "my [runs]*/committed.py": "no code of a run either"})
    for folder, take_into in (("my [runs]*", "my [runs]*/run-2/code"), ("", "run-2/code"), ("old", "runs/run-2/code")):
        write(top / folder / "run-1", {"run.json": "{}", "run.yaml": "x: 1", "code/proj/a.py": "older"})
        if folder:
            write(top, {"my s/b.py": "b", f"{take_into.partition('/')[0]}/tidy.py": "no code of a run"})
        taken = take([top], top / take_into)
        assert names(top / take_into / "proj") == ({"a.py", "my s/b.py"} if folder else {"a.py"}), folder
        assert (taken.trees[0]["untracked"], taken.left_out) == (["my s/b.py"] if folder else [], ()), folder
        shutil.rmtree(top / "my s", ignore_errors=True)
        for name in (folder or "run-1", take_into.partition("/")[0]):
            shutil.rmtree(top / name, ignore_errors=True)


def test_a_package_named_runs_belongs_to_a_repository(tmp_path: Path, into: Path) -> None:
    top = repository(tmp_path / "proj", {"a.py": "a", "src/runs/b.py": "b", "conf/run.json": "{}"})
    write(top, {"wandb/c.py": "c", "other/run.json": "{}"})
    take([top], into)
    assert names(into / "proj") == {"a.py", "src/runs/b.py", "conf/run.json", "wandb/c.py", "other/run.json"}


def test_sources_are_copied_even_if_git_ignores_them(tmp_path: Path) -> None:
    top = repository(tmp_path / "proj", {"a.py": "a", ".gitignore": "scratch/\nexp_*\n"})
    write(top, {"scratch/exp.py": "e", "scratch/help.py": "h", "exp_1": "script", "exp_2": "other"})
    first = take([top / "scratch/exp.py"], tmp_path / "runs/1/code")
    assert names(first.folder / "proj") == {"a.py", ".gitignore", "scratch/exp.py", "scratch/help.py"}
    second = take([top / "exp_1"], tmp_path / "runs/2/code")
    assert names(second.folder / "proj") == {"a.py", ".gitignore", "exp_1"}
    assert second.trees[0]["untracked"] == ["exp_1"] and second.trees[0]["dirty"]


def test_secrets_are_not_copied(tmp_path: Path, into: Path) -> None:
    secrets = {".env": "KEY=s3cret", "conf/server.PEM": "s3cret", "id_rsa": "s3cret", ".netrc": "s3cret",
               "aws-Credentials.json": "s3cret"}
    top = repository(tmp_path / "proj", {"a.py": "a", **secrets})
    write(top, {name: text + " edited" for name, text in secrets.items()} | {"new/.env": "s3cret", "a.py": "b"})
    (top / "link.pem").symlink_to("/etc/hosts")
    (top / "id_rsa").unlink()
    taken = take([top], into)
    assert names(into) == {"snapshot.json", "proj.diff", "proj/a.py"}
    assert not any(b"s3cret" in path.read_bytes() for path in into.rglob("*") if path.is_file())
    assert set(taken.left_out) == {f"{top}/{name} (may hold secrets)" for name in
                                   {*secrets, "new/.env", "link.pem"} - {"id_rsa"}}


def test_caps_leave_out_files_and_say_so(tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "MAX_FILES", 4)
    monkeypatch.setattr(code_trees, "MAX_FILE_BYTES", 100)
    monkeypatch.setattr(snapshot, "MAX_BYTES", 250)
    monkeypatch.setattr(code_trees, "MAX_DIFF_BYTES", 80)
    top = repository(tmp_path / "proj", {"a.txt": "1", "big.txt": "x" * 101, "z.py": "x" * 90, "y.py": "x" * 90})
    other = repository(tmp_path / "other", {"b.txt": "1", "c.py": "1"})
    write(top, {"new.py": "x" * 90, "big.txt": "y" * 200, "a.txt": "2"})
    for i in range(5):
        (other / f"link{i}").symlink_to("c.py")
    taken = take([top, other], into)
    assert names(into / "proj") == {"z.py", "y.py", "a.txt"}  # the small file still fits, the untracked file does not
    assert names(into / "other") == {"c.py", "link0", "link1", "link2", "link3"}
    assert set(taken.left_out) == {f"{top}/big.txt (0.0 MiB)", f"{top}/new.py (more than 0.0 MiB in all)",
                                   f"{other}/b.txt (more than 4 files)", f"{other}/link4 (more than 4 links)"}
    assert load(into).left_out == taken.left_out
    assert (into / "proj.diff").stat().st_size == 80 and "cut" in taken.trees[0]["note"]


def test_the_diff_leaves_out_large_files(tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_trees, "MAX_FILE_BYTES", 100)
    top = repository(tmp_path / "proj", {"a.txt": "1\n", "big.txt": "x\n"})
    write(top, {"a.txt": "2\n", "big.txt": "y\n" * 200})
    assert take([top], into).trees[0]["note"] is None
    assert {line for line in (into / "proj.diff").read_text().splitlines() if line[0] in "+-"} == {
        "--- a/a.txt", "+++ b/a.txt", "-1", "+2"}


def test_lists_in_the_record_are_cut(tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "MAX_LISTED", 2)
    top = repository(tmp_path / "proj", {"a.py": "a"})
    write(top, {f"{i}.pem": "" for i in range(5)})
    taken = take([top], into)
    assert taken.trees[0]["untracked"] == ["0.pem", "1.pem", "... (and 3 more)"]
    assert len(taken.left_out) == 3 and taken.left_out[-1] == f"{top}/... (and 3 more)"


TRACKED = {"a.py": "a", "big.bin": "x" * 101, "conf/credentials.py": "c"}


@pytest.mark.parametrize("left, name", [([], "big.bin"), (["*.bin"], "conf/credentials.py")])
def test_a_tracked_file_that_is_left_out_is_an_error(
    left: list[str], name: str, tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_trees, "MAX_FILE_BYTES", 100)
    top = repository(tmp_path / "proj", {**TRACKED, ".env.example": "e"})
    write(top, {"new.bin": "x" * 101})  # an untracked file is only warned about
    with pytest.raises(UserError) as raised:
        take([top], into, leave_out=left, strict=True)
    assert f"{top}/{name} (" in str(raised.value) and "run.include=" in str(raised.value) and not into.exists()
    assert (".bin" in raised.value.message) == (not left)
    taken = take([top], into, leave_out=["*.bin", "conf"], strict=True)
    assert names(into / "proj") == {"a.py", ".env.example"} and taken.warnings == []


def test_included_files_are_copied_whatever_their_size_and_name(
    tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_trees, "MAX_FILE_BYTES", 100)
    top = repository(tmp_path / "proj", {**TRACKED, ".gitignore": "data/"})
    write(top, {"data/vocab.bin": "v", "data/more/x.bin": "x"})
    take([top], into, include=["*.bin", "conf/*", "data"], strict=True)
    assert names(into / "proj") == {*TRACKED, ".gitignore", "data/vocab.bin", "data/more/x.bin"}
    shutil.rmtree(into)
    with pytest.raises(UserError, match="no file fits `vocab.bn`"):
        take([top], into, include=["vocab.bn"], strict=True)


def test_a_copy_is_copied_as_it_is(tmp_path: Path, into: Path) -> None:
    """As for an evaluation, whose code is the copy of its run."""
    top = repository(tmp_path / "proj", {"a.py": "a", "assets/vocab.bin": "v"})
    taken = take([top / "a.py"], into)
    again = take([taken.moved(top / "a.py")], tmp_path / "runs/run-1/evals/e-1/code")
    assert names(again.folder / "proj") == {"a.py", "assets/vocab.bin"} and again.left_out == ()


def test_a_description_holds_no_files(tmp_path: Path, into: Path) -> None:
    top = repository(tmp_path / "proj", {"a.py": "a", "b.py": "b"})
    write(top, {"b.py": "edited"})
    (top / "link").symlink_to("a.py")
    described = take([top / "a.py"], into, copy=False)
    assert names(into) == {"snapshot.json", "proj.diff"} and not described.is_copy
    assert described.moved(top / "a.py") == top / "a.py"
    shutil.rmtree(into)
    assert take([top / "a.py"], into).trees == described.trees


PLAIN = {"train.py": "t", "conf/x.yaml": "c", "ops/k.cu": "k", "run.sh": "r", "NOTES.MD": "n"}


def test_a_plain_folder(tmp_path: Path, into: Path) -> None:
    top = tmp_path / "proj"
    write(top, {**PLAIN, "weights.bin": "w", "data.csv": "d", ".hidden/a.py": "h", "__pycache__/a.py": "p",
                "venv/a.py": "v", "env/pyvenv.cfg": "", "env/a.py": "v", "runs/x/a.py": "r", "wandb/a.py": "w",
                "exp/1/run.json": "{}", "exp/1/run.yaml": "", "exp/1/code/a.py": "r", ".env": "s", "key.pem": "s"})
    write(tmp_path, {"runs/run-1/x.py": "x"})
    os.mkfifo(top / "pipe.py")
    (top / "data").symlink_to(tmp_path)
    script = top / "train"
    script.write_text("#!/usr/bin/env python")
    taken = take([script, top / "conf"], into)
    assert names(into / "proj") == {*PLAIN, "train", "data"}
    tree = taken.trees[0]
    assert {key: tree[key] for key in ("commit", "branch", "dirty", "diff", "note")} == dict.fromkeys(
        ("commit", "branch", "dirty", "diff", "note"))
    assert tree["left_out"] == ["data.csv (does not look like code)", "key.pem (may hold secrets)",
                                "weights.bin (does not look like code)"]
    (warning,) = taken.warnings
    assert warning.startswith(f"not copied with the code of {top}: data.csv (") and "run.include=[PATTERN]" in warning


def test_the_search_of_a_plain_folder_is_limited(tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_trees, "MAX_SEEN", 20)
    write(tmp_path / "home", {f"a/b/c/{i}.py": "" for i in range(50)} | {"task.yaml": "x", "near/n.py": "n"})
    taken = take([tmp_path / "home/task.yaml"], into)
    assert names(into / "home") >= {"task.yaml", "near/n.py"} and len(names(into / "home")) < 30
    assert taken.left_out == (f"{tmp_path}/home/a/b/c/ and further folders (more than 20 files)",)


def test_runs_in_a_plain_folder_are_not_copied(tmp_path: Path) -> None:
    write(tmp_path / "proj", {"a.py": "a", "out/run-0/code/b.py": "b"})
    taken = take([tmp_path / "proj"], tmp_path / "proj/out/run-1/code")
    assert names(taken.folder / "proj") == {"a.py"}


@pytest.mark.parametrize("case", ["no commit", "no git", "refused", "slow", "broken"])
def test_a_repository_that_git_cannot_describe_is_copied_as_a_plain_folder(
    case: str, tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tmp_path / "proj"
    if case == "no commit":
        top.mkdir()
        git(top, "init", "-q")
    else:
        repository(top, {"a.py": "old"})
    write(top, {"a.py": "a", "sub/b.py": "b", "w.bin": "w"})
    if case == "no git":
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    elif case == "refused":
        monkeypatch.setenv("GIT_CONFIG_COUNT", "0")
        (top / ".git/config").write_text("[core]\nrepositoryformatversion = 99\n")
    elif case == "slow":
        monkeypatch.setattr(code_trees, "GIT_TIMEOUT_S", 0.2)
        write(tmp_path, {"bin/git": "#!/bin/sh\nexec sleep 60\n"})
        (tmp_path / "bin/git").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    elif case == "broken":
        (top / ".git/index").write_text("no index")
    taken = take([top / "sub"], into)
    assert names(into / "proj") == {"a.py", "sub/b.py"}
    tree = taken.trees[0]
    words = {"no commit": "no commit yet", "no git": "not installed", "refused": "version", "slow": "took more than",
             "broken": "index"}[case]
    assert tree["commit"] is None and tree["note"].startswith("not by git: ") and words in tree["note"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's repository")
def test_another_users_repository_is_copied_as_a_plain_folder(tmp_path: Path, into: Path) -> None:
    top = repository(tmp_path / "proj", {"a.py": "a"})
    for path in (top, top / ".git"):
        os.chown(path, 65534, 65534)
    taken = take([top], into)
    assert names(into / "proj") == {"a.py"} and "dubious ownership" in taken.trees[0]["note"]
    assert f"safe.directory {top}" in taken.warnings[0]


def test_the_environment_of_a_git_hook_has_no_effect(tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top, other = repository(tmp_path / "proj", {"a.py": "a"}), repository(tmp_path / "other", {"b.py": "b"})
    write(top, {"a.py": "edited", ".env": "s"})
    for name, value in {"GIT_DIR": other / ".git", "GIT_WORK_TREE": other, "GIT_INDEX_FILE": other / ".git/index",
                        "GIT_LITERAL_PATHSPECS": 1, "GIT_EXTERNAL_DIFF": "false"}.items():
        monkeypatch.setenv(name, str(value))
    taken = take([top], into)
    assert names(into) == {"snapshot.json", "proj.diff", "proj/a.py"}
    monkeypatch.delenv("GIT_DIR")
    for name in ("GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name)
    assert taken.trees[0]["commit"] == git(top, "rev-parse", "HEAD")


def test_a_file_that_cannot_be_read(tmp_path: Path, into: Path) -> None:
    top = repository(tmp_path / "proj", {"a.py": "a", "b.py": "b"})
    (top / "b.py").chmod(0)

    def as_anyone() -> None:  # without these two capabilities, root cannot read every file
        for capability in (1, 2):
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)

    code = "import sys; from launch.execute.snapshot import take; print(take([sys.argv[1]], sys.argv[2]).left_out)"
    run = partial(subprocess.run, preexec_fn=as_anyone, capture_output=True, text=True)
    ran = run([sys.executable, "-P", "-c", code, top, into])
    assert ran.stdout == f"('{top}/b.py (Permission denied)',)\n", ran.stderr
    assert names(into / "proj") == {"a.py"}
    shutil.rmtree(into)
    ran = run([sys.executable, "-P", "-c", code, top / "b.py", into])
    assert "UserError" in ran.stderr and "Permission denied" in ran.stderr and not into.exists()


def test_sources_are_always_copied(tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Therefore their places in the copy are known in advance."""
    monkeypatch.setattr(snapshot, "MAX_FILES", 1)
    monkeypatch.setattr(code_trees, "MAX_FILE_BYTES", 100)
    top = repository(tmp_path / "proj", {"a.py": "a", "b.py": "b", "get_credentials.py": "x" * 200})
    other = tmp_path / "plain"
    (other / "empty").mkdir(parents=True)
    (top / "empty/more").mkdir(parents=True)
    sources = [top / "get_credentials.py", top / "b.py", top / "empty/more", other / "empty"]
    where = survey(sources, into)
    assert not into.exists()
    taken = take(sources, into)
    assert [taken.moved(path) for path in sources] == [where.moved(path) for path in sources] == [
        into / "proj/get_credentials.py", into / "proj/b.py", into / "proj/empty/more", into / "empty"]
    assert names(into) == {"snapshot.json", "proj/get_credentials.py", "proj/b.py"}
    assert taken.left_out == (f"{top}/a.py (more than 1 files)",)
    assert where.moved(tmp_path) == tmp_path
    with pytest.raises(UserError, match="does not exist"):
        survey([tmp_path / "none.py"], into)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_leaves_nothing(tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = repository(tmp_path / "proj", {f"{i}.py": "x" * 5000 for i in range(3)})
    make = os.mkdir

    def with_a_full_file(path, *args, **kwargs):  # writing to this file raises a real ENOSPC
        make(path, *args, **kwargs)
        if os.path.basename(path) == "proj":
            os.symlink("/dev/full", os.path.join(path, "1.py"))

    monkeypatch.setattr(os, "mkdir", with_a_full_file)
    with pytest.raises(UserError, match="No space left on device") as caught:
        take([top], into)
    assert str(into) in caught.value.message and not into.exists()


def test_errors(tmp_path: Path, into: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        take([tmp_path / "none.py"], into)
    assert load(into) is None
    into.mkdir(parents=True)
    (into / "kept").touch()
    with pytest.raises(UserError, match="File exists"):
        take([tmp_path], into)
    assert names(into) == {"kept"} and load(into) is None
    for text in ("{", "[]", '{"trees": []}'):
        (into / "snapshot.json").write_text(text)
        with pytest.raises(UserError, match="cannot read"):
            load(into)


def test_a_snapshot_can_be_moved_to_another_folder(tmp_path: Path, into: Path) -> None:
    top = repository(tmp_path / "proj", {"a.py": "a"})
    take([top], into)
    shutil.move(tmp_path / "runs", tmp_path / "archive")
    found = load(tmp_path / "archive/run-1/code")
    assert found.moved(top / "a.py") == tmp_path / "archive/run-1/code/proj/a.py"


def test_no_sources(into: Path) -> None:
    assert take([], into) == load(into)
    assert names(into) == {"snapshot.json"}


def test_a_thousand_files_take_little_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = repository(tmp_path / "proj", {f"p{i % 40}/m{i}.py": "x = 1\n" * 300 for i in range(1000)})
    write(top, {"p1/m1.py": "edited"})
    calls, run, times = [], subprocess.run, []
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: calls.append(args) or run(*args, **kwargs))
    for i in range(3):
        began = time.perf_counter()
        taken = take([top, top / "p1", top / "p2/m2.py"], tmp_path / "runs" / str(i) / "code")
        times.append(time.perf_counter() - began)
    assert len(names(taken.folder / "proj")) == 1000
    assert len(calls) == 3 * 3
    print(f"1,000 files: {min(times):.3f} s")
    assert min(times) < 3  # 0.1 s on two idle cores; on a slow disk, making the files alone took 0.8 s
