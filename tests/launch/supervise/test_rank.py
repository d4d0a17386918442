"""One rank's process, which is here a short Python program."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import wait_until

from launch.records.process import process_state
from launch.supervise.rank import Rank, processes_of_groups, repeats
from trainers.contract.paths import RunPaths


class View:
    def text(self, line): ...
    def notice(self, message): ...


@pytest.fixture
def start(tmp_path):
    """A function that starts a rank with this Python code."""
    ranks = []

    def start(code: str) -> Rank:
        plan = SimpleNamespace(rank_env=lambda *args: {"RANK": "0"}, attempt=1, batch=None, env={}, cwd=str(tmp_path),
                               inherited=dict, command=(sys.executable, "-c", code))
        ranks.append(Rank(plan, 0, 0, "127.0.0.1", 1, {}, RunPaths(Path(tmp_path)), View(), subprocess.DEVNULL))
        return ranks[-1]

    yield start
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("code, expected", [
    ("print('done')", 0), ("raise SystemExit(75)", 75), ("import os; os.kill(os.getpid(), 15)", -15),
    ("import os; os.abort()", -6)])
def test_how_a_rank_ended(start, code, expected):
    rank = start(code)
    wait_until(rank.ended, 20)
    assert rank.code == expected and list(rank.tail) == (["done"] if expected == 0 else [])


def test_the_number_of_a_rank_that_has_ended_stays_its_own_until_its_group_is_killed(start):
    """Otherwise the kernel could give the number to another process, and a signal to the group would reach that process."""
    rank = start("import subprocess; subprocess.Popen(['sleep', '600'])")
    wait_until(rank.ended, 20)
    group = rank.process.pid
    time.sleep(0.05)
    assert process_state(group) == "Z"
    ((process,),) = processes_of_groups([group]).values()
    assert process.endswith("(sleep 600)")
    rank.kill()
    wait_until(lambda: not processes_of_groups([group]), 20)
    assert process_state(group) == "Z"


@pytest.mark.parametrize("last, code, expected", [
    ("SyntaxError: invalid syntax", 1, True),
    ("train.py: error: unrecognized arguments: --x", 2, True),
    ("ConnectionError: error: timed out", 1, False),
    ("slurmstepd: error: task 0 was killed", 1, False),
    ("it printed nothing", 2, False),
])
def test_a_script_is_not_tried_again_where_it_would_fail_in_the_same_way(last, code, expected):
    assert repeats(last, code) == expected
