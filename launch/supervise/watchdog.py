"""Find ranks that hang, and ranks that are slower than the others, by their signs of life (trainers/contract/heartbeat.py).

If one rank hangs, all other ranks wait for it. So a run counts as hung when all ranks on all nodes have been silent for
longer than they may be: for `run.hang_s`, or for `run.start_s` while a rank rests, or for `eval.report_s` while its task
reports. A run also counts as hung when one rank's process has been stopped (SIGSTOP) for `run.hang_s`. Then the ranks of each
node write their stacks, and the head compares the reports of all nodes to find the rank that is to blame. Time during which
this process or the machine was stopped does not count.

A user's script gives no signs of life: its ranks are not watched.
"""

from __future__ import annotations

import re
import signal
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.plan.plan import Plan
from launch.records.process import STOPPED, process_state
from trainers.contract import heartbeat
from trainers.contract.files import replace_json

if TYPE_CHECKING:
    from launch.supervise.rank import Peers, Rank

LOOK_S = 1.0        # between two looks at the ranks; less if hang_s is short
STACKS_S = 1.0      # for ranks to write their stacks
ANSWER_S = 5.0      # after that, for the other nodes to report
STACK_FRAMES = 30   # how many of a stack's innermost calls a report holds

PACE_S = 5.0        # ranks are measured over at least this time
PACE_STEPS = 5      # and at least this many steps
# A rank is slow if its own work in a step takes more than SLOW times the median of the other ranks, and the difference is
# more than SLOW_SHARE of the step, in SLOW_IN_ROW measurements in a row.
SLOW = 1.5
SLOW_SHARE = 0.1
SLOW_IN_ROW = 2
REWRITE_S = 60.0    # between two writes of the file, if the same ranks are slow and only the numbers have changed

THREAD = re.compile(r"(?:Current thread|Thread) 0x[0-9a-f]+ .*\(most recent call first\):")
DISK = "D"  # the state of a process that waits for a disk, as proc(5) names it


@dataclass(frozen=True)
class Sign:
    """The state of one rank when a hang was suspected."""

    rank: int
    step: int          # the last step that the rank completed in this attempt
    beats: int
    silent_s: float
    over: bool         # whether the rank has been silent for longer than it may be
    state: str         # the state of its process, as proc(5) names it; "" if not known
    stack: str | None  # the stack of its main thread, the innermost call last
    resting: int = 0   # whether the rank rests, and how: see trainers/contract/heartbeat.py

    @property
    def stopped(self) -> bool:
        """Whether the rank's process is stopped, by a signal or a debugger."""
        return self.state in STOPPED


@dataclass(frozen=True)
class Hang:
    """A hang that was found, and the rank that the others wait for."""

    rank: int
    message: str
    hint: str
    stack: str | None


@dataclass(frozen=True)
class Pace:
    """How long a rank's steps took, on average."""

    step_s: float
    work_s: float  # the part that was the rank's own work (with GPUs: making batches), not waiting for other ranks


class Watched:
    """A rank, and for how long it has given no sign of life."""

    def __init__(self, rank: Rank, page: memoryview):
        self.rank, self.page = rank, page
        self.silent_s = self.stopped_s = 0.0
        self.state = ""
        self._life: tuple[object, ...] = ()
        self._measured = (0, 0, 0)  # (steps, time, work) at the last call of `pace`

    def look(self, passed_s: float) -> None:
        """Look at the rank, `passed_s` seconds after the last look."""
        saving = self.page[heartbeat.SAVING] > 0
        counters = _io_counters(self.rank.process.pid) if saving else b""
        life = (self.page[heartbeat.BEATS], self.page[heartbeat.RESTING], saving, counters)
        self.silent_s = self.silent_s + passed_s if life == self._life else 0.0
        self._life = life
        self.state = process_state(self.rank.process.pid)
        self.stopped_s = self.stopped_s + passed_s if self.state in STOPPED else 0.0

    def sign(self, limits: Limits) -> Sign:
        """Return the rank's state for a report, without the stack."""
        return Sign(self.rank.rank, self.page[heartbeat.STEP], self.page[heartbeat.BEATS],
                    round(max(self.silent_s, self.stopped_s), 1),
                    limits.over(self), self.state, None, self.page[heartbeat.RESTING])

    def steps(self) -> int:
        """Return how many steps the rank has completed since the last call of `pace`."""
        return self.page[heartbeat.STEPS] - self._measured[0]

    def pace(self, field: int) -> Pace:
        """Return the average pace since the last call. At least one step must have been completed since.

        Args:
            field: the field of the heartbeat page that counts as the rank's own work.
        """
        before, self._measured = self._measured, (self.page[heartbeat.STEPS], self.page[heartbeat.WALL_NS], self.page[field])
        steps, wall_ns, work_ns = (new - old for new, old in zip(self._measured, before))
        return Pace(wall_ns / steps / 1e9, work_ns / steps / 1e9)


