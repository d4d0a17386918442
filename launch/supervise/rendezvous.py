"""How the node processes of one job find each other and agree: lines of JSON over TCP, all to the head and back.

The head is the process of node 0. It writes where it listens into the job's folder, on storage that all nodes
share, with a token that a newcomer must give. From then on a process that dies is noticed at once, by its
connection, and not by a timeout.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.contract.files import read_json, replace_json, replace_text

MEETING_S = 300.0   # for all to come: modules load slowly on a cluster's file system
CONNECT_S = 5.0
POLL_S = 0.2
ALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}  # gone after a minute without an answer


class Absent(Exception):
    """Not all node processes have come in time."""


@dataclass
class Link:
    """One connection, a word a line."""

    socket: socket.socket
    open: bool = True
    _rest: bytes = b""

    def say(self, word: Mapping[str, Any]) -> None:
        if self.open:
            try:
                self.socket.sendall(json.dumps(word).encode() + b"\n")
            except OSError:
                pass  # the next reading finds it closed

    def leave(self) -> None:
        self.open = False
        self.socket.close()

    def words(self) -> list[dict[str, Any]]:
        """What has come; afterwards `open` says whether more can."""
        while self.open:
            try:
                data = self.socket.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self.open = bool(data)
            self._rest += data
        *whole, self._rest = self._rest.split(b"\n")
        return [json.loads(line) for line in whole]


@dataclass
class NodeGroup:
    """One node process's links to the others: the head has one to each, by node; the others one, to the head."""

    node: int
    address: str               # of the head, as the others have reached it; rank 0's store listens there
    interface: str | None      # of this node, by which it reaches the others, where that is known
    links: dict[int, Link] = field(default_factory=dict)
    said: list[dict[str, Any]] = field(default_factory=list)  # by the others since this attempt began
    _kept: list[dict[str, Any]] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether nobody has gone."""
        return all(link.open for link in self.links.values())

    def sockets(self) -> list[socket.socket]:
        return [link.socket for link in self.links.values() if link.open]

    def tell(self, word: Mapping[str, Any]) -> None:
        for link in self.links.values():
            link.say({**word, "node": self.node})

    def heard(self) -> list[dict[str, Any]]:
        """What the others have said since, in the order in which it came, and {"lost", "node"} for one that has gone.
        The head passes on to the others what concerns all."""
        words, self._kept = self._kept, []
        for node, link in self.links.items():
            if not link.open:
                continue
            found = link.words()
            if not link.open:
                found.append({"lost": True, "node": node})
            for word in found:
                if self.node == 0 and word.keys() & {"failure", "lost", "signal"}:
                    for other, each in self.links.items():
                        if other != node:
                            each.say(word)
            words += found
        self.said += [word for word in words if not word.keys() & {"pace", "hung"}]  # those come all the time
        return words

    def keep(self, words: list[dict[str, Any]]) -> None:
        """Give back what was heard too early: the next `heard` begins with it."""
        self._kept = words

    def close(self) -> None:
        for link in self.links.values():
            link.socket.close()


def meet(folder: Path, name: str, node: int, nodes: int, interface: str | None = None,
         stopped: Callable[[], bool] = lambda: False) -> NodeGroup:
    """Wait for the node processes of all `nodes`, each of which calls this with the same `name`.

    Args:
        folder: shared by all nodes.
        interface: the network interface between nodes; None: whichever works.
        stopped: asked now and then whether to give up.

    Raises:
        Absent: some did not come.
    """
    if nodes == 1:
        return NodeGroup(0, "127.0.0.1", "lo")
    deadline = time.monotonic() + MEETING_S
    file, absent = folder / f"meeting-{name}.json", f"absent-{name}-"

    def given_up() -> bool:
        """Raises: Absent if another node's process has said that it cannot come."""
        # Looking through the folder makes a network file system look anew for what was not there before.
        for path in folder.iterdir():
            if path.name.startswith(absent):
                raise Absent(f"node {path.stem.removeprefix(absent)}: {path.read_text(encoding='utf-8')}")
        return stopped()

    try:
        if node == 0:
            return _gather(file, nodes, interface, deadline, given_up)
        return _come(file, node, interface, deadline, given_up)
    except (Absent, OSError) as error:
        if not stopped() and not any(path.name.startswith(absent) for path in folder.iterdir()):  # the others need not wait
            replace_text(folder / f"{absent}{node}.txt", str(error))
        raise


