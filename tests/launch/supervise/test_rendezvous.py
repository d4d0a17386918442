"""Node processes that meet over loopback: threads, and a process where one must be killed."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import wait_until

from launch.supervise import rendezvous as meetings
from launch.supervise.rendezvous import Absent, Link, NodeGroup, meet


@pytest.fixture
def come(tmp_path: Path):
    """Lets the processes of some nodes come to a meeting: `come(nodes of it, in all)`, a future for each."""
    gangs, pool = [], ThreadPoolExecutor()

    def start(present, nodes, **more):
        gangs.extend(pool.submit(meet, tmp_path, "101-0", node, nodes, **{"interface": "lo", **more}) for node in present)
        return gangs[-len(present):]

    yield start
    pool.shutdown()
    for group in gangs:
        if not group.exception():
            group.result().close()


@pytest.fixture
def four(come) -> list[NodeGroup]:
    return [group.result(timeout=60) for group in come(range(4), 4)]


def hear(group: NodeGroup, count: int) -> list[dict]:
    """The next so many words."""
    words: list[dict] = []

    def heard():
        select.select(group.sockets(), [], [], 0.1)
        words.extend(group.heard())
        return len(words) >= count

    wait_until(heard)
    assert len(words) == count, words
    return words


def meeting(folder: Path) -> dict:
    """What the head has written for those who come; it is nobody else's to read."""
    file = folder / "meeting-101-0.json"
    wait_until(lambda: file.exists() and file.stat().st_mode & 0o777 == 0o600)
    return json.loads(file.read_text())


def test_all_come(four, tmp_path):
    head, *others = four
    assert sorted(head.links) == [1, 2, 3] and all(list(other.links) == [0] for other in others)
    assert {(group.address, group.interface, group.whole) for group in four} == {("127.0.0.1", "lo", True)}
    assert [group.node for group in four] == [0, 1, 2, 3] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("interface", ["lo", None])
def test_they_find_each_other_without_being_told_the_interface(come, interface):
    head, other = (group.result(timeout=60) for group in come([0, 1], 2, interface=interface))
    assert head.address == other.address and head.interface == other.interface is not None
    with socket.create_server((head.address, 0)) as store:  # rank 0's store listens there
        socket.create_connection(store.getsockname()[:2], timeout=60).close()


def test_an_unknown_interface_is_said_at_once(come):
    (head,) = come([0], 2, interface="ib7")
    with pytest.raises(Absent, match=r"no interface `ib7` .*\(.*\blo\b.*\)"):
        head.result(timeout=60)


def test_one_node_is_alone(tmp_path):
    group = meet(tmp_path, "101-0", 0, 1)
    assert group.address == "127.0.0.1" and group.whole and group.links == {} and group.heard() == []


def test_one_that_does_not_come(come, monkeypatch):
    monkeypatch.setattr(meetings, "MEETING_S", 0.5)
    began = time.monotonic()
    head, other = come([0, 2], 4)
    with pytest.raises(Absent, match="the process of node 1, 3 of 4 did not come"):
        head.result(timeout=60)
    with pytest.raises(Absent, match="the head node's process could not be reached"):
        other.result(timeout=60)
    assert time.monotonic() - began < 60


def test_a_head_that_does_not_come(come, monkeypatch):
    monkeypatch.setattr(meetings, "MEETING_S", 0.5)
    (other,) = come([1], 2)
    with pytest.raises(Absent, match="could not be reached"):
        other.result(timeout=60)


def test_who_is_stopped_waits_no_longer(come):
    began = time.monotonic()
    for group in come([0, 1], 3, stopped=lambda: time.monotonic() > began + 0.3):
        with pytest.raises(Absent):
            group.result(timeout=60)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("said", [b'{"token": "a guess", "node": 1, "reached": "127.0.0.1"}\n', b'{"node": 1}\n', b"[1]\n",
                                  b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b"x" * 5000, b""])
def test_a_stranger_is_turned_away(come, tmp_path, said):
    (head,) = come([0], 2)
    with socket.create_connection(("127.0.0.1", meeting(tmp_path)["port"]), timeout=60) as stranger:
        stranger.sendall(said)
        if said == b"":
            stranger.shutdown(socket.SHUT_WR)
        try:
            assert stranger.recv(100) == b""
        except ConnectionResetError:  # it was closed with what was said unread
            pass
    assert not head.done()
    (other,) = come([1], 2)
    assert list(head.result(timeout=60).links) == [1] and other.result(timeout=60).whole