@dataclass(frozen=True)
class Limits:
    """For how many seconds a rank may be silent."""

    hang_s: float
    start_s: float | None   # while the rank rests; None: without limit
    report_s: float | None  # while its task reports; None: without limit

    def over(self, watched: Watched) -> bool:
        """Return whether a rank has been silent for longer than it may be."""
        at_rest = {heartbeat.REST: self.start_s, heartbeat.REPORT: self.report_s}
        limit_s = at_rest.get(watched.page[heartbeat.RESTING], self.hang_s)
        return limit_s is not None and watched.silent_s >= limit_s


class Watchdog:
    """Watches this node's ranks during one attempt. `turn` is called several times a second.

    Node processes exchange these messages (the key names the message):

    - "hung", to the head: "stopped", "silent" or "", whenever that changes
    - "stacks", from the head: let ranks write their stacks, and report
    - "signs", to the head: that report
    - "pace", to the head: how long steps took
    """

    def __init__(self, plan: Plan, ranks: Sequence[Rank], peers: Peers, node: int, slow_file: Path):
        self.ranks = [Watched(rank, rank.page) for rank in ranks if rank.page is not None]
        self.limits = Limits(plan.hang_s, plan.start_s, plan.report_s) if plan.hang_s else None
        self.peers, self.node, self.nodes = peers, node, plan.resources.nodes
        self.look_s = min(LOOK_S, plan.hang_s / 10) if plan.hang_s else LOOK_S
        self.looked_at = self.measured_at = time.monotonic()
        self.hung = dict.fromkeys(range(self.nodes), "")  # by node; only the head knows all
        self.mine: list[Sign] | None = None               # this node's report; None: no report is asked for
        self.asked_at = 0.0
        self.signs: dict[int, list[Sign]] = {}            # finished reports, by node; only the head has all
        self.pace = SlowRanks(self.nodes, slow_file) if node == 0 and plan.resources.ranks > 1 else None
        self.work = heartbeat.WORK_NS if plan.resources.device == "cpu" else heartbeat.DATA_NS

    def turn(self, heard: Sequence[Mapping[str, Any]]) -> Hang | None:
        """Handle the messages of other nodes, and look at the ranks if it is time to.

        Returns:
            On the head, the hang, once the rank that is to blame is known; otherwise None.
        """
        for message in heard:
            self._handle(message)
        now = time.monotonic()
        if now - self.looked_at >= self.look_s and self.ranks:
            self._look(now)
        if self.mine is not None and self.node not in self.signs:
            # Read the stacks at every turn, before later output pushes them out of `tail`.
            stacks = {watched.rank.rank: _stack(watched.rank.tail) for watched in self.ranks}
            self.mine = [replace(sign, stack=stacks[sign.rank] or sign.stack) for sign in self.mine]
            if now - self.asked_at >= STACKS_S:
                self.signs[self.node] = self.mine
                self._tell_head({"signs": [asdict(sign) for sign in self.mine]})
        return self._decide(now) if self.node == 0 else None

    def _tell_head(self, message: Mapping[str, Any]) -> None:
        if self.node != 0:
            self.peers.send(message)

    def _handle(self, message: Mapping[str, Any]) -> None:
        match message:
            case {"hung": how, "node": node}:
                self.hung[node] = how
            case {"ended": _, "node": node}:  # the node has no ranks left for others to wait for
                self.hung[node] = "silent"
                self.signs[node] = []
            case {"signs": signs, "node": node}:
                self.signs[node] = [Sign(**sign) for sign in signs]
            case {"stacks": _}:
                self._ask_for_stacks()
            case {"pace": rows, "node": node} if self.pace:
                self.pace.take(node, {rank: Pace(*row) for rank, *row in rows})

    def _look(self, now: float) -> None:
        passed_s = min(now - self.looked_at, 2 * self.look_s)  # if more has passed, this process was stopped too
        self.looked_at = now
        live = [watched for watched in self.ranks if watched.rank.code is None]
        for watched in live:
            watched.look(passed_s)
        if self.limits is not None:
            limits = self.limits
            how = ("stopped" if any(watched.stopped_s >= limits.hang_s for watched in live) else
                   "silent" if all(limits.over(watched) for watched in live) else "")
            if how != self.hung[self.node]:
                self.hung[self.node] = how
                self._tell_head({"hung": how})
        if now - self.measured_at >= PACE_S and live and min(watched.steps() for watched in live) >= PACE_STEPS:
            self.measured_at = now
            rows = {watched.rank.rank: watched.pace(self.work) for watched in live}
            self._tell_head({"pace": [[rank, pace.step_s, pace.work_s] for rank, pace in rows.items()]})
            if self.pace:
                self.pace.take(0, rows)

    def _ask_for_stacks(self) -> None:
        """Note the state of each rank, and ask the rank to write its stacks. A stopped rank must be continued first."""
        if self.limits is None:
            return
        self.asked_at = time.monotonic()
        self.signs.pop(self.node, None)
        live = [watched for watched in self.ranks if watched.rank.code is None]
        self.mine = [watched.sign(self.limits) for watched in live]
        for watched in live:
            if watched.page[heartbeat.READY]:  # a rank that is not ready has no handler: the signal would end it
                watched.rank.send(heartbeat.STACKS)
            watched.rank.send(signal.SIGCONT)

    def _decide(self, now: float) -> Hang | None:
        """Return the hang, if there is one; called on the head only.

        If all ranks are silent, or one is stopped, first ask all nodes for reports. Judge the reports when all have arrived.
        """
        if self.limits is None:
            return None
        how = set(self.hung.values())
        if self.mine is None:
            if how == {"silent"} or "stopped" in how:
                self.peers.send({"stacks": True})
                self._ask_for_stacks()
            return None
        if len(self.signs) < self.nodes and now - self.asked_at < STACKS_S + ANSWER_S:
            return None
        signs = [sign for node in sorted(self.signs) for sign in self.signs[node]]
        if signs and (all(sign.over for sign in signs) or any(sign.stopped for sign in signs)):
            return blamed(signs, self.limits)
        self.mine, self.signs = None, {}  # a rank gave a sign of life after all
        self.hung[0] = ""
        return None


