"""Node processes that connect over loopback. They are threads, or a process where the test must kill one."""

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

from launch.supervise import group as group_module
from launch.supervise import rendezvous
from launch.supervise.group import Link, NodeGroup
from launch.supervise.rendezvous import NotConnected, meet


@pytest.fixture
def start(tmp_path: Path):
    """A function that starts node processes: `start(their numbers, number of all nodes)` returns a future for each."""
    futures, pool = [], ThreadPoolExecutor()

    def start(numbers, nodes, **options):
        futures.extend(pool.submit(meet, tmp_path, "101-0", node, nodes, **{"interface": "lo", **options}) for node in numbers)
        return futures[-len(numbers):]

    yield start
    pool.shutdown()
    for future in futures:
        if not future.exception():
            future.result().close()


@pytest.fixture
def four(start) -> list[NodeGroup]:
    return [future.result(timeout=60) for future in start(range(4), 4)]


def hear(group: NodeGroup, count: int) -> list[dict]:
    """Wait for the next `count` messages and return them."""
    messages: list[dict] = []

    def enough():
        select.select(group.sockets(), [], [], 0.1)
        messages.extend(group.receive())
        return len(messages) >= count

    wait_until(enough)
    assert len(messages) == count, messages
    return messages


def meeting(folder: Path) -> dict:
    """Return what the head has written for the other nodes. No other user may read the file."""
    file = folder / "meeting-101-0.json"
    wait_until(lambda: file.exists() and file.stat().st_mode & 0o777 == 0o600)
    return json.loads(file.read_text())


def test_all_nodes_connect(four, tmp_path):
    head, *others = four
    assert sorted(head.links) == [1, 2, 3] and all(list(other.links) == [0] for other in others)
    assert {(group.address, group.interface, group.complete) for group in four} == {("127.0.0.1", "lo", True)}
    assert [group.node for group in four] == [0, 1, 2, 3] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("interface", ["lo", None])
def test_nodes_find_each_other_with_and_without_a_given_interface(start, interface):
    head, other = (future.result(timeout=60) for future in start([0, 1], 2, interface=interface))
    assert head.address == other.address and head.interface == other.interface is not None
    with socket.create_server((head.address, 0)) as store:  # rank 0's store listens there
        socket.create_connection(store.getsockname()[:2], timeout=60).close()


def test_an_unknown_interface_is_reported_at_once(start):
    (head,) = start([0], 2, interface="ib7")
    with pytest.raises(NotConnected, match=r"no interface `ib7` .*\(.*\blo\b.*\)"):
        head.result(timeout=60)


def test_a_job_on_one_node_needs_no_connection(tmp_path):
    group = meet(tmp_path, "101-0", 0, 1)
    assert group.address == "127.0.0.1" and group.complete and group.links == {} and group.receive() == []


def test_a_node_that_does_not_connect(start, monkeypatch):
    monkeypatch.setattr(rendezvous, "MEETING_S", 0.5)
    began = time.monotonic()
    head, other = start([0, 2], 4)
    with pytest.raises(NotConnected, match="the process of node 1, 3 of 4 did not come"):
        head.result(timeout=60)
    with pytest.raises(NotConnected, match="the head node's process could not be reached"):
        other.result(timeout=60)
    assert time.monotonic() - began < 60


def test_a_head_that_does_not_start(start, monkeypatch):
    monkeypatch.setattr(rendezvous, "MEETING_S", 0.5)
    (other,) = start([1], 2)
    with pytest.raises(NotConnected, match="could not be reached"):
        other.result(timeout=60)


def test_a_stopped_process_does_not_wait(start):
    began = time.monotonic()
    for future in start([0, 1], 3, stopped=lambda: time.monotonic() > began + 0.3):
        with pytest.raises(NotConnected):
            future.result(timeout=60)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("data", [b'{"token": "a guess", "node": 1, "reached": "127.0.0.1"}\n', b'{"node": 1}\n', b"[1]\n",
                                  b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b"x" * 5000, b""])
