"""Watchdogs of several nodes, with ranks, words and a clock that the tests move."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from types import SimpleNamespace

import pytest

from launch.supervise import watchdog
from launch.supervise.watchdog import ANSWER_S, STACKS_S, Pace, Sign, Watchdog, blamed, slow_ranks
from trainers.contract.files import read_json
from trainers.contract.heartbeat import BEATS, READY, RESTING, SAVING, STACKS, STEP, STEPS, WALL_NS, WORK_NS, new_page

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
    """`nodes` of two ranks each; what a node's process says reaches the head, and what that says all."""

    def __init__(self, monkeypatch, folder, nodes, hang_s=60.0, start_s=None):
        self.now, self.states, self.moved = 1000.0, defaultdict(lambda: "S"), defaultdict(bytes)
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(watchdog, "_state", lambda pid: self.states[pid])
        monkeypatch.setattr(watchdog, "_moved", lambda pid: self.moved[pid])
        plan = SimpleNamespace(hang_s=hang_s, start_s=start_s,
                               resources=SimpleNamespace(nodes=nodes, ranks=2 * nodes, device="cpu"))
        self.ranks = [Rank(number) for number in range(2 * nodes)]
        self.inbox = [[] for _ in range(nodes)]
        self.slow = folder / "slow.json"
        self.dogs = [Watchdog(plan, self.ranks[2 * node:2 * node + 2], self.peers(node), node, self.slow)
                     for node in range(nodes)]

    def peers(self, node):
        def tell(word):
            for other in range(len(self.inbox)) if node == 0 else [0]:
                if other != node:
                    self.inbox[other].append({**word, "node": node})

        return SimpleNamespace(tell=tell)

    def pass_s(self, seconds, each=1.0, at_work=()):
        """Let time pass; the hang, if one is found, and when."""
        end = self.now + seconds
        while self.now < end:
            self.now += each
            for rank in at_work:
                self.ranks[rank].page[BEATS] += 1
            for node, dog in enumerate(self.dogs):
                heard, self.inbox[node] = self.inbox[node], []
                if hang := dog.turn(heard):
                    return hang
        return None


@pytest.fixture
def world(monkeypatch, tmp_path):
    return lambda *args, **more: World(monkeypatch, tmp_path, *args, **more)


@pytest.mark.parametrize("nodes", [1, 3])
def test_the_rank_that_all_wait_for_is_found_wherever_it_is(world, nodes):
    there = world(nodes)
    for rank in there.ranks:
        rank.page[BEATS], rank.page[STEP] = 101, 10
    last = 2 * nodes - 1
    there.ranks[last].page[BEATS] = 100
    assert there.pass_s(59) is None
    hang = there.pass_s(10)
    assert hang.rank == last and "after step 10: silent for 6" in hang.message
    assert hang.stack.splitlines() == ["Stack (most recent call last):", STACK[5], STACK[4]]
    assert there.now <= 1000 + 60 + STACKS_S + 4 and all(rank.sent == [STACKS, signal.SIGCONT] for rank in there.ranks)


def test_as_long_as_anybody_goes_on_nobody_hangs(world):
    there = world(2)
    assert there.pass_s(300, at_work=[3]) is None
    assert there.pass_s(300, at_work=[0]) is None


def test_a_save_is_at_work_while_bytes_move(world):
    there = world(1)
    there.ranks[0].page[SAVING] = 1
    for count in range(300):
        there.moved[0] = str(count).encode()
        assert there.pass_s(1) is None
    assert there.pass_s(70) is not None


def test_a_rank_that_rests_has_a_limit_of_its_own(world):
    for start_s, found in ((None, False), (600.0, True)):
        there = world(1, start_s=start_s)
        there.ranks[1].page[RESTING] = 1
        assert there.pass_s(599) is None
        assert bool(there.pass_s(10)) == found


