"""The watchdogs of several nodes, with fake ranks, fake messages and a fake clock."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from types import SimpleNamespace

import pytest

from launch.supervise import watchdog
from launch.supervise.watchdog import ANSWER_S, STACKS_S, Limits, Pace, Sign, Watchdog, blamed, slow_ranks
from trainers.contract.files import read_json
from trainers.contract.heartbeat import BEATS, READY, REPORT, RESTING, SAVING, STACKS, STEP, STEPS, WALL_NS, WORK_NS, new_page

STACK = ["Thread 0x01 (most recent call first):", '  File "pool.py", line 1 in wait', "",
         "Current thread 0x02 (most recent call first):", '  File "task.py", line 9 in loss', '  File "loop.py", line 5 in run']


class Rank:
    def __init__(self, number):
        handle, self.page = new_page()
        os.close(handle)
        self.rank, self.code, self.tail, self.sent = number, None, [], []
        self.process = SimpleNamespace(pid=number)
        self.page[READY], self.page[RESTING] = 1, 0

    def send(self, number):
        self.sent.append(number)
        if number == STACKS:
            self.tail += STACK


class World:
    """Nodes with two ranks each. Messages of a node reach the head; messages of the head reach all other nodes."""

    def __init__(self, monkeypatch, folder, nodes, hang_s=60.0, start_s=None, report_s=None):
        self.now, self.states, self.moved = 1000.0, defaultdict(lambda: "S"), defaultdict(bytes)
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(watchdog, "process_state", lambda pid: self.states[pid])
        monkeypatch.setattr(watchdog, "_io_counters", lambda pid: self.moved[pid])
        plan = SimpleNamespace(hang_s=hang_s, start_s=start_s, report_s=report_s,
                               resources=SimpleNamespace(nodes=nodes, ranks=2 * nodes, device="cpu"))
        self.ranks = [Rank(number) for number in range(2 * nodes)]
        self.inbox = [[] for _ in range(nodes)]
        self.slow = folder / "slow.json"
        self.dogs = [Watchdog(plan, self.ranks[2 * node:2 * node + 2], self.peers(node), node, self.slow)
                     for node in range(nodes)]

    def peers(self, node):
        def send(message):
            for other in range(len(self.inbox)) if node == 0 else [0]:
                if other != node:
                    self.inbox[other].append({**message, "node": node})

        return SimpleNamespace(send=send)

    def pass_s(self, seconds, step=1.0, at_work=()):
        """Let time pass, and return a hang as soon as one is found."""
        end = self.now + seconds
        while self.now < end:
            self.now += step
            for rank in at_work:
                self.ranks[rank].page[BEATS] += 1
            for node, dog in enumerate(self.dogs):
                heard, self.inbox[node] = self.inbox[node], []
                if hang := dog.turn(heard):
                    return hang
        return None


@pytest.fixture
def make_world(monkeypatch, tmp_path):
    return lambda *args, **options: World(monkeypatch, tmp_path, *args, **options)


@pytest.mark.parametrize("nodes", [1, 3])
def test_the_rank_that_all_wait_for_is_found_on_any_node(make_world, nodes):
    world = make_world(nodes)
    for rank in world.ranks:
        rank.page[BEATS], rank.page[STEP] = 101, 10
    last = 2 * nodes - 1
    world.ranks[last].page[BEATS] = 100
    assert world.pass_s(59) is None
    hang = world.pass_s(10)
    assert hang.rank == last and "after step 10: silent for 6" in hang.message
    assert hang.stack.splitlines() == ["Stack (most recent call last):", STACK[5], STACK[4]]
    assert world.now <= 1000 + 60 + STACKS_S + 4 and all(rank.sent == [STACKS, signal.SIGCONT] for rank in world.ranks)


def test_ranks_do_not_hang_while_any_rank_is_at_work(make_world):
    world = make_world(2)
    assert world.pass_s(300, at_work=[3]) is None
    assert world.pass_s(300, at_work=[0]) is None


def test_a_rank_that_saves_is_at_work_while_bytes_move(make_world):
    world = make_world(1)
    world.ranks[0].page[SAVING] = 1
    for count in range(300):
        world.moved[0] = str(count).encode()
        assert world.pass_s(1) is None
    assert world.pass_s(70) is not None


def test_a_rank_that_rests_has_its_own_limit(make_world):
    for start_s, hangs in ((None, False), (600.0, True)):
        world = make_world(1, start_s=start_s)
        world.ranks[1].page[RESTING] = 1
        assert world.pass_s(599) is None
        assert bool(world.pass_s(10)) == hangs


def test_a_report_has_its_own_limit_which_the_error_names(make_world):
    world = make_world(1, start_s=10_000.0, report_s=1800.0)
    for rank in world.ranks:
        rank.page[STEP] = 20
    world.ranks[1].page[RESTING] = REPORT
    world.ranks[0].page[BEATS] = 1  # rank 0 has done its report, and waits for rank 1
    assert world.pass_s(1799) is None
    hang = world.pass_s(10)
    assert hang.rank == 1 and "rank 1 hung after step 20, in its report: silent for 1800 s" in hang.message
    assert hang.hint.endswith("eval.report_s is 1800 s")


def test_a_stopped_rank_hangs_even_while_all_ranks_rest(make_world):
    world = make_world(2)
    for rank in world.ranks:
        rank.page[RESTING] = 1
    world.ranks[2].page[READY] = 0  # the rank has no handler yet: the signal for stacks would end it
    world.states[2] = "T"
    hang = world.pass_s(70, at_work=[0, 1])
    assert hang.rank == 2 and "before its first step was done" in hang.message and "was stopped" in hang.message
    assert world.ranks[2].sent == [signal.SIGCONT] and hang.stack is None


def test_time_during_which_the_supervisor_was_stopped_does_not_count(make_world):
    world = make_world(1)
    world.pass_s(30)
    world.now += 3600  # Ctrl-Z, and fg
    assert world.pass_s(20) is None


def test_ranks_that_continue_at_the_last_moment_do_not_hang(make_world):
    world = make_world(2)
    world.pass_s(58)
    world.dogs[1].turn([])
    world.inbox[0] += [{"hung": "silent", "node": 1}]
    world.dogs[0].hung[0] = "silent"
    world.ranks[0].page[BEATS] += 1
    assert world.pass_s(1) is None and world.pass_s(10, at_work=[0, 1, 2, 3]) is None
    world.ranks[3].page[BEATS] -= 1
    assert world.pass_s(70).rank == 3  # the ranks are still watched


def test_the_head_does_not_wait_long_for_a_node_that_does_not_answer(make_world):
    world = make_world(2)
    world.pass_s(59)
    world.inbox[0].append({"hung": "silent", "node": 1})
    world.dogs.pop()
    began = world.now
    assert world.pass_s(20) and world.now - began <= 3 + STACKS_S + ANSWER_S


def test_a_node_whose_ranks_have_ended_delays_nothing(make_world):
    world = make_world(2)
    world.dogs.pop()
    world.inbox[0].append({"ended": {}, "node": 1})
    assert world.pass_s(64) is not None


def test_without_hang_s_no_hang_is_found(make_world):
    assert make_world(1, hang_s=None).pass_s(10_000, step=100) is None


def sign(rank, beats=10, state="S"):
    return Sign(rank, 5, beats, 60.0, True, state, None)


@pytest.mark.parametrize("signs, rank, reason", [
    ([sign(0), sign(1, 9), sign(2)], 1, "the other ranks wait for it"),
    ([sign(0), sign(1, 9)], 1, "the other rank waits for it"),
    ([sign(0, 9), sign(1, 10, "T")], 1, "was stopped"),
    ([sign(0, 9), sign(1, 10, "D")], 0, "the other rank waits for it"),
    ([sign(0), sign(1), sign(2, 10, "D")], 2, "a disk or a network file system"),
    ([sign(0), sign(1)], 0, "rank 1 is silent at the same place"),
    ([sign(0), sign(1, 11), sign(2), sign(3)], 0, "ranks 2, 3 are silent at the same place"),
    ([sign(0)], 0, "the reason is not known"),
])
def test_which_rank_is_to_blame(signs, rank, reason):
    hang = blamed(signs, Limits(60.0, None, None))
    assert hang.rank == rank and reason in hang.message


def test_a_rank_is_slow_if_it_costs_the_others_time():
    def slow(*work_ms, step_ms=100):
        return [row["rank"] for row in slow_ranks({i: Pace(step_ms / 1000, ms / 1000) for i, ms in enumerate(work_ms)})]

    assert slow(40, 90) == [1] and slow(40, 41, 90, 42) == [2] and slow(90, 40, 40, 90) == [0, 3]
    assert slow(60, 80) == [] and slow(60) == []
    assert slow(1, 8) == []  # eight times the work, but only a small share of the step


def test_a_rank_is_written_after_it_was_slow_twice_and_removed_when_it_is_not(make_world):
    world = make_world(2)

    def steps(slow_ms):
        for rank, ms in zip(world.ranks, (10, 10, slow_ms, 10)):
            rank.page[STEPS] += 100
            rank.page[BEATS] += 100
            rank.page[WALL_NS] += 100 * 60_000_000
            rank.page[WORK_NS] += 100 * ms * 1_000_000
        world.pass_s(6)

    steps(50)
    assert not world.slow.exists()
    steps(50)
    assert read_json(world.slow) == [{"rank": 2, "factor": 5.0, "work_s": 0.05, "others_s": 0.01, "step_s": 0.06}]
    steps(10)
    assert read_json(world.slow) == []