def test_a_connection_without_the_token_is_refused(start, tmp_path, data):
    (head,) = start([0], 2)
    with socket.create_connection(("127.0.0.1", meeting(tmp_path)["port"]), timeout=60) as stranger:
        stranger.sendall(data)
        if data == b"":
            stranger.shutdown(socket.SHUT_WR)
        try:
            assert stranger.recv(100) == b""
        except ConnectionResetError:  # the head closed the connection before it had read all data
            pass
    assert not head.done()
    (other,) = start([1], 2)
    assert list(head.result(timeout=60).links) == [1] and other.result(timeout=60).complete


def test_a_connection_that_sends_nothing_delays_the_others_only_shortly(start, tmp_path, monkeypatch):
    monkeypatch.setattr(rendezvous, "CONNECT_S", 0.5)
    (head,) = start([0], 2)
    with socket.create_connection(("127.0.0.1", meeting(tmp_path)["port"]), timeout=60):
        (other,) = start([1], 2)
        assert head.result(timeout=60).complete and other.result(timeout=60).complete


@pytest.mark.parametrize("hello", [{}, {"node": 1}, {"node": 0, "reached": "127.0.0.1"}, {"node": 2, "reached": "127.0.0.1"},
                                   {"node": [1], "reached": "127.0.0.1"}, {"node": 1, "reached": "elsewhere"}])
def test_a_connection_with_the_token_and_without_the_rest_is_refused(start, tmp_path, hello):
    (head,) = start([0], 2)
    written = meeting(tmp_path)
    with socket.create_connection(("127.0.0.1", written["port"]), timeout=60) as other:
        other.sendall(json.dumps({"token": written["token"], **hello}).encode() + b"\n")
        assert other.recv(100) == b""
    (other,) = start([1], 2)
    assert list(head.result(timeout=60).links) == [1] and other.result(timeout=60).complete


def test_a_second_process_with_the_same_node_number_is_refused(start, tmp_path):
    head, first = start([0, 1], 3)
    written = meeting(tmp_path)
    wait_until(lambda: established(written["port"]) >= 1)
    with socket.create_connection(("127.0.0.1", written["port"]), timeout=60) as second:
        second.sendall(json.dumps({"token": written["token"], "node": 1, "reached": "127.0.0.1"}).encode() + b"\n")
        assert second.recv(100) == b""
    (last,) = start([2], 3)
    assert sorted(head.result(timeout=60).links) == [1, 2]
    assert first.result(timeout=60).complete and last.result(timeout=60).complete


