"""Ranks that hang, and ranks that are slower than the others: found by their signs of life (trainers/contract/heartbeat.py).

One rank that hangs makes all wait. So it is a hang when none of all ranks, on all nodes, has given a sign of life for
as long as it may be silent (`run.hang_s`; while ranks rest, `run.start_s`), or when one has been stopped (SIGSTOP) for
that long. Then each node's ranks write their stacks, and the head says by what all nodes report which rank is to blame.
What time this process, or the machine, was stopped itself does not count.

A user's script gives no signs of life: its ranks are not watched.
"""

from __future__ import annotations

import re
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.plan.plan import Plan
from trainers.contract import heartbeat
from trainers.contract.files import replace_json

if TYPE_CHECKING:
    from launch.supervise.rank import Peers, Rank

LOOK_S = 1.0        # between two looks at the ranks; less where hang_s is short
STACKS_S = 1.0      # for ranks to write their stacks
ANSWER_S = 5.0      # beyond that, for the other nodes to report
STACK_FRAMES = 30   # of a stack that a report holds, the innermost

PACE_S = 5.0        # over which ranks are measured, and at least
PACE_STEPS = 5      # so many steps
SLOW = 1.5          # a rank is slow whose own work in a step is more than this times the others' median,
SLOW_SHARE = 0.1    # and the difference more than this share of the step,
SLOW_IN_ROW = 2     # so many times in a row
REWRITE_S = 60.0    # between two writings of what has changed in figures alone

THREAD = re.compile(r"(?:Current thread|Thread) 0x[0-9a-f]+ .*\(most recent call first\):")
STOPPED, DISK = "Tt", "D"  # states of proc(5)


@dataclass(frozen=True)
class Sign:
    """One rank, when a hang was found."""

    rank: int
    step: int          # the last that it had done in this attempt
    beats: int
    silent_s: float
    over: bool         # whether that is longer than it may be
    state: str         # of its process, by proc(5); "" where that cannot be read
    stack: str | None  # of its main thread, the innermost call last


@dataclass(frozen=True)
class Hang:
    rank: int
    message: str
    hint: str
    stack: str | None


@dataclass(frozen=True)
class Pace:
    """What a rank's steps took, on average."""

    step_s: float
    work_s: float  # of it, its own work (with GPUs: making batches), and no waiting for others


class Watched:
    """What is known of one rank's life from one look to the next."""

    def __init__(self, rank: Rank):
        self.rank, self.page = rank, rank.page
        self.silent_s = self.stopped_s = 0.0
        self.state = ""
        self._life: tuple = ()
        self._pace = (0, 0, 0)

    def look(self, passed_s: float) -> None:
        saving = self.page[heartbeat.SAVING] > 0
        life = (self.page[heartbeat.BEATS], self.page[heartbeat.RESTING], saving, _moved(self.rank.process.pid) if saving else "")
        self.silent_s = self.silent_s + passed_s if life == self._life else 0.0
        self._life = life
        self.state = _state(self.rank.process.pid)
        self.stopped_s = self.stopped_s + passed_s if self.state and self.state in STOPPED else 0.0

    def sign(self, limits: Limits) -> Sign:
        return Sign(self.rank.rank, self.page[heartbeat.STEP], self.page[heartbeat.BEATS],
                    round(max(self.silent_s, self.stopped_s), 1),
                    limits.over(self), self.state, None)

    def steps(self) -> int:
        """Since `pace` was last called."""
        return self.page[heartbeat.STEPS] - self._pace[0]

    def pace(self, field: int) -> Pace:
        """Of the steps since the last call. `field`: what counts as work."""
        before, self._pace = self._pace, (self.page[heartbeat.STEPS], self.page[heartbeat.WALL_NS], self.page[field])
        steps, wall_ns, work_ns = (new - old for new, old in zip(self._pace, before))
        return Pace(wall_ns / steps / 1e9, work_ns / steps / 1e9)


@dataclass(frozen=True)
class Limits:
    hang_s: float
    start_s: float | None

    def over(self, watched: Watched) -> bool:
        """Whether a rank has been silent for longer than it may be."""
        limit_s = self.start_s if watched.page[heartbeat.RESTING] else self.hang_s
        return limit_s is not None and watched.silent_s >= limit_s


