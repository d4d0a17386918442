"""The connections between the node processes of one job: lines of JSON over TCP, between the head and every other node.

The head is the process of node 0. It writes the address on which it listens, and a secret token, into the job's folder,
on storage that all nodes share. A process that connects must send the token. From then on, the death of a process is
noticed at once, by its closed connection, and not after a timeout.
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

MEETING_S = 300.0   # until all node processes must be connected: modules load slowly from a cluster's file system
CONNECT_S = 5.0
POLL_S = 0.2
HELLO_BYTES = 4096  # the longest first line of a connection
KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}  # a host is lost after a minute without an answer


class NotConnected(Exception):
    """Not all node processes have connected."""


@dataclass
class Link:
    """One connection; each message is one line."""

    socket: socket.socket
    open: bool = True
    _partial: bytes = b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message. To a closed connection, send nothing."""
        if self.open:
            try:
                self.socket.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                pass  # the next `receive` finds the connection closed

    def close(self) -> None:
        """Close the connection from this side."""
        self.open = False
        self.socket.close()

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived. Afterwards, `open` tells whether more can arrive."""
        while self.open:
            try:
                data = self.socket.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self.open = bool(data)
            self._partial += data
        *lines, self._partial = self._partial.split(b"\n")
        return [json.loads(line) for line in lines]


@dataclass
class NodeGroup:
    """The connected node processes of one job, as one of them sees the others.

    The head has a link to each other node. Each other node has one link, to the head.
    """

    node: int                  # this process's node; 0 is the head
    address: str               # the head's address, as the other nodes reach it; rank 0's store listens there
    interface: str | None      # this node's network interface to the other nodes; None: not known
    links: dict[int, Link] = field(default_factory=dict)       # by node
    received: list[dict[str, Any]] = field(default_factory=list)   # the other nodes' messages since this attempt began
    _kept: list[dict[str, Any]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether all links are still open."""
        return all(link.open for link in self.links.values())

    def sockets(self) -> list[socket.socket]:
        """Return the sockets on which messages of the other nodes arrive."""
        return [link.socket for link in self.links.values() if link.open]

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message over all links: from the head to all nodes, from another node to the head."""
        for link in self.links.values():
            link.send({**message, "node": self.node})

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived since the last call; the messages of one node are in order.

        A node process that is gone adds {"lost": True, "node": its node}. The head forwards failures, signals and losses to
        the other nodes.
        """
        messages, self._kept = self._kept, []
        for node, link in self.links.items():
            if not link.open:
                continue
            arrived = link.receive()
            if not link.open:
                arrived.append({"lost": True, "node": node})
            for message in arrived:
                if self.node == 0 and message.keys() & {"failure", "lost", "signal"}:
                    for other, other_link in self.links.items():
                        if other != node:
                            other_link.send(message)
            messages += arrived
        # "pace" and "hung" messages arrive all the time, and nobody needs them later.
        self.received += [message for message in messages if not message.keys() & {"pace", "hung"}]
        return messages

    def put_back(self, messages: list[dict[str, Any]]) -> None:
        """Put back messages that arrived too early. The next call of `receive` returns them first."""
        self._kept = messages

    def close(self) -> None:
        for link in self.links.values():
            link.socket.close()


def meet(folder: Path, name: str, node: int, nodes: int, interface: str | None = None,
         stopped: Callable[[], bool] = lambda: False) -> NodeGroup:
    """Connect the node processes of all `nodes` nodes. Each of them calls this function, with the same `name`.

    Args:
        folder: a folder that all nodes share.
        name: names this meeting: the job, and how often the job was restarted.
        node: the number of this node, from 0.
        interface: the network interface between nodes; None: any that works.
        stopped: is called again and again; True stops the waiting.

    Raises:
        NotConnected: a node process did not connect in time, could not connect, or the waiting was stopped.
        OSError: the folder could not be read or written.
    """
    if nodes == 1:
        return NodeGroup(0, "127.0.0.1", "lo")
    deadline = time.monotonic() + MEETING_S
    file, absent = folder / f"meeting-{name}.json", f"absent-{name}-"

    def given_up() -> bool:
        """Return whether to stop waiting. Raises: NotConnected if another node process has reported that it cannot connect."""
        # Listing the folder makes a network file system look again for files that did not exist before.
        for path in folder.iterdir():
            if path.name.startswith(absent):
                raise NotConnected(f"node {path.stem.removeprefix(absent)}: {path.read_text(encoding='utf-8')}")
        return stopped()

    try:
        if node == 0:
            return _accept_all(file, nodes, interface, deadline, given_up)
        return _connect(file, node, interface, deadline, given_up)
    except (NotConnected, OSError) as error:
        if not stopped() and not any(path.name.startswith(absent) for path in folder.iterdir()):
            replace_text(folder / f"{absent}{node}.txt", str(error))  # the other nodes need not wait until the deadline
        raise


