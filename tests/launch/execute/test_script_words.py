"""What scripts and modules are given: their words, their environment, Ctrl-C, standard input; and how their end is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Command, alive, attempt, environment, wait_until

from launch.cluster.config import load_cluster
from launch.cluster.resources import Resources
from launch.execute import snapshot
from launch.execute.submission_plan import as_copied, code_of
from launch.plan.plan import make_plan
from launch.plan.script_file import find_module, other_environment
from launch.plan.show import as_json, show
from launch.plan.spec import script_spec


def script(folder: Path, text: str, name: str = "work.py") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def log(launch: Command, rank: int = 0) -> str:
    return (launch.run() / "attempts" / "1" / "logs" / f"{rank}.log").read_text()


def feed(launch: Command, text: str, *words: str, **env: str) -> subprocess.CompletedProcess:
    """Run `launch` with `text` on its standard input."""
    return subprocess.run([sys.executable, "-P", "-m", "launch", *words], cwd=launch.folder, env=environment(**env), input=text,
                          capture_output=True, text=True, timeout=120)


PACKAGE = {
    "pkg/__init__.py": "",
    "pkg/helper.py": "word = 'relative'",
    "pkg/train.py": "import sys\nfrom .helper import word\nprint(__name__, word, sys.argv[1:], *sys.path[:2], sep='|')",
    "pkg/__main__.py": "from .helper import word\nprint('main', word)",
}


@pytest.mark.parametrize("words", [["-m", "pkg.train"], ["pkg.train"], ["-m", "pkg.train", "--debug"]])
def test_a_module_runs_as_python_m_runs_it(launch, words):
    for name, text in PACKAGE.items():
        script(launch.folder, text, name)
    plain = subprocess.run([sys.executable, "-m", "pkg.train", "--lr", "1"], cwd=launch.folder, capture_output=True, text=True,
                           env=environment(PYTHONPATH="/elsewhere"), check=True).stdout
    done = launch(*words, "--", "--lr", 1, PYTHONPATH="/elsewhere")
    assert done.returncode == 0, done.stderr
    expected = plain if "--debug" not in words else plain.partition(f"|{launch.folder}")[0]  # its Python has started before
    assert plain.startswith("__main__|relative|['--lr', '1']|") and expected in done.stdout


def test_a_package_runs_and_an_installed_module_is_found(launch):
    for name, text in PACKAGE.items():
        script(launch.folder, text, name)
    assert "main relative\n" in launch("-m", "pkg").stdout
    file, home = find_module("json.tool", launch.folder)
    assert file.name == "tool.py" and home is None
    assert find_module("pkg.train", launch.folder) == (launch.folder / "pkg/train.py", launch.folder)
    assert find_module("pkg.missing", launch.folder) is None and find_module("sys", launch.folder) is None


def test_on_slurm_a_module_runs_from_the_copy_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in PACKAGE.items():
        script(tmp_path / "work", text, name)
    monkeypatch.chdir(tmp_path / "work")
    cluster = load_cluster("local")
    spec = script_spec("pkg.train", module=True, cluster=cluster)
    assert code_of(spec)[0] == tmp_path / "work"
    copied, _ = as_copied(spec, snapshot.take(code_of(spec)[:1], tmp_path / "code"))
    plan = make_plan("run", copied, cluster, Resources("cpu", 1), runs=tmp_path, python="python", cwd=tmp_path / "work")
    assert plan.command == ("python", "-P", "-u", "-m", "pkg.train")
    assert plan.path and (Path(plan.path) / "pkg/train.py").is_file() and Path(plan.path).parent == tmp_path / "code"
    assert plan.inherited({"PYTHONPATH": "/a:/code", "LAUNCH_CODE": "/code"})["PYTHONPATH"] == f"{plan.path}:/a"
    assert f"PYTHONPATH={plan.path}" in show(plan)
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"  # a default of torchrun
    assert plan.inherited({})[name] == "1" and plan.inherited({name: "3"})[name] == "3"
    assert f"\n{name}=${{{name}:-1}}\n" in show(plan) and as_json(plan)["defaults"] == {name: "1"}
    installed = script_spec("json.tool", module=True, cluster=cluster)
    assert not any("json" in str(source) for source in code_of(installed))


@pytest.mark.parametrize("words, message", [
    (["x.ipynb"], "error: `x.ipynb` is not a Python script\nhint: `launch` runs Python scripts (.py), "),
    (["train.sh"], "error: `train.sh` is not a Python script\nhint: `launch` runs Python scripts (.py), "),
    (["table.csv"], "error: `table.csv` is not a Python script\nhint: `launch` runs Python scripts (.py), "),
    (["pkg"], "error: `pkg` is a folder\nhint: run the package with `launch -m pkg`"),
    (["-m", "pkg.no"], "error: there is no module `pkg.no` that can be run\n"),
    (["-m"], "error: `-m` needs the name of a module\n"),
    (["work.py", "--wandb", "off"], "error: `wandb.mode` is a key of tasks, and `work.py` is a script\nhint: call wandb.init"),
    (["work.py", "optim.lr=1"], "error: `optim.lr` is a key of tasks, and `work.py` is a script\nhint: give the script its own"),
    (["work.py", 'args=["1"]', "--", "2"], "error: the script's options are given twice"),
    (["sweep", "work.py", "--", "--lr", "1,2"], "error: no key has several values: `launch sweep` does not vary the words after "
     "`--`\nhint: give all words of each run as a list: launch sweep work.py 'args=[\"--lr\",\"1\"],[\"--lr\",\"2\"]'\n"),
])
def test_what_a_script_cannot_be_or_take_is_refused_in_a_sentence(launch, words, message):
    for name in ("x.ipynb", "train.sh", "table.csv", "work.py", "pkg/__main__.py"):
        script(launch.folder, "print(1)", name)
    done = launch(*words)
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") <= 2, done.stderr
    assert not launch.runs()


def test_the_sweep_that_the_hint_shows_runs(launch):
    script(launch.folder, "import sys; print('words', *sys.argv[1:])")
    done = launch("sweep", "work.py", 'args=["--lr","1"],["--lr","2"]')
    assert done.returncode == 0 and "words --lr 1\n" in done.stdout and "words --lr 2\n" in done.stdout


def test_a_script_without_a_suffix_runs_if_its_first_line_names_python(launch):
    script(launch.folder, "#!/usr/bin/env python3\nprint('ran')", "tool")
    assert "ran\n" in launch("tool").stdout


def test_debug_gives_a_script_the_packages_beside_it(launch):
    script(launch.folder, "mine = 'the user\\'s own'", "trainers/__init__.py")
    script(launch.folder, "import trainers\nprint(trainers.mine)")
    done = launch("work.py", "--debug")
    assert done.returncode == 0 and "the user's own\n" in done.stdout, done.stderr


def test_another_active_environment_is_named():
    assert other_environment({}, "/ours") is None and other_environment({"VIRTUAL_ENV": "/ours"}, "/ours") is None
    assert other_environment({"CONDA_PREFIX": "/conda", "CONDA_DEFAULT_ENV": "base"}, "/ours") is None
    for env in ({"VIRTUAL_ENV": "/mine"}, {"CONDA_PREFIX": "/mine", "CONDA_DEFAULT_ENV": "ml"}):
        warning = other_environment(env, "/ours")
        assert warning and "/ours" in warning and "/mine" in warning and "\n" not in warning


@pytest.mark.parametrize("text, words", [
    ("x = (", []), ("import argparse\nargparse.ArgumentParser().parse_args()", ["--", "--lr"])])
def test_a_script_that_would_fail_again_is_not_retried(launch, text, words):
    script(launch.folder, text)
    done = launch("work.py", "run.max_restarts=2", *words)
    assert done.returncode == (2 if words else 1) and "trying again" not in done.stdout
    assert len(list((launch.run() / "attempts").iterdir())) == 1


def test_a_scripts_exit_code_is_passed_on_and_named(launch):
    script(launch.folder, "import sys\nsys.exit(3)\n")
    assert launch("work.py").returncode == 3
    assert attempt(launch.run(), 1)["exit_code"] == 3
    assert "failed, exit code 3" in launch("status", launch.run().name).stdout
    assert "exit code 3" in launch("explain", launch.run().name).stdout


def test_of_several_ranks_the_exit_code_is_named_but_not_passed_on(launch):
    script(launch.folder, "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(3)\ntime.sleep(60)\n")
    assert launch("work.py", "--procs", 2).returncode == 1
    assert "failed, exit code 3" in launch("status", launch.run().name).stdout


@pytest.mark.parametrize("code", [75, 130])
def test_an_exit_code_with_a_meaning_of_its_own_is_not_passed_on(launch, code):
    script(launch.folder, f"raise SystemExit({code})")
    assert launch("work.py").returncode == 1


def test_ctrl_c_reaches_a_script_as_keyboard_interrupt(launch):
    """Rank 0 saves, rank 1 does not catch it, and rank 2 ignores it and so gets SIGTERM after the grace."""
    script(launch.folder, "import os, signal, sys, time\n"
           "rank = os.environ['RANK']\n"
           "if rank == '2':\n    signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
           "    signal.signal(signal.SIGTERM, lambda *_: (print('asked', flush=True), sys.exit(75)))\n"
           "try:\n    print('up', flush=True); time.sleep(600)\n"
           "except KeyboardInterrupt:\n"
           "    if rank == '1': raise\n"
           "    print('saved', flush=True)\n")
    process = launch.start("work.py", "--procs", 3, "run.grace_s=1")
    logs = "runs/*/attempts/1/logs/*.log"
    wait_until(lambda: sum("up" in path.read_text() for path in launch.folder.glob(logs)) == 3, process=process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert log(launch, 0).endswith("saved\n") and "KeyboardInterrupt" in log(launch, 1) and log(launch, 2).endswith("asked\n")
    assert attempt(launch.run(), 1)["outcome"] == "preempted"


def test_a_script_reads_the_pipe(launch):
    script(launch.folder, "print('read', input())")
    done = feed(launch, "a line\n", "work.py")
    assert done.returncode == 0 and "read a line\n" in done.stdout, done.stderr


def test_the_ranks_of_a_script_read_the_terminal_in_a_session_of_their_own(launch):
    script(launch.folder, "import os, sys\nprint(sys.stdin.isatty(), os.getsid(0) == os.getpid(), input(), flush=True)")
    ours, theirs = os.openpty()
    process = subprocess.Popen([sys.executable, "-P", "-m", "launch", "work.py"], cwd=launch.folder, env=environment(),
                               stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    os.write(ours, b"typed\n")
    out, _ = process.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert "True True typed\n" in out


def test_what_a_finished_script_leaves_behind_has_the_grace_and_is_then_named(launch):
    script(launch.folder, "import subprocess, sys\nsubprocess.Popen(['sleep', sys.argv[1]])")
    began = time.monotonic()
    done = launch("work.py", "run.grace_s=1", "--", 600)
    assert done.returncode == 0 and time.monotonic() - began < 30
    assert "rank 0 has ended, and processes that it started are killed after 1 s: " in done.stdout
    assert "(sleep 600); run.grace_s" in done.stdout
    pid = int(done.stdout.partition("after 1 s: ")[2].split()[0])
    assert not alive(pid)


def test_an_upload_of_a_finished_script_ends_by_itself(launch):
    script(launch.folder, "import subprocess\nsubprocess.Popen('sleep 3.5; echo uploaded', shell=True)")
    done = launch("work.py")
    assert done.returncode == 0 and "waiting up to 60 s (run.grace_s)" in done.stdout and "uploaded\n" in log(launch)


def test_scripts_get_the_variables_by_which_libraries_know_a_launcher(launch):
    script(launch.folder, "import json, os; print(json.dumps(dict(os.environ)))")
    assert launch("work.py", "--procs", 2, TORCHELASTIC_ERROR_FILE="/of/an/enclosing/torchrun").returncode == 0
    env = json.loads(log(launch, 1))
    assert {key: env[key] for key in env if key.startswith(("TORCHELASTIC_", "ROLE_"))} == {
        "ROLE_NAME": "default", "ROLE_RANK": "1", "ROLE_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": launch.run().name,
        "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    assert "LAUNCH_EVENTS" not in env