def test_a_stopped_rank_hangs_even_while_it_and_others_rest(world):
    there = world(2)
    for rank in there.ranks:
        rank.page[RESTING] = 1
    there.ranks[2].page[READY] = 0  # the signal for stacks would end it
    there.states[2] = "T"
    hang = there.pass_s(70, at_work=[0, 1])
    assert hang.rank == 2 and "before its first step was done" in hang.message and "was stopped" in hang.message
    assert there.ranks[2].sent == [signal.SIGCONT] and hang.stack is None


def test_the_time_that_this_process_was_stopped_does_not_count(world):
    there = world(1)
    there.pass_s(30)
    there.now += 3600  # Ctrl-Z, and fg
    assert there.pass_s(20) is None


def test_ranks_that_go_on_at_the_last_moment_do_not_hang(world):
    there = world(2)
    there.pass_s(58)
    there.dogs[1].turn([])
    there.inbox[0] += [{"hung": "silent", "node": 1}]
    there.dogs[0].hung[0] = "silent"
    there.ranks[0].page[BEATS] += 1
    assert there.pass_s(1) is None and there.pass_s(10, at_work=[0, 1, 2, 3]) is None
    there.ranks[3].page[BEATS] -= 1
    assert there.pass_s(70).rank == 3  # and are still watched


def test_a_node_that_does_not_answer_is_not_waited_for_long(world):
    there = world(2)
    there.pass_s(59)
    there.inbox[0].append({"hung": "silent", "node": 1})
    there.dogs.pop()
    began = there.now
    assert there.pass_s(20) and there.now - began <= 3 + STACKS_S + ANSWER_S


def test_a_node_whose_ranks_have_ended_holds_nothing_up(world):
    there = world(2)
    there.dogs.pop()
    there.inbox[0].append({"ended": {}, "node": 1})
    assert there.pass_s(64) is not None


def test_off(world):
    assert world(1, hang_s=None).pass_s(10_000, each=100) is None


def sign(rank, beats=10, state="S"):
    return Sign(rank, 5, beats, 60.0, True, state, None)


@pytest.mark.parametrize("signs, rank, words", [
    ([sign(0), sign(1, 9), sign(2)], 1, "the other ranks wait for it"),
    ([sign(0), sign(1, 9)], 1, "the other rank waits for it"),
    ([sign(0, 9), sign(1, 10, "T")], 1, "was stopped"),
    ([sign(0, 9), sign(1, 10, "D")], 0, "the other rank waits for it"),
    ([sign(0), sign(1), sign(2, 10, "D")], 2, "a disk or a network file system"),
    ([sign(0), sign(1)], 0, "so were rank 1, at the same place"),
    ([sign(0), sign(1, 11), sign(2), sign(3)], 0, "so were ranks 2, 3, at the same place"),
    ([sign(0)], 0, "nothing is known of why"),
])
def test_who_is_to_blame(signs, rank, words):
    hang = blamed(signs, 60.0)
    assert hang.rank == rank and words in hang.message


def test_a_rank_is_slow_by_what_it_costs_the_others():
    def slow(*work_ms, step_ms=100):
        return [row["rank"] for row in slow_ranks({i: Pace(step_ms / 1000, ms / 1000) for i, ms in enumerate(work_ms)})]

    assert slow(40, 90) == [1] and slow(40, 41, 90, 42) == [2] and slow(90, 40, 40, 90) == [0, 3]
    assert slow(60, 80) == [] and slow(60) == []
    assert slow(1, 8) == []  # eight times as much, of hardly anything


def test_slow_ranks_are_written_once_they_have_been_slow_twice_and_struck_out(world):
    there = world(2)

    def steps(slow_ms):
        for rank, ms in zip(there.ranks, (10, 10, slow_ms, 10)):
            rank.page[STEPS] += 100
            rank.page[BEATS] += 100
            rank.page[WALL_NS] += 100 * 60_000_000
            rank.page[WORK_NS] += 100 * ms * 1_000_000
        there.pass_s(6)

    steps(50)
    assert not there.slow.exists()
    steps(50)
    assert read_json(there.slow) == [{"rank": 2, "factor": 5.0, "work_s": 0.05, "others_s": 0.01, "step_s": 0.06}]
    steps(10)
    assert read_json(there.slow) == []
