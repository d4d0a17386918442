"""The command line: what each word means, what reaches the functions behind it, and the errors for wrong words."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import click
import pytest

from launch.cli.main import cli, main
from launch.cli.options import ALIASES, WANTED
from launch.cluster.resources import Wanted
from launch.report.doctor.check import Check
from trainers.contract.errors import UserError

RUN_ID = "my-20250101-000000-abcd"


class Called(dict):
    """The arguments that `start` or `resume` was called with."""


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Called:
    arguments = Called()

    def record(*args: Any, **more: Any) -> int:
        arguments.update(more, args=args)
        return 75

    monkeypatch.setattr("launch.execute.local.start", record)
    monkeypatch.setattr("launch.execute.local.resume", record)
    return arguments


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a spec, a script, and one finished run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LAUNCH_RUNS", raising=False)
    for variable in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_DISABLED"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "my.yaml").write_text("task: trainers.engine.task:Task\ntrain: {steps: 3}\n")
    (tmp_path / "train.py").write_text("print(1)\n")
    (tmp_path / "search.yaml").write_text("task: trainers.engine.task:Task\nconfig: trainers.config.schema:SearchConfig\n")
    logs = tmp_path / "runs" / RUN_ID / "attempts" / "1" / "logs"
    logs.mkdir(parents=True)
    (logs / "0.log").write_text("one\ntwo\n")
    (tmp_path / "runs" / RUN_ID / "run.json").write_text(json.dumps({
        "id": RUN_ID, "task": "my", "state": "finished", "step": 3, "total": 3, "attempt": 1, "job": None,
        "sweep": None, "metrics": {"top1": 0.5}, "checkpoint": 3, "created": "2025-01-01T00:00:00+00:00",
        "updated": "2025-01-01T00:00:00+00:00"}))
    return tmp_path


def error_of(capsys: pytest.CaptureFixture, *words: str, code: int = 2) -> str:
    """What a command that must fail prints on standard error: an error and at most one hint."""
    assert main(words) == code
    text = capsys.readouterr().err
    assert text.startswith("error: ") and len(text.splitlines()) <= 2
    return text


# Words


def test_a_word_is_a_task_a_spec_or_a_script(called: Called, folder: Path) -> None:
    assert main(["cifar10", "train.steps=3", "--gpus", "2", "optim.lr=0.5", "--dry-run", "--json"]) == 75
    config = called["spec"].config
    assert (config.name, config.train.steps, config.optim.lr) == ("cifar10", 3, 0.5)
    assert called["wanted"] == Wanted(gpus=2)
    assert (called["dry_run"], called["json"], called["debug"]) == (True, True, False)
    assert (called["runs"], called["cluster"].name) == (Path("runs"), "local")
    assert main(["my.yaml", "--procs", "2", "--debug", "--runs", "elsewhere"]) == 75
    assert called["spec"].name == "my"
    assert (called["wanted"], called["debug"], called["runs"]) == (Wanted(procs=2), True, Path("elsewhere"))
    assert main(["train.py", "run.max_restarts=1", "--", "--lr", "1e-3", "--gpus", "--", "a b"]) == 75
    config = called["spec"].config
    assert (config.args, config.run.max_restarts) == (["--lr", "1e-3", "--gpus", "--", "a b"], 1)


def test_aliases_and_a_config_file_override_the_task(called: Called, folder: Path) -> None:
    (folder / "over.yaml").write_text("optim: {lr: 0.25}\n")
    assert main(["cifar10", "--config", "over.yaml", "--data", "sample", "--wandb=offline", "--strategy", "ddp",
                 "data=sample"]) == 75
    config = called["spec"].config
    assert (config.optim.lr, config.data.source) == (0.25, "sample")
    assert (config.wandb.mode, config.train.strategy) == ("offline", "ddp")


def test_a_tilde_is_expanded_where_the_shell_does_not(called: Called, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "over.yaml").write_text("train: {steps: 7}\n")
    assert main(["my.yaml", "--runs=~/there", "--config=~/over.yaml"]) == 75
    assert (called["runs"], called["spec"].config.train.steps) == (folder / "there", 7)
    monkeypatch.setenv("LAUNCH_RUNS", "~/here")
    assert main(["my.yaml"]) == 75
    assert called["runs"] == folder / "here"


def test_the_folder_of_runs_may_come_from_the_environment(called: Called, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCH_RUNS", "there")
    assert main(["my.yaml"]) == 75
    assert called["runs"] == Path("there")


def test_a_command_comes_before_a_file(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert (folder / "runs").is_dir()
    assert main(["runs"]) == 0
    assert RUN_ID in capsys.readouterr().out


def test_help_and_version(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    for word in ("cifar10", "runs", "launch train.py --gpus 2 -- --lr 1e-3"):
        assert word in out
    assert "..." not in out.partition("\n")[2]  # each command's line is whole
    for word in ("cifar10", "train.py", "my.yaml", "status"):
        assert main([word, "--help"]) == 0
        assert f"Usage: launch {word}" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out[0].isdigit()


# Errors


@pytest.mark.parametrize("words, message, hint", [
    ("rnus", "there is no command, task or file `rnus`", "did you mean `runs`?"),
    ("cifr10", "there is no command, task or file `cifr10`", "did you mean `cifar10`?"),
    ("qqq", "there is no command, task or file `qqq`", "`launch --help`"),
    ("none.yaml", "there is no file `none.yaml`", "looked in"),
    ("./none", "there is no file `./none`", "looked in"),
    ("show cifr10", "`cifr10`", "did you mean `cifar10`?"),
    (".", "`.` is a folder", ""),
    ("cifar10 --gpu 2", "`launch cifar10` has no option `--gpu`", "did you mean `--gpus`?"),
    ("train.py --lr 1", "`launch train.py` has no option `--lr`", "launch train.py -- --lr"),
    ("--gpus 2 cifar10", "`launch` has no option `--gpus`", "launch TASK --gpus"),
    ("cifar10 --gpus", "`--gpus` needs a value", ""),
    ("cifar10 --gpus two", "`--gpus`: 'two' is not a valid integer", ""),
    ("cifar10 --gpus 0", "`--gpus`: 0 is not in the range x>=1", ""),
    ("cifar10 --debug=1", "`--debug` takes no value", ""),
    ("cifar10 --gpus 1 --procs 1", "both `--gpus` and `--procs` are given", "keep one"),
    ("cifar10 --wandb off wandb.mode=online", "`wandb.mode` is both `online` and `off` (command line)", "keep one"),
    ("cifar10 word", "`word` is not of the form key=value", ""),
    ("cifar10 optim.lrr=1", "`optim.lrr` is not a key of this spec (command line)", "`optim.lr`"),
    ("cifar10 -- x", "arguments after `--` are for a script", ""),
    ("runs -- x", "arguments after `--` are for a script", ""),
    ("show cifar10 -- x", "arguments after `--` are for a script", ""),
    ("train.py --config my.yaml", "`--config` is for tasks", ""),
    ("status", "`launch status` needs RUN", ""),
    ("status nothing", "there is no run `nothing`", ""),
    ("runs a b", "unexpected extra arguments (a b)", ""),
    ("resume my --gpus 1 --procs 1", "both `--gpus` and `--procs` are given", ""),
    ("cancel my", f"run `{RUN_ID}` is finished", ""),
    ("logs my --rank 7", "has no log of rank 7", ""),
    ("schema none.yaml", "there is no file `none.yaml`", ""),
    ("cifar10 --seeds many", "`--seeds` is `many`", "--seeds 3"),
    ("cifar10 --seeds 3 train.seed=1", "`train.seed=1` and `--seeds 3` both set the seed", "leave out"),
    ("cifar10 --seeds 2 --debug", "`--debug` is for a single run", ""),
    ("train.py --seeds 2", "`train.py` is a script", "args="),
    ("search.yaml --seeds 2", "`search.yaml` has no key for a seed", "seed_keys"),
    ("sweep cifr10 --seeds 2", "`cifr10`", "did you mean `cifar10`?"),
    ("cifar10 data=sample --seeds 2,2", "two points are the same run: train.seed=2", ""),
])
def test_a_wrong_word_is_an_error_with_a_hint(words: str, message: str, hint: str, capsys: pytest.CaptureFixture,
                                              called: Called) -> None:
    error, *hints = error_of(capsys, *words.split()).splitlines()
    assert message in error
    assert hint in "".join(hints)
    assert not called


def test_an_error_is_one_line_even_if_the_word_has_a_line_break(capsys: pytest.CaptureFixture) -> None:
    assert "`a b`" in error_of(capsys, "a\nb")


def test_an_unexpected_exception_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def broken(**_: Any) -> int:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("launch.execute.local.start", broken)
    text = error_of(capsys, "my.yaml", code=1)
    assert text == "error: RuntimeError: two lines\nhint: add --verbose to see the traceback\n"
    for words in (["--verbose", "my.yaml"], ["my.yaml", "--verbose"]):
        assert main(words) == 1
        assert "Traceback" in (text := capsys.readouterr().err) and text.endswith("\nerror: RuntimeError: two lines\n")


def test_verbose_shows_the_cause_of_a_user_error(capsys: pytest.CaptureFixture) -> None:
    error_of(capsys, "my.yaml", "optim.lr=fast")
    assert main(["my.yaml", "optim.lr=fast", "--verbose"]) == 2
    err = capsys.readouterr().err
    assert "ValidationError" in err and "error: `optim.lr` is `fast`" in err


def test_an_error_sets_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    class Failed(UserError):
        exit_code = 1

    def start_raises(error: BaseException) -> None:
        def start(**_: Any) -> int:
            raise error

        monkeypatch.setattr("launch.execute.local.start", start)

    start_raises(Failed("it failed"))
    assert error_of(capsys, "my.yaml", code=1) == "error: it failed\n"
    start_raises(KeyboardInterrupt())
    assert main(["my.yaml"]) == 130


# Commands


def test_tasks(capsys: pytest.CaptureFixture) -> None:
    assert main(["tasks", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert Path(rows["cifar10"]["file"]).name == "cifar10.yaml" and rows["cifar10"]["description"]
    assert main(["tasks"]) == 0
    assert rows["cifar10"]["description"] in capsys.readouterr().out


def test_show_and_schema(capsys: pytest.CaptureFixture) -> None:
    assert main(["show", "cifar10", "optim.lr=0.5", "--data", "sample"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.startswith("  lr:")] == [["lr:", "0.5", "#", "command", "line"]]
    assert main(["show", "my.yaml", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["values"]["train"]["steps"], shown["origins"]["train.steps"]) == (3, "my.yaml:2")
    assert main(["show", "train.py", "--", "-x"]) == 0
    assert 'args: ["-x"]' in capsys.readouterr().out
    assert main(["schema", "cifar10"]) == 0
    assert "optim" in json.loads(capsys.readouterr().out)["properties"]


def test_commands_that_read_runs(capsys: pytest.CaptureFixture, folder: Path) -> None:
    def printed(*words: str) -> str:
        assert main(words) == 0
        return capsys.readouterr().out

    assert json.loads(printed("runs", "--json"))[0]["id"] == RUN_ID
    assert json.loads(printed("runs", "--json", "--runs", "elsewhere")) == []
    for word in ("my", RUN_ID, f"runs/{RUN_ID}"):
        assert json.loads(printed("status", word, "--json"))["state"] == "finished"
    assert "finished" in printed("status", "my")
    assert printed("logs", "my", "-f") == "one\ntwo\n"
    assert printed("logs", "my", "--rank", "0", "--attempt", "1") == "one\ntwo\n"
    lines = [json.loads(line) for line in printed("logs", "my", "--json").splitlines()]
    assert lines == [{"attempt": 1, "rank": 0, "line": "one"}, {"attempt": 1, "rank": 0, "line": "two"}]


def test_resume_cancel_and_sync(called: Called, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert main(["resume", "my", "--procs", "2", "--json"]) == 75
    assert called["args"][0].id == RUN_ID
    assert (called["wanted"], called["json"]) == (Wanted(procs=2), True)
    monkeypatch.setattr("launch.records.cancel.cancel", lambda run, **more: "cancelled")
    assert main(["cancel", "my"]) == 0
    assert capsys.readouterr().out == f"{RUN_ID}: cancelled\n"
    assert main(["cancel", "my", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"id": RUN_ID, "state": "cancelled"}
    monkeypatch.setattr("launch.records.sync.sync", lambda run: 1)
    assert main(["sync", "my"]) == 1


@pytest.mark.parametrize("found, code", [("ok", 0), ("warning", 0), ("error", 1)])
def test_doctor_prints_its_checks_and_fails_on_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
                                                        found: Literal["ok", "warning", "error"], code: int) -> None:
    monkeypatch.setattr("launch.report.doctor.checks.doctor", lambda *_: iter([Check("slurm", found, "a finding", "a fix")]))
    assert main(["doctor"]) == code
    out = capsys.readouterr().out
    assert out.startswith(f"{found:<9}slurm       a finding\n") and ("a fix" in out) == (found != "ok")
    assert main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == [{"name": "slurm", "ok": found, "what": "a finding", "fix": "a fix"}]


def test_the_working_folder_shadows_nothing(launch, folder: Path) -> None:
    (folder / "trainers").mkdir()
    for file in ("trainers/__init__.py", "json.py", "click.py"):
        (folder / file).write_text("raise SystemExit('shadowed')")
    ran = launch("show", "my.yaml")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "steps: 3" in ran.stdout


def test_a_closed_pipe_is_not_an_error(folder: Path) -> None:
    line = f"{sys.executable} -P -m launch show my.yaml | true; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", line], check=False, capture_output=True, text=True, cwd=folder)
    assert (ran.returncode in (0, 1), ran.stderr) == (True, "")


@pytest.mark.parametrize("words, message", [
    (["checkpoint"], "error: `launch checkpoint` needs a command\nhint: use one of list, prune, verify\n"),
    (["checkpoint", "lsit"], "error: `launch checkpoint` has no command `lsit`\nhint: did you mean `list`?\n"),
    (["checkpoint", "x"], "error: `launch checkpoint` has no command `x`\nhint: use one of list, prune, verify\n"),
    (["plan", "my.yaml", "--from", "nothing"], "error: there is no run `nothing` in "),
])
def test_errors_of_subcommands_and_of_a_plan_without_its_run(folder: Path, capsys, words, message):
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(message)


def test_the_options_of_each_command_match_its_parameters(tmp_path, monkeypatch):
    """An option without a parameter would raise a TypeError, or be ignored."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work.py").touch()
    context = click.Context(cli)
    commands = {**cli.commands, **cli.commands["checkpoint"].commands,
                **{word: cli.get_command(context, word) for word in ("cifar10", "wine", "work.py")}}
    for name, made in commands.items():
        if isinstance(made, click.Group):
            continue
        takes = inspect.signature(inspect.unwrap(made.callback)).parameters
        declared = {option.name for option in made.params if option.expose_value}
        named = {parameter for parameter, about in takes.items() if about.kind is not about.VAR_KEYWORD} - {"context"}
        if "wanted" in named:  # one parameter for several options
            assert declared & WANTED.keys(), name
            named = named - {"wanted"} | declared & WANTED.keys()
        rest = declared - named
        assert named <= declared, name
        passed_on = {*ALIASES, "overrides", "config", "accelerate_config"}
        assert not rest or {"spec_args", "aliases"} & takes.keys() and rest <= passed_on, (name, rest)