def test_a_silent_stranger_does_not_hold_up_the_rest_for_long(come, tmp_path, monkeypatch):
    monkeypatch.setattr(meetings, "CONNECT_S", 0.5)
    (head,) = come([0], 2)
    with socket.create_connection(("127.0.0.1", meeting(tmp_path)["port"]), timeout=60):
        (other,) = come([1], 2)
        assert head.result(timeout=60).whole and other.result(timeout=60).whole


def test_a_second_of_the_same_number_is_turned_away(come, tmp_path):
    head, first = come([0, 1], 3)
    there = meeting(tmp_path)
    wait_until(lambda: established(there["port"]) >= 1)
    with socket.create_connection(("127.0.0.1", there["port"]), timeout=60) as second:
        second.sendall(json.dumps({"token": there["token"], "node": 1, "reached": "127.0.0.1"}).encode() + b"\n")
        assert second.recv(100) == b""
    (last,) = come([2], 3)
    assert sorted(head.result(timeout=60).links) == [1, 2] and first.result(timeout=60).whole and last.result(timeout=60).whole


def established(port: int) -> int:
    """Connections to a port of this host that are open."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


def test_words_come_whole_and_in_order(four):
    head, *others = four
    said = [{"number": number, "text": "two\nlines, 中文 " + "x" * 10 ** (number % 5)} for number in range(60)]
    for word in said:
        head.tell(word)
        for other in others:
            other.tell(word)
    for other in others:
        assert hear(other, 60) == [{**word, "node": 0} for word in said]
    heard = hear(head, 180)
    for node in (1, 2, 3):
        assert [word for word in heard if word["node"] == node] == [{**word, "node": node} for word in said]
    assert head.said == heard


def test_a_word_of_a_mebibyte(four):
    text = "x" * 2**20
    with ThreadPoolExecutor() as pool:
        saying = pool.submit(four[2].tell, {"failure": {"traceback": text}})
        (word,) = hear(four[0], 1)
        saying.result(timeout=60)
    assert word == {"failure": {"traceback": text}, "node": 2}


def test_words_in_pieces():
    ours, theirs = socket.socketpair()
    link = Link(ours)
    theirs.sendall(b'{"a": 1}\n{"b"')
    assert link.words() == [{"a": 1}] and link.open
    theirs.sendall(b': "\xe4\xb8')
    assert link.words() == []
    theirs.sendall(b'\xad"}\n{"never')
    assert link.words() == [{"b": "中"}]
    theirs.close()
    assert link.words() == [] and not link.open
    link.say({"c": 2})  # to nobody: no error
    ours.close()


def test_what_concerns_all_is_passed_on(four):
    head, first, second, third = four
    for word in ({"failure": {"rank": 2}}, {"signal": 12}, {"ended": "for the head alone"}):
        first.tell(word)
    assert [word["node"] for word in hear(head, 3)] == [1, 1, 1]
    for other in (second, third):
        assert hear(other, 2) == [{"failure": {"rank": 2}, "node": 1}, {"signal": 12, "node": 1}]
    assert first.heard() == []


def test_what_was_heard_too_early_comes_again(four):
    head, other, *_ = four
    for number in range(3):
        head.tell({"number": number})
    words = hear(other, 3)
    other.keep(words[1:])
    head.tell({"number": 3})
    assert [word["number"] for word in hear(other, 3)] == [1, 2, 3]
    assert other.heard() == []


def test_a_death_is_heard_by_all(four):
    head, first, second, third = four
    second.tell({"ended": 1})
    second.close()
    assert hear(head, 2) == [{"ended": 1, "node": 2}, {"lost": True, "node": 2}]
    assert not head.whole and [node for node, link in head.links.items() if not link.open] == [2]
    for other in (first, third):
        assert hear(other, 1) == [{"lost": True, "node": 2}] and other.whole
    head.tell({"begin": 2})  # who is left still hears
    assert hear(first, 1) == hear(third, 1) == [{"begin": 2, "node": 0}]
    head.close()
    assert hear(first, 1) == [{"lost": True, "node": 0}] and not first.whole and first.sockets() == []


def test_a_killed_process_is_heard_at_once(come, tmp_path):
    (head,) = come([0], 2)
    program = "import sys, time\nfrom pathlib import Path\nfrom launch.supervise.rendezvous import meet\n" \
              "group = meet(Path(sys.argv[1]), '101-0', 1, 2, 'lo')\nprint('here', flush=True)\ntime.sleep(60)\n"
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "here\n"
        group = head.result(timeout=60)
        assert group.heard() == []
        os.kill(process.pid, signal.SIGKILL)
        began = time.monotonic()
        assert hear(group, 1) == [{"lost": True, "node": 1}] and time.monotonic() - began < 20
