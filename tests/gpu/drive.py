"""Run all checks that need a GPU, on one GPU, in at most 8 minutes.

    python tests/gpu/drive.py [--cpu] [--only NAME ...] [--deadline SECONDS] [--out FOLDER]

Nothing has to be installed but the libraries. Each check runs in processes of its own, with its own time limit. When a check
ends, the driver prints one JSON line and flushes it, so a driver that is cut off has told what it knows:

    {"check": "facts", "ok": true, "s": 8.1, "limit": 60, "said": {...}}

`said` holds the figures of the check, and `wrong`, a list of what failed. `ok` is null if the check did not run. At the end,
standard error gets a summary; the exit code is 0 if every check that was asked for ran and was right. `--out` also writes the
lines to FOLDER/report.jsonl and what the checks printed to FOLDER/log.txt. `--cpu` runs the same checks on the CPU at toy size:
that tests the checks, not the GPU.

This file imports only the standard library.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

TESTS = Path(__file__).parents[1]
sys.path[:1] = [str(TESTS)]  # in place of this folder

from gpu.place import last_line
from gpu.table import CHECKS, Check

DEADLINE_S = 480.0
CPU_FACTOR = 5           # on the limits and the deadline with `--cpu`: the machine may be busy
BESIDE = 4               # most checks that run beside each other
CORES = 3                # for each of them
MARK = "LAUNCH_GPU_CHECK"  # variable by which the driver finds all processes of a check, whatever sessions they lead
KILL_S = 5.0             # how long killed processes have to go away
MOST_LOG = 200_000       # characters of each check's output that log.txt keeps
PR_SET_PDEATHSIG = 1


@dataclass
class Running:
    """A check that runs."""

    check: Check
    process: subprocess.Popen
    mark: str
    folder: Path
    began: float

    @property
    def ends(self) -> float:
        return self.began + self.check.limit


class Driver:
    """Runs checks. `results` gets one dict for each check, as it ends.

    Args:
        deadline: seconds from now after which no check runs.
        log: takes what the checks print.
    """

    def __init__(self, checks: Sequence[Check], cpu: bool, deadline: float, tell: Callable[[dict[str, Any]], None],
                 log: TextIO | None = None):
        self.waiting, self.cpu, self.tell, self.log = list(checks), cpu, tell, log
        self.deadline = time.monotonic() + deadline
        self.running: list[Running] = []
        self.beside = max(1, min(BESIDE, len(os.sched_getaffinity(0)) // (1 if cpu else CORES)))
        self.stopped_by: str | None = None
        self.root = Path(tempfile.mkdtemp(prefix="gpu-checks-"))

    def run(self) -> None:
        """Run all checks, or as many as the deadline and `stop` allow."""
        try:
            while self.waiting or self.running:
                for item in list(self.running):
                    self._look_at(item)
                reason = self.stopped_by or ("the driver's deadline" if time.monotonic() >= self.deadline else None)
                if reason:
                    break
                self._start_what_can_start()
                time.sleep(0.02)
            for item in list(self.running):
                self._end(item, f"killed: {reason}")
            for check in self.waiting:
                self._tell(check, None, 0.0, {}, [f"not begun: {reason}"])
        finally:
            for item in self.running:
                kill(item.mark)
            shutil.rmtree(self.root, ignore_errors=True)

    def stop(self, number: int, frame: object = None) -> None:
        """Stop at the next chance: a handler of signals."""
        self.stopped_by = signal.Signals(number).name

    def _start_what_can_start(self) -> None:
        while self.waiting and not any(item.check.alone for item in self.running):
            check = self.waiting[0]
            if len(self.running) >= (1 if check.alone else self.beside):
                return
            self.waiting.pop(0)
            left = self.deadline - time.monotonic()
            if left < check.seconds and not self.cpu:
                self._tell(check, None, 0.0, {}, [f"not begun: needs about {check.seconds:g} s, and {left:.0f} s are left"])
                continue
            self.running.append(self._start(check))

    def _start(self, check: Check) -> Running:
        folder = self.root / check.name
        (folder / "work").mkdir(parents=True)
        mark = f"{os.getpid()}-{check.name}"
        cores = len(os.sched_getaffinity(0))
        env = {**os.environ, MARK: mark, "PYTHONUNBUFFERED": "1", "TMPDIR": str(folder),
               "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
               "OMP_NUM_THREADS": str(cores if check.alone else max(1, cores // self.beside))}
        if self.cpu:
            env |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("child.py")), check.function, str(folder / "answers"),
                 str(folder / "work"), "cpu" if self.cpu else "cuda"],
                env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, process_group=0,
                preexec_fn=_die_with_the_driver)
        return Running(check, process, mark, folder, time.monotonic())

    def _look_at(self, item: Running) -> None:
        if item.process.poll() is not None:
            self._end(item, None)
        elif time.monotonic() >= item.ends:
            self._end(item, f"killed at the limit of {item.check.limit:g} s")

    def _end(self, item: Running, killed: str | None) -> None:
        seconds = time.monotonic() - item.began
        left = kill(item.mark)
        code = item.process.poll()
        said, wrong, complete = answers(item.folder / "answers")
        self.running.remove(item)
        printed = (item.folder / "log").read_text(errors="replace")
        if killed:
            wrong.append(f"{killed}; the last line was: {last_line(printed)}")
        elif code or not complete:
            wrong += [] if code == 1 and wrong else [f"{ended(code)}; the last line was: {last_line(printed)}"]
        if left:
            wrong.append(f"processes that cannot be killed: {left}")
        if self.log:
            self.log.write(f"--- {item.check.name}\n{printed[-MOST_LOG:]}\n")
            self.log.flush()
        shutil.rmtree(item.folder, ignore_errors=True)
        self._tell(item.check, not wrong, seconds, said, wrong)

    def _tell(self, check: Check, ok: bool | None, seconds: float, said: dict[str, Any], wrong: list[str]) -> None:
        self.tell({"check": check.name, "ok": ok, "s": round(seconds, 1), "limit": check.limit,
                   "said": said | ({"wrong": wrong} if wrong else {})})


def _die_with_the_driver() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def answers(file: Path) -> tuple[dict[str, Any], list[str], bool]:
    """Return the figures that a check has said, what it has found wrong, and whether it came to its end. The last line may be cut
    off."""
    said: dict[str, Any] = {}
    wrong: list[str] = []
    complete = False
    with suppress(FileNotFoundError):
        for line in file.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                answer = json.loads(line)
                said |= answer.get("said", {})
                wrong += [answer["wrong"]] if "wrong" in answer else []
                complete = complete or "end" in answer
    return said, wrong, complete


def ended(code: int | None) -> str:
    """Say how a check's process ended that did not say that it came to its end."""
    if code is None or code < 0:
        return f"killed by {signal.Signals(-(code or -9)).name}"
    return f"exit code {code}" if code else "ended before its end, with exit code 0"


