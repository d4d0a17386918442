from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from trainers.contract import heartbeat
from trainers.contract.heartbeat import (
    BEATS,
    DATA_NS,
    READY,
    RESTING,
    SAVING,
    STACKS,
    STEP,
    STEPS,
    VARIABLE,
    WALL_NS,
    WORK_NS,
    new_page,
)


@pytest.fixture
def page(monkeypatch):
    number, page = new_page()
    os.close(number)
    monkeypatch.setattr(heartbeat, "_page", page)
    monkeypatch.setattr(heartbeat, "_known", set())
    return page


def test_a_rank_rests_until_its_first_step_and_first_batch_of_an_evaluation_are_done(page):
    resting = []
    for call in (heartbeat.step_begins, heartbeat.batch_begins, heartbeat.batch_ends, lambda: heartbeat.step_ends(7),
                 lambda: heartbeat.beat("evaluation"), lambda: heartbeat.done("evaluation"), heartbeat.beat,
                 heartbeat.rest, heartbeat.beat):
        call()
        resting.append(bool(page[RESTING]))
    assert resting == [True, True, True, False, True, False, False, True, False]
    assert (page[STEP], page[STEPS], page[BEATS]) == (7, 1, 8)


def test_making_batches_is_work_and_waiting_for_others_is_not(page):
    heartbeat.step_begins()
    heartbeat.batch_begins()
    time.sleep(0.1)
    heartbeat.batch_ends()
    time.sleep(0.1)  # like waiting in a collective
    end = time.thread_time() + 0.05
    while time.thread_time() < end:
        pass
    heartbeat.step_ends(1)
    wall_s, work_s, data_s = (page[field] / 1e9 for field in (WALL_NS, WORK_NS, DATA_NS))
    assert 0.1 <= data_s < work_s and 0.15 <= work_s <= wall_s - 0.09 and wall_s >= 0.25


def test_saving_is_noted_while_it_runs(page):
    @heartbeat.saving()
    def write():
        assert page[SAVING] == 1
        raise OSError

    for _ in range(2):
        with pytest.raises(OSError):
            write()
        assert page[SAVING] == 0


def test_another_process_sees_the_steps_and_can_ask_for_stacks():
    number, page = new_page()
    code = ("import os, time\nfrom trainers.contract import heartbeat as h\nh.start()\nassert h.VARIABLE not in os.environ\n"
            "def sleeps():\n h.step_ends(3)\n time.sleep(60)\nsleeps()")
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, VARIABLE: str(number)}, pass_fds=(number,),
                               stderr=subprocess.PIPE, text=True)
    os.close(number)
    try:
        end = time.monotonic() + 10
        while page[STEP] != 3 and time.monotonic() < end:
            time.sleep(0.01)
        assert (page[STEP], page[READY]) == (3, 1)
        process.send_signal(STACKS)
        assert "(most recent call first)" in process.stderr.readline() and "in sleeps" in process.stderr.readline()
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_beats_work_without_a_node_process(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    heartbeat.start()
    heartbeat.beat()
    heartbeat.step_begins()
    heartbeat.step_ends(1)
