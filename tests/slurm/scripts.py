"""Runs of scripts on the cluster: how they are submitted, and what they have said. They import nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import Command, record, wait_until
from slurm.conftest import LoginCommand

# A rank that says what it sees.
SHOW = """\
import json, os, sys
print(json.dumps({"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}))
"""
WHERE = ("--cluster", "here")
LATER = "sbatch.begin=now+1hour"  # it waits until Cluster.start_now
# No file name holds a slash, no folder of runs a backslash.
HOSTILE = """it's "a" $(touch hacked) `touch hacked` %t%j%A, ; & | * ? # ~ = ! <b> 中文　é"""
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_ADDR")


def write(folder: Path, text: str, name: str = "work.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def submit(launch: Command, *args: object, **env: str) -> tuple[Path, list[str]]:
    """(the run's folder, the ids of its jobs)"""
    done = launch(*before_dashes(args, *WHERE, "--json"), **env)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    return Path(told["path"]), told["jobs"]


def before_dashes(args: tuple, *more: object) -> list:
    cut = args.index("--") if "--" in args else len(args)
    return [*args[:cut], *more, *args[cut:]]


def finish(run: Path, state: str = "finished", timeout_s: float = 60) -> None:
    try:
        wait_until(lambda: record(run)["state"] == state, timeout_s=timeout_s)
    except BaseException:
        for path in sorted([*run.glob("submissions/*/*_log.out"), *run.glob("attempts/*/logs/*.log")]):
            print(f"--- {path}\n{path.read_text()}")
        raise


def log(run: Path, rank: int = 0, number: int = 1) -> str:
    return (run / f"attempts/{number}/logs/{rank}.log").read_text()


def seen(run: Path, rank: int = 0, number: int = 1) -> dict:
    """What a rank of SHOW has said."""
    return json.loads(log(run, rank, number).splitlines()[-1])


def nothing_was_done(launch: LoginCommand) -> None:
    assert launch.runs() == [] and launch.slurm.run("squeue", "-h") == ""