def _come(file: Path, node: int, interface: str | None, deadline: float, given_up: Callable[[], bool]) -> NodeGroup:
    if interface is not None:
        _addresses(interface)  # it must be there
    while time.monotonic() < deadline and not given_up():
        try:
            there = read_json(file)
        except (OSError, ValueError):
            there = None
        if there and (group := _join(there, node, interface)):
            return group
        time.sleep(POLL_S)
    raise Absent("the head node's process could not be reached")


def _gather(file: Path, nodes: int, interface: str | None, deadline: float, given_up: Callable[[], bool]) -> NodeGroup:
    token = secrets.token_hex(16)
    addresses = _addresses(interface)
    group = NodeGroup(0, addresses[0], interface)
    with closing(socket.socket()) as listening:
        # With one address all come by that; else whichever of them the others can reach.
        listening.bind((addresses[0] if len(addresses) == 1 else "", 0))
        listening.listen(nodes)
        listening.settimeout(POLL_S)
        umask = os.umask(0o077)  # the token is for this user's processes
        try:
            replace_json(file, {"addresses": addresses, "port": listening.getsockname()[1], "token": token})
        finally:
            os.umask(umask)
        while len(group.links) < nodes - 1:
            try:
                if time.monotonic() > deadline or given_up():
                    missing = sorted(set(range(1, nodes)) - set(group.links))
                    raise Absent(f"the process of node {', '.join(map(str, missing))} of {nodes} did not come")
            except Absent:
                group.close()  # those who have come need not wait for the rest
                raise
            try:
                new, _ = listening.accept()
            except TimeoutError:
                continue
            hello = _hello(new)
            if hello is None or hello.get("token") != token or hello.get("node") in group.links:
                new.close()
                continue
            group.links[hello["node"]] = Link(_watched(new))
            group.address = hello["reached"]
            group.interface = interface or _interface(new.getsockname()[0])
    file.unlink(missing_ok=True)
    group.tell({"address": group.address})
    return group


def _watched(link: socket.socket) -> socket.socket:
    """A host that loses power closes no connection: it is asked now and then whether it is there."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ALIVE.items():
        if hasattr(socket, option):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return link


def _hello(new: socket.socket) -> dict[str, Any] | None:
    """A newcomer's first line; anyone may connect, and has one time limit for all of it."""
    deadline, line = time.monotonic() + CONNECT_S, b""
    try:
        while not line.endswith(b"\n") and len(line) < 4096:
            new.settimeout(max(0.001, deadline - time.monotonic()))
            line += new.recv(1) or b"\n"
        new.settimeout(None)
        word = json.loads(line)
        return word if isinstance(word, dict) else None
    except (OSError, ValueError, RecursionError):
        return None


def _join(there: Mapping[str, Any], node: int, interface: str | None) -> NodeGroup | None:
    for address in there["addresses"]:
        try:
            link = socket.create_connection((address, there["port"]), timeout=CONNECT_S)
            link.settimeout(MEETING_S)  # the head answers when all have come
            link.sendall(json.dumps({"token": there["token"], "node": node, "reached": address}).encode() + b"\n")
            word = json.loads(_line(link))
            link.settimeout(None)
        except (OSError, ValueError):
            continue
        return NodeGroup(node, word["address"], interface or _interface(link.getsockname()[0]), {0: Link(_watched(link))})
    return None


def _line(link: socket.socket) -> bytes:
    """Up to the line's end and not a byte more: what follows is for later."""
    line = b""
    while not line.endswith(b"\n"):
        byte = link.recv(1)
        if not byte:
            raise ConnectionError
        line += byte
    return line


def _addresses(interface: str | None) -> list[str]:
    """This host's IPv4 addresses, the likeliest first."""
    import psutil

    by_interface = {name: [a.address for a in found if a.family == socket.AF_INET]
                    for name, found in psutil.net_if_addrs().items()}
    if interface is not None:
        if not by_interface.get(interface):
            raise Absent(f"this host has no interface `{interface}` with an IPv4 address ({', '.join(by_interface)})")
        return by_interface[interface][:1]
    try:
        named = [info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    except OSError:
        named = []
    found = [*named, *(address for addresses in by_interface.values() for address in addresses)]
    if not found:
        raise Absent("this host has no IPv4 address by which other nodes could reach it")
    return sorted(dict.fromkeys(found), key=lambda address: address.startswith("127."))


def _interface(address: str) -> str | None:
    import psutil

    return next((name for name, found in psutil.net_if_addrs().items() if any(a.address == address for a in found)), None)