def _connect(file: Path, node: int, interface: str | None, deadline: float, given_up: Callable[[], bool]) -> NodeGroup:
    """Connect to the head, on any other node."""
    if interface is not None:
        _addresses(interface)  # raises NotConnected at once if this host does not have the interface
    while time.monotonic() < deadline and not given_up():
        try:
            meeting = read_json(file)
        except (OSError, ValueError):
            meeting = None
        if meeting and (group := _join(meeting, node, interface)):
            return group
        time.sleep(POLL_S)
    raise NotConnected("the head node's process could not be reached")


def _accept_all(file: Path, nodes: int, interface: str | None, deadline: float, given_up: Callable[[], bool]) -> NodeGroup:
    """Wait for the connections of all other nodes, on the head."""
    token = secrets.token_hex(16)
    addresses = _addresses(interface)
    group = NodeGroup(0, addresses[0], interface)
    with closing(socket.socket()) as listener:
        # With several addresses, listen on all of them: other nodes may reach only some.
        listener.bind((addresses[0] if len(addresses) == 1 else "", 0))
        listener.listen(nodes)
        listener.settimeout(POLL_S)
        umask = os.umask(0o077)  # only this user may read the token
        try:
            replace_json(file, {"addresses": addresses, "port": listener.getsockname()[1], "token": token})
        finally:
            os.umask(umask)
        while missing := [other for other in range(1, nodes) if other not in group.links]:
            try:
                if time.monotonic() > deadline or given_up():
                    raise NotConnected(f"the process of node {', '.join(map(str, missing))} of {nodes} did not come")
            except NotConnected:
                group.close()  # the connected nodes then stop waiting too
                raise
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            hello = _read_hello(connection)
            if hello is None or not (hello.get("token") == token and hello.get("node") in missing
                                     and hello.get("reached") in addresses):
                connection.close()
                continue
            group.links[hello["node"]] = Link(_keep_alive(connection))
            group.address = hello["reached"]
            group.interface = interface or _interface(connection.getsockname()[0])
    file.unlink(missing_ok=True)
    group.send({"address": group.address})
    return group


def _keep_alive(connection: socket.socket) -> socket.socket:
    """Let the kernel check the other host regularly: a host that loses power closes no connection."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return connection


def _read_hello(connection: socket.socket) -> dict[str, Any] | None:
    """Return the first message of a new connection; None if there is none within CONNECT_S.

    Anyone may connect, so the time and the length of the whole line are limited.
    """
    deadline, line = time.monotonic() + CONNECT_S, b""
    try:
        while not line.endswith(b"\n") and len(line) < HELLO_BYTES:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            line += connection.recv(1) or b"\n"
        connection.settimeout(None)
        message = json.loads(line)
        return message if isinstance(message, dict) else None
    except (OSError, ValueError, RecursionError):
        return None


def _join(meeting: Mapping[str, Any], node: int, interface: str | None) -> NodeGroup | None:
    """Connect to the first of the head's addresses that answers; None if none does."""
    for address in meeting["addresses"]:
        try:
            connection = socket.create_connection((address, meeting["port"]), timeout=CONNECT_S)
            connection.settimeout(MEETING_S)  # the head answers when all nodes are connected
            hello = {"token": meeting["token"], "node": node, "reached": address}
            connection.sendall(json.dumps(hello).encode() + b"\n")
            answer = json.loads(_read_line(connection))
            connection.settimeout(None)
        except (OSError, ValueError):
            continue
        interface = interface or _interface(connection.getsockname()[0])
        return NodeGroup(node, answer["address"], interface, {0: Link(_keep_alive(connection))})
    return None


def _read_line(connection: socket.socket) -> bytes:
    """Read one line and no byte more: the bytes after the line belong to later messages."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            raise ConnectionError
        line += byte
    return line


def _addresses(interface: str | None) -> list[str]:
    """Return this host's IPv4 addresses, or only the interface's; other nodes most likely reach the first."""
    import psutil

    by_interface = {name: [entry.address for entry in entries if entry.family == socket.AF_INET]
                    for name, entries in psutil.net_if_addrs().items()}
    if interface is not None:
        if not by_interface.get(interface):
            raise NotConnected(f"this host has no interface `{interface}` with an IPv4 address "
                               f"(interfaces: {', '.join(by_interface)})")
        return by_interface[interface][:1]
    try:
        named = [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    except OSError:
        named = []
    addresses = [*named, *(address for entries in by_interface.values() for address in entries)]
    if not addresses:
        raise NotConnected("this host has no IPv4 address for other nodes to connect to")
    return sorted(dict.fromkeys(addresses), key=lambda address: address.startswith("127."))


def _interface(address: str) -> str | None:
    """Return the name of the network interface that has this address."""
    import psutil

    return next((name for name, entries in psutil.net_if_addrs().items()
                 if any(entry.address == address for entry in entries)), None)