def established(port: int) -> int:
    """Return the number of open connections to a port of this host."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


def test_messages_arrive_whole_and_in_order(four):
    head, *others = four
    messages = [{"number": number, "text": "two\nlines, 中文 " + "x" * 10 ** (number % 5)} for number in range(60)]
    for message in messages:
        head.send(message)
        for other in others:
            other.send(message)
    for other in others:
        assert hear(other, 60) == [{**message, "node": 0} for message in messages]
    heard = hear(head, 180)
    for node in (1, 2, 3):
        assert [message for message in heard if message["node"] == node] == [{**message, "node": node} for message in messages]
    assert head.received == heard


def test_a_message_of_a_mebibyte(four):
    text = "x" * 2**20
    with ThreadPoolExecutor() as pool:
        sending = pool.submit(four[2].send, {"failure": {"traceback": text}})
        (message,) = hear(four[0], 1)
        sending.result(timeout=60)
    assert message == {"failure": {"traceback": text}, "node": 2}


def test_messages_that_arrive_in_pieces():
    ours, theirs = socket.socketpair()
    link = Link(ours)
    theirs.sendall(b'{"a": 1}\n{"b"')
    assert link.receive() == [{"a": 1}] and link.open
    theirs.sendall(b': "\xe4\xb8')
    assert link.receive() == []
    theirs.sendall(b'\xad"}\n{"never')
    assert link.receive() == [{"b": "中"}]
    theirs.close()
    assert link.receive() == [] and not link.open
    link.send({"c": 2})  # nobody is left to receive it: no error
    ours.close()


def test_the_head_forwards_failures_and_signals_only(four):
    head, first, second, third = four
    for message in ({"failure": {"rank": 2}}, {"signal": 12}, {"ended": "only for the head"}):
        first.send(message)
    assert [message["node"] for message in hear(head, 3)] == [1, 1, 1]
    for other in (second, third):
        assert hear(other, 2) == [{"failure": {"rank": 2}, "node": 1}, {"signal": 12, "node": 1}]
    assert first.receive() == []


def test_messages_that_were_put_back_are_heard_again(four):
    head, other, *_ = four
    for number in range(3):
        head.send({"number": number})
    messages = hear(other, 3)
    other.put_back(messages[1:])
    head.send({"number": 3})
    assert [message["number"] for message in hear(other, 3)] == [1, 2, 3]
    assert other.receive() == []


def test_all_nodes_learn_that_one_is_lost(four):
    head, first, second, third = four
    second.send({"ended": 1})
    second.close()
    assert hear(head, 2) == [{"ended": 1, "node": 2}, {"lost": True, "node": 2}]
    assert not head.complete and [node for node, link in head.links.items() if not link.open] == [2]
    for other in (first, third):
        assert hear(other, 1) == [{"lost": True, "node": 2}] and other.complete
    head.send({"begin": 2})  # the remaining nodes still receive messages
    assert hear(first, 1) == hear(third, 1) == [{"begin": 2, "node": 0}]
    head.close()
    assert hear(first, 1) == [{"lost": True, "node": 0}] and not first.complete and first.sockets() == []


def test_a_killed_process_is_noticed_at_once(start, tmp_path):
    (head,) = start([0], 2)
    program = "import sys, time\nfrom pathlib import Path\nfrom launch.supervise.rendezvous import meet\n" \
              "group = meet(Path(sys.argv[1]), '101-0', 1, 2, 'lo')\nprint('connected', flush=True)\ntime.sleep(60)\n"
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "connected\n"
        group = head.result(timeout=60)
        assert group.receive() == []
        os.kill(process.pid, signal.SIGKILL)
        began = time.monotonic()
        assert hear(group, 1) == [{"lost": True, "node": 1}] and time.monotonic() - began < 20


def test_a_process_that_sends_nothing_is_lost_after_a_limit_and_one_that_is_alive_is_not(four, monkeypatch):
    """Three of the four processes call `receive` as always; the fourth is stopped, and its connection stays open."""
    monkeypatch.setattr(group_module, "BEAT_S", 0.05)
    head, *others = four
    for group in four:
        group.silence_s = 0.6
    began, heard = time.monotonic(), [[], []]
    while not all(heard):
        assert time.monotonic() - began < 30
        head.receive()
        for messages, other in zip(heard, others):
            messages += other.receive()
        time.sleep(0.02)
    assert heard == [[{"lost": True, "node": 3}]] * 2
    assert [(link.open, link.silent) for link in map(head.links.get, (1, 2, 3))] == [
        (True, False), (True, False), (False, True)]


def test_time_in_which_this_process_itself_was_stopped_is_no_silence(four, monkeypatch):
    monkeypatch.setattr(group_module, "LOOK_S", 0.05)
    head, other, *_ = four
    head.silence_s = 0.3
    head.receive()
    time.sleep(0.6)
    assert head.receive() == [] and head.complete


def test_a_process_waits_for_its_head_as_long_as_the_folder_cannot_be_written(start, tmp_path, monkeypatch):
    """The head itself waits until it can write its address."""
    monkeypatch.setattr(rendezvous, "MEETING_S", 1.0)
    monkeypatch.setattr(rendezvous, "PROBE_S", 0.1)
    full = True
    monkeypatch.setattr(rendezvous, "_writable", lambda folder: not full)
    (other,) = start([1], 2)
    time.sleep(2.0)
    assert not other.done()
    full = False
    with pytest.raises(NotConnected, match="could not be reached"):
        other.result(timeout=60)