class Watchdog:
    """This node's part of watching one attempt: `turn` is called some times a second.

    Between node processes go {"hung"}: to the head, `stopped`, `silent` or "", whenever that changes; {"stacks"}: from
    the head, to write stacks and report; {"signs"}: that report; {"pace"}: to the head, what steps took.
    """

    def __init__(self, plan: Plan, ranks: Sequence[Rank], peers: Peers, node: int, slow_file: Path):
        self.ranks = [Watched(rank) for rank in ranks if rank.page is not None]
        self.limits = Limits(plan.hang_s, plan.start_s) if plan.hang_s else None
        self.peers, self.node, self.nodes = peers, node, plan.resources.nodes
        self.look_s = min(LOOK_S, plan.hang_s / 10) if plan.hang_s else LOOK_S
        self.looked_at = self.measured_at = time.monotonic()
        self.hung = dict.fromkeys(range(self.nodes), "")  # by node; kept by the head
        self.mine: list[Sign] | None = None               # since stacks were asked for
        self.asked_at = 0.0
        self.signs: dict[int, list[Sign]] = {}            # by node; kept by the head
        self.pace = SlowRanks(self.nodes, slow_file) if node == 0 and plan.resources.ranks > 1 else None
        self.work = heartbeat.WORK_NS if plan.resources.device == "cpu" else heartbeat.DATA_NS

    def turn(self, heard: Sequence[Mapping[str, Any]]) -> Hang | None:
        """Take in what other nodes have said and look at the ranks if it is time; on the head, the hang if it has
        been found whose it is."""
        for word in heard:
            self._hear(word)
        now = time.monotonic()
        if now - self.looked_at >= self.look_s and self.ranks:
            self._look(now)
        if self.mine is not None and self.node not in self.signs:
            found = {watched.rank.rank: _stack(watched.rank.tail) for watched in self.ranks}  # before a rank says more
            self.mine = [replace(sign, stack=found[sign.rank] or sign.stack) for sign in self.mine]
            if now - self.asked_at >= STACKS_S:
                self.signs[self.node] = self.mine
                self._tell_head({"signs": [asdict(sign) for sign in self.mine]})
        return self._decide(now) if self.node == 0 else None

    def _tell_head(self, word: Mapping[str, Any]) -> None:
        if self.node != 0:
            self.peers.tell(word)

    def _hear(self, word: Mapping[str, Any]) -> None:
        match word:
            case {"hung": how, "node": node}:
                self.hung[node] = how
            case {"ended": _, "node": node}:  # it has no ranks any more that anybody could wait for
                self.hung[node] = "silent"
                self.signs[node] = []
            case {"signs": signs, "node": node}:
                self.signs[node] = [Sign(**sign) for sign in signs]
            case {"stacks": _}:
                self._ask()
            case {"pace": rows, "node": node} if self.pace:
                self.pace.take(node, {rank: Pace(*row) for rank, *row in rows})

    def _look(self, now: float) -> None:
        passed_s = min(now - self.looked_at, 2 * self.look_s)  # more only if this process was stopped too
        self.looked_at = now
        live = [watched for watched in self.ranks if watched.rank.code is None]
        for watched in live:
            watched.look(passed_s)
        if self.limits is not None:
            how = ("stopped" if any(watched.stopped_s >= self.limits.hang_s for watched in live) else
                   "silent" if all(self.limits.over(watched) for watched in live) else "")
            if how != self.hung[self.node]:
                self.hung[self.node] = how
                self._tell_head({"hung": how})
        if now - self.measured_at >= PACE_S and live and min(watched.steps() for watched in live) >= PACE_STEPS:
            self.measured_at = now
            rows = {watched.rank.rank: watched.pace(self.work) for watched in live}
            self._tell_head({"pace": [[rank, pace.step_s, pace.work_s] for rank, pace in rows.items()]})
            if self.pace:
                self.pace.take(0, rows)

    def _ask(self) -> None:
        """Note how each rank is, and have it write its stacks; one that is stopped can only once it goes on."""
        if self.limits is None:
            return
        self.asked_at = time.monotonic()
        self.signs.pop(self.node, None)
        live = [watched for watched in self.ranks if watched.rank.code is None]
        self.mine = [watched.sign(self.limits) for watched in live]
        for watched in live:
            if watched.page[heartbeat.READY]:  # the signal would end another
                watched.rank.send(heartbeat.STACKS)
            watched.rank.send(signal.SIGCONT)

    def _decide(self, now: float) -> Hang | None:
        how = set(self.hung.values())
        if self.mine is None:
            if how == {"silent"} or "stopped" in how:
                self.peers.tell({"stacks": True})
                self._ask()
            return None
        if len(self.signs) < self.nodes and now - self.asked_at < STACKS_S + ANSWER_S:
            return None
        signs = [sign for node in sorted(self.signs) for sign in self.signs[node]]
        if signs and (all(sign.over for sign in signs) or any(sign.state and sign.state in STOPPED for sign in signs)):
            return blamed(signs, self.limits.hang_s)
        self.mine, self.signs = None, {}  # somebody went on just then
        self.hung[0] = ""
        return None


