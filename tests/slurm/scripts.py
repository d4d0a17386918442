"""Helpers for tests that submit small scripts to the cluster. The scripts import no large libraries, so they start fast."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import Command, record, wait_until
from slurm.conftest import LoginCommand

# A rank that prints its arguments, environment and working directory as JSON.
PRINT_CONTEXT = """\
import json, os, sys
print(json.dumps({"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}))
"""
ON_TEST_CLUSTER = ("--cluster", "here")
START_LATER = "sbatch.begin=now+1hour"  # the job waits until Cluster.start_now
# Without a slash, because it is used as a file name, and without a backslash, because launch refuses a folder of runs with one.
HOSTILE = """it's "a" $(touch hacked) `touch hacked` %t%j%A, ; & | * ? # ~ = ! <b> 中文　é"""
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_ADDR")


def write(folder: Path, text: str, name: str = "work.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def submit(launch: Command, *args: object, **env: str) -> tuple[Path, list[str]]:
    """Submit a run and return its folder and the ids of its jobs."""
    done = launch(*insert_before_dashes(args, *ON_TEST_CLUSTER, "--json"), **env)
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)
    return Path(output["path"]), output["jobs"]


def insert_before_dashes(args: tuple, *more: object) -> list:
    """Return `args` with `more` inserted before `--`, or at the end where `--` is missing."""
    cut = args.index("--") if "--" in args else len(args)
    return [*args[:cut], *more, *args[cut:]]


def wait_for_end(run: Path, state: str = "finished", timeout_s: float = 60) -> None:
    """Wait until a run is in `state`; on a timeout, print all its logs."""
    try:
        wait_until(lambda: record(run)["state"] == state, timeout_s=timeout_s)
    except BaseException:
        for path in sorted([*run.glob("submissions/*/*_log.out"), *run.glob("attempts/*/logs/*.log")]):
            print(f"--- {path}\n{path.read_text()}")
        raise


def rank_log(run: Path, rank: int = 0, number: int = 1) -> str:
    return (run / f"attempts/{number}/logs/{rank}.log").read_text()


def printed(run: Path, rank: int = 0, number: int = 1) -> dict:
    """Return what a rank of PRINT_CONTEXT printed."""
    return json.loads(rank_log(run, rank, number).splitlines()[-1])


def assert_nothing_submitted(launch: LoginCommand) -> None:
    assert launch.runs() == [] and launch.slurm.run("squeue", "-h") == ""
