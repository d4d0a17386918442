"""Environments in which a command must work, or must say what is missing: no home folder, closed streams, other encodings."""

from __future__ import annotations

import errno
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli.main import main

TASK = 'task: trainers.engine.task:Task\ntrain: {steps: 3}\nmodel: {word: "né€😀"}\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a task."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(TASK, encoding="utf-8")
    return tmp_path


def shell(line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a line of bash in which `launch` is the command."""
    command = f'launch() {{ "{sys.executable}" -P -m launch "$@"; }}; {line}'
    return subprocess.run(["bash", "-c", command], cwd=folder, env={**os.environ, **variables}, capture_output=True, check=False)


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user of a container: without HOME, and not in /etc/passwd."""
    def unknown(user: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    for variable in ("HOME", "XDG_CONFIG_HOME", "LAUNCH_DATA", "LAUNCH_RUNS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.parametrize("words", ["show my.yaml", "clusters", "my.yaml --slurm --dry-run", "cifar10 data=sample --dry-run",
                                   "doctor"])
def test_commands_work_without_a_home_folder(homeless: None, words: str, capsys: pytest.CaptureFixture) -> None:
    assert main(words.split()) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words, path", [
    ("show my.yaml --config=~/over.yaml", "~/over.yaml"), ("runs --runs=~/there", "~/there"),
    ("show cifar10 data=~/birds", "~/birds"), ("show wine data=~/table.csv", "~/table.csv"),
    ("my.yaml --dry-run --from=~/model.safetensors", "~/model.safetensors"),
    ("show my.yaml train.deepspeed=~/zero.json", "~/zero.json"),
])
def test_a_path_in_a_home_folder_that_is_not_known_is_an_error(homeless: None, words: str, path: str,
                                                               capsys: pytest.CaptureFixture) -> None:
    assert main(words.split()) == 2
    assert capsys.readouterr().err == (f"error: `{path}` is in your home folder, which is not known\n"
                                       "hint: set HOME, or give an absolute path\n")


def test_streams_may_be_closed(folder: Path) -> None:
    """A file that is opened later must not take the place of a closed stream, where it would get the output."""
    ran = shell("launch show my.yaml >&- && launch show my.yaml 2>&- && launch show my.yaml <&- >&- 2>&- && launch nothing 2>&-",
                folder)
    assert ran.returncode == 2 and b"steps: 3" in ran.stdout and ran.stderr == b""
    ran = shell("launch show my.yaml >&- 2>/dev/null; launch nothing >&-", folder)
    assert (ran.returncode, ran.stdout) == (2, b"")
    assert ran.stderr.startswith(b"error: there is no command, task or file `nothing`")


def test_text_that_the_terminal_cannot_show_is_escaped(folder: Path) -> None:
    ran = shell("launch show my.yaml; launch show my.yaml --json; launch show né.yaml", folder, PYTHONIOENCODING="ascii")
    text, _, values = ran.stdout.decode("ascii").partition("{\n")
    assert r'word: "n\u00e9\u20ac\ud83d\ude00"' in text
    assert json.loads("{" + values)["values"]["model"] == {"word": "né€😀"}
    assert ran.stderr.startswith(rb"error: there is no file `n\u00e9.yaml`")


def test_a_package_on_pythonpath_does_not_hide_launchs_own(folder: Path) -> None:
    (folder / "src" / "trainers").mkdir(parents=True)
    (folder / "src" / "trainers" / "__init__.py").write_text("mine = 1\n")
    (folder / "train.py").write_text("import os, trainers; print('mine', trainers.mine, os.environ['PYTHONPATH'])\n")
    ran = shell("launch show my.yaml && launch tasks && launch train.py --procs 1", folder, PYTHONPATH=str(folder / "src"))
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert f"mine 1 {folder}/src\n" in ran.stdout.decode()


def test_a_folder_of_runs_that_cannot_be_used_is_an_error(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "gone").symlink_to("/nonexistent/disk")
    (folder / "loop").symlink_to("loop")
    (folder / "file").touch()
    for name, message in (("gone", "error: `gone` is a link to `/nonexistent/disk`, which does not exist\nhint: mount that disk"),
                          ("loop", "error: `loop`: Too many levels of symbolic links\nhint: a symbolic link points to itself"),
                          ("file", "error: `file` is not a folder\n")):
        assert main(["runs", "--runs", name]) == 2
        assert capsys.readouterr().err.startswith(message)
        assert main(["doctor", "--runs", name]) == 1
        assert f"error    runs        cannot write to {folder}/{name}" in capsys.readouterr().out


@pytest.mark.parametrize("error, message", [
    (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/a/run.json"),
     "error: `/a/run.json`: Permission denied\nhint: another user may own it: ask the owner, or change its permissions\n"),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
     "error: No space left on device\nhint: the disk is full: free some space\n"),
    (OSError("odd"), "error: odd\n"),
])
def test_an_error_of_the_system_names_the_file_and_the_remedy(error: OSError, message: str, monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture) -> None:
    def fails(**_: object) -> int:
        raise error

    monkeypatch.setattr("launch.execute.local.start", fails)
    assert main(["my.yaml"]) == 2
    assert capsys.readouterr().err == message


def test_a_working_folder_that_was_deleted_is_an_error(folder: Path) -> None:
    ran = shell("mkdir gone; cd gone; rmdir ../gone; launch show cifar10", folder)
    assert (ran.returncode, ran.stderr) == (2, b"error: the working folder no longer exists\n"
                                               b"hint: use `cd` to go to another folder\n")