def kill(mark: str) -> list[int]:
    """Kill every process of a check. Return the processes that do not go away: a kernel may hang."""
    until = time.monotonic() + KILL_S
    while (pids := list(_marked(mark))) and time.monotonic() < until:
        for pid in pids:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return pids


def _marked(mark: str) -> Iterator[int]:
    """Yield the processes that have the mark in their environment and are not zombies."""
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    yield int(folder.name)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="on the CPU, at toy size")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[check.name for check in CHECKS], help="only these checks")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help=f"default: {DEADLINE_S:g}")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for report.jsonl and log.txt")
    parser.add_argument("--list", action="store_true", help="list the checks")
    args = parser.parse_args(argv)
    factor = CPU_FACTOR if args.cpu else 1
    checks = [replace(check, limit=check.limit * factor) for check in CHECKS if not args.only or check.name in args.only]
    if args.list:
        for check in checks:
            print(f"{check.name:24} {check.seconds:4g} s, at most {check.limit:g} s{', alone' * check.alone}")
        return 0
    report = log = None
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        report, log = open(args.out / "report.jsonl", "w"), open(args.out / "log.txt", "w")
    results = []

    def tell(result: dict[str, Any]) -> None:
        results.append(result)
        line = json.dumps(result, default=str)
        for file in (sys.stdout, report):
            if file:
                with suppress(BrokenPipeError):
                    print(line, file=file, flush=True)

    driver = Driver(checks, args.cpu, args.deadline or DEADLINE_S * factor, tell, log)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, driver.stop)
    began = time.monotonic()
    driver.run()
    right, wrong, not_run = ([result["check"] for result in results if result["ok"] is state] for state in (True, False, None))
    print(f"{len(right)} right, {len(wrong)} wrong ({', '.join(wrong)}), {len(not_run)} not run ({', '.join(not_run)}), in "
          f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    return 0 if len(right) == len(checks) else 1


if __name__ == "__main__":
    sys.exit(main())
