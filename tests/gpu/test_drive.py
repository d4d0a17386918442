"""The driver of the GPU checks, on the CPU: with checks that end in every way, and all real checks at toy size."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import alive
from gpu.drive import Driver
from gpu.fakes import FAKES, STUCK
from gpu.table import CHECKS

DRIVER = Path(__file__).with_name("drive.py")


def drive(checks, deadline=60.0):
    results = []
    Driver(checks, cpu=True, deadline=deadline, tell=results.append).run()
    assert sorted(result["check"] for result in results) == sorted(check.name for check in checks)
    return {result["check"]: result for result in results}


def test_a_check_may_end_in_any_way():
    results = drive(FAKES)
    assert {name for name, result in results.items() if result["ok"]} == {"right", "after"}
    assert results["right"]["said"] == {"one": 1}
    assert results["wrong"]["said"] == {"still": "said", "wrong": ["1 is not larger than 2"]}
    assert results["raises"]["said"]["wrong"] == ["ValueError: broken input"]
    assert results["dies"]["said"] == {"before": "death", "wrong": ["killed by SIGSEGV; the last line was: the last words"]}
    assert results["leaves"]["said"]["wrong"][0].startswith("ended before its end")
    assert results["fills_memory"]["said"]["wrong"] == ["MemoryError: out of memory"]
    assert results["missing"]["said"]["wrong"][0].startswith("AttributeError")
    hung = results["hangs"]
    assert hung["said"]["wrong"] == ["killed at the limit of 3 s; the last line was: waiting for nothing"]
    assert 3 <= hung["s"] < 15 and not alive(hung["said"]["pid"])


def test_the_deadline_ends_what_runs_and_begins_nothing():
    results = drive(STUCK, deadline=1.5)
    assert results["hangs"]["ok"] is False and "killed: the driver's deadline" in results["hangs"]["said"]["wrong"][0]
    assert results["later"] == {"check": "later", "ok": None, "s": 0.0, "limit": 20,
                                "said": {"wrong": ["not begun: the driver's deadline"]}}


def test_a_killed_driver_takes_its_checks_along(tmp_path):
    code = f"""if True:
        import json, sys
        sys.path[:0] = [{str(DRIVER.parents[1])!r}]
        from gpu.drive import Driver
        from gpu.fakes import STUCK
        driver = Driver(STUCK, True, 60, print)
        driver._start_what_can_start()
        print(driver.running[0].process.pid, flush=True)
        driver.run()"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    pid = int(process.stdout.readline())
    assert alive(pid)
    process.kill()
    process.communicate()
    until = time.monotonic() + 5
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert not alive(pid)


@pytest.mark.slow
def test_all_checks_are_right_at_toy_size(tmp_path):
    done = subprocess.run([sys.executable, DRIVER, "--cpu", "--out", tmp_path], capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["check"]: line["said"].get("wrong") for line in lines} == {check.name: None for check in CHECKS}
    assert done.returncode == 0 and [line["ok"] for line in lines] == [True] * len(CHECKS)
    assert (tmp_path / "report.jsonl").read_text() == done.stdout