def blamed(signs: Sequence[Sign], limits: Limits) -> Hang:
    """Return the hang, with the rank that the other ranks most likely wait for.

    That is a stopped rank, if there is one; otherwise the rank with the fewest beats; among several of those, a rank that
    waits for a disk.
    """
    def order(sign: Sign) -> tuple[bool, int, bool, int]:
        return not sign.stopped, sign.beats, sign.state != DISK, sign.rank

    first = min(signs, key=order)
    equal = [sign.rank for sign in signs if order(sign)[:3] == order(first)[:3] and sign.rank != first.rank]
    others = len(signs) - 1
    if first.stopped:
        why = "its process was stopped, by a signal or a debugger"
    elif first.state == DISK:
        why = "its process waits for a disk or a network file system"
    elif equal:
        ranks = f"rank {equal[0]} is" if len(equal) == 1 else f"ranks {', '.join(map(str, equal))} are"
        why = f"{ranks} silent at the same place: which of them the other ranks wait for is not known"
    elif others:
        why = "the other ranks wait for it" if others > 1 else "the other rank waits for it"
    else:
        why = "the reason is not known"
    where = f"after step {first.step}" if first.step else "before its first step was done"
    limit = f"run.hang_s is {limits.hang_s:g} s"
    if not first.stopped and first.resting == heartbeat.REPORT:
        where, limit = f"{where}, in its report", f"eval.report_s is {limits.report_s:g} s"
    elif not first.stopped and first.resting == heartbeat.REST and limits.start_s is not None:
        limit = f"run.start_s is {limits.start_s:g} s"
    return Hang(first.rank, f"rank {first.rank} hung {where}: silent for {round(first.silent_s, 1):g} s; {why}",
                f"the logs of the ranks hold their stacks; {limit}", first.stack)


