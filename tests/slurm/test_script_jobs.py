"""Scripts and modules in jobs: the code that they run, what they read, what they leave behind, and their exit codes."""

from __future__ import annotations

import json

import pytest
from conftest import attempt, wait_until
from slurm.conftest import LoginCommand, explanation_of
from slurm.scripts import START_LATER, submit, wait_for_end, write

MODULE = """\
import json, os, subprocess, sys
from .helper import word
subprocess.Popen("sleep 1; echo left behind", shell=True)
keys = ("ACCELERATE_MIXED_PRECISION", "ROLE_RANK", "TORCHELASTIC_RESTART_COUNT", "GROUP_RANK")
print(json.dumps([word, sys.stdin.read(), os.getcwd(), sys.argv[1:], *(os.environ.get(key) for key in keys)]))
"""


@pytest.mark.slow
def test_a_module_runs_on_two_nodes_as_it_was_submitted(slurm_launch: LoginCommand) -> None:
    package = slurm_launch.folder / "pkg"
    package.mkdir()
    write(package, "word = 'as submitted'", "helper.py")
    write(package, MODULE, "train.py")
    run, (job,) = submit(slurm_launch, "-m", "pkg.train", "--procs", 2, "--nodes", 2, "train.precision=bf16", START_LATER,
                         "--", "a b")
    write(package, "word = 'edited'", "helper.py")
    slurm_launch.slurm.start_now(job)
    wait_for_end(run)
    for rank in (0, 1):
        first, *rest = (run / "attempts/1/logs" / f"{rank}.log").read_text().splitlines()
        assert json.loads(first) == ["as submitted", "", str(slurm_launch.folder), ["a b"], "bf16", str(rank), "0", str(rank)]
        assert rest == ["left behind"]


@pytest.mark.slow
def test_a_scripts_exit_code_is_the_jobs_and_is_told(slurm_launch: LoginCommand) -> None:
    write(slurm_launch.folder, "import sys\nsys.exit(3)\n")
    run, (job,) = submit(slurm_launch, "work.py", "--procs", 1, "run.max_restarts=0")
    wait_for_end(run, "failed")
    assert attempt(run, 1)["exit_code"] == 3
    wait_until(lambda: f"JobId={job} " in (shown := slurm_launch.slurm.run("scontrol", "show", "job", job))
               and "ExitCode=3:0" in shown, timeout_s=30)
    assert "exit code 3" in slurm_launch("status", run.name).stdout
    assert explanation_of(run)["cause"]["exit_code"] == 3