def blamed(signs: Sequence[Sign], hang_s: float) -> Hang:
    """Which rank the others wait for: one that is stopped; else the one that has not come as far as the others; of
    several, one that waits for a disk."""
    def order(sign: Sign) -> tuple:
        stopped = bool(sign.state) and sign.state in STOPPED
        return not stopped, sign.beats, sign.state != DISK, sign.rank

    first = min(signs, key=order)
    alike = [sign.rank for sign in signs if order(sign)[:3] == order(first)[:3] and sign.rank != first.rank]
    others = len(signs) - 1
    if first.state and first.state in STOPPED:
        why = "its process was stopped, by a signal or a debugger"
    elif first.state == DISK:
        why = "its process waits for a disk or a network file system"
    elif alike:
        why = f"so were ranks {', '.join(map(str, alike))}, at the same place: which of them the others wait for is not known"
        why = why if len(alike) > 1 else why.replace("ranks", "rank", 1)
    elif others:
        why = "the other ranks wait for it" if others > 1 else "the other rank waits for it"
    else:
        why = "nothing is known of why"
    where = f"after step {first.step}" if first.step else "before its first step was done"
    return Hang(first.rank, f"rank {first.rank} hung {where}: silent for {first.silent_s:.3g} s; {why}",
                f"the logs of the ranks hold their stacks; run.hang_s is {hang_s:g} s", first.stack)


class SlowRanks:
    """Kept by the head: which ranks take longer than the others for their own work, into a file for `launch status`.

    In synchronous training all ranks take as many steps a second: the slow one works while the others wait. On CPUs
    its work is the main thread's time on a CPU, in the queue for one, and making batches, so that a slow or busy
    node is seen. With GPUs it is the making of batches alone: a host does not see that its GPU is slow.
    """

    def __init__(self, nodes: int, file: Path):
        self.nodes, self.file = nodes, file
        self._heard: dict[int, Mapping[int, Pace]] = {}
        self._in_row: dict[int, int] = {}
        self._written: tuple[list[int], float] = ([], 0.0)  # (ranks, when)

    def take(self, node: int, rows: Mapping[int, Pace]) -> None:
        """What a node's ranks took; acts once all nodes have said it."""
        self._heard[node] = rows
        if len(self._heard) < self.nodes:
            return
        found = slow_ranks({rank: pace for part in self._heard.values() for rank, pace in part.items()})
        self._heard = {}
        self._in_row = {row["rank"]: self._in_row.get(row["rank"], 0) + 1 for row in found}
        found = [row for row in found if self._in_row[row["rank"]] >= SLOW_IN_ROW]
        ranks, now = [row["rank"] for row in found], time.monotonic()
        if ranks != self._written[0] or ranks and now - self._written[1] >= REWRITE_S:
            self._written = ranks, now
            try:
                replace_json(self.file, found)
            except OSError:
                pass  # a full disk: the run matters more


def slow_ranks(paces: Mapping[int, Pace]) -> list[dict[str, Any]]:
    """Of each slow rank {"rank", "factor", "work_s", "others_s", "step_s"}: what it takes for its work in a step, and
    the median of the others."""
    found = []
    for rank, pace in sorted(paces.items()):
        others = [other.work_s for each, other in paces.items() if each != rank]
        if not others:
            continue
        usual_s = statistics.median(others)
        if pace.work_s > SLOW * usual_s and pace.work_s - usual_s > SLOW_SHARE * pace.step_s:
            found.append({"rank": rank, "factor": round(pace.work_s / max(usual_s, 1e-6), 1), "work_s": round(pace.work_s, 6),
                          "others_s": round(usual_s, 6), "step_s": round(pace.step_s, 6)})
    return found


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return ""


def _moved(pid: int) -> bytes:
    """Changes while a process reads or writes."""
    try:
        with open(f"/proc/{pid}/io", "rb") as file:
            return file.read()
    except OSError:
        return b""


def _stack(lines: Sequence[str]) -> str | None:
    """The main thread's, which faulthandler writes last, the innermost call last."""
    lines = list(lines)
    start = max((i for i, line in enumerate(lines) if THREAD.match(line)), default=None)
    if start is None:
        return None
    frames = []
    for line in lines[start + 1:]:
        if not line.startswith("  File "):
            break
        frames.append(line)
    return "\n".join(["Stack (most recent call last):", *reversed(frames[:STACK_FRAMES])])