class SlowRanks:
    """Finds ranks whose own work takes longer than the work of other ranks, and writes them to a file for `launch status`.

    Only the head has such an object.

    In synchronous training, all ranks take the same number of steps per second: the slow rank works while the others wait.
    On CPUs, a rank's own work is the time in which its main thread runs on a CPU, waits for a free CPU, or makes batches.
    This shows a slow or busy node. With GPUs, a rank's own work is only making batches: a host cannot see that its GPU is
    slow.
    """

    def __init__(self, nodes: int, file: Path):
        self.nodes, self.file = nodes, file
        self._heard: dict[int, Mapping[int, Pace]] = {}
        self._in_row: dict[int, int] = {}
        self._written: tuple[list[int], float] = ([], 0.0)  # (ranks, time)

    def take(self, node: int, rows: Mapping[int, Pace]) -> None:
        """Take the paces of one node's ranks. Once all nodes have reported, find the slow ranks and write them."""
        self._heard[node] = rows
        if len(self._heard) < self.nodes:
            return
        slow = slow_ranks({rank: pace for paces in self._heard.values() for rank, pace in paces.items()})
        self._heard = {}
        self._in_row = {row["rank"]: self._in_row.get(row["rank"], 0) + 1 for row in slow}
        slow = [row for row in slow if self._in_row[row["rank"]] >= SLOW_IN_ROW]
        ranks, now = [row["rank"] for row in slow], time.monotonic()
        if ranks != self._written[0] or ranks and now - self._written[1] >= REWRITE_S:
            self._written = ranks, now
            try:
                replace_json(self.file, slow)
            except OSError:
                pass  # a full disk must not stop the run


def slow_ranks(paces: Mapping[int, Pace]) -> list[dict[str, Any]]:
    """Return {"rank", "factor", "work_s", "others_s", "step_s"} for each slow rank.

    All times are averages per step: `work_s` is the rank's own work, `others_s` the median of the other ranks' own work,
    `step_s` the whole step. `factor` is work_s / others_s.
    """
    slow = []
    for rank, pace in sorted(paces.items()):
        others = [other_pace.work_s for other, other_pace in paces.items() if other != rank]
        if not others:
            continue
        usual_s = statistics.median(others)
        if pace.work_s > SLOW * usual_s and pace.work_s - usual_s > SLOW_SHARE * pace.step_s:
            slow.append({"rank": rank, "factor": round(pace.work_s / max(usual_s, 1e-6), 1), "work_s": round(pace.work_s, 6),
                         "others_s": round(usual_s, 6), "step_s": round(pace.step_s, 6)})
    return slow


def _io_counters(pid: int) -> bytes:
    """Return the I/O counters of a process; they change whenever the process reads or writes."""
    try:
        with open(f"/proc/{pid}/io", "rb") as file:
            return file.read()
    except OSError:
        return b""


def _stack(output: Iterable[str]) -> str | None:
    """Return the main thread's stack from a rank's output, the innermost call last.

    faulthandler writes the main thread last, and the innermost call of each thread first.
    """
    lines = list(output)
    start = max((i for i, line in enumerate(lines) if THREAD.match(line)), default=None)
    if start is None:
        return None
    frames = []
    for line in lines[start + 1:]:
        if not line.startswith("  File "):
            break
        frames.append(line)
    return "\n".join(["Stack (most recent call last):", *reversed(frames[:STACK_FRAMES])])
