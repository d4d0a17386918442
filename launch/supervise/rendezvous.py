"""How the node processes of one job connect to each other.

The head is the process of node 0. It writes the address on which it listens, and a secret token, into the job's folder,
on storage that all nodes share. A process that connects must send the token.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from launch.supervise.group import Link, NodeGroup
from trainers.contract.files import read_json, replace_json, replace_text

MEETING_S = 300.0   # until all node processes must be connected: modules load slowly from a cluster's file system
CONNECT_S = 5.0
POLL_S = 0.2
PROBE_S = 30.0      # between two checks of a waiting process whether the folder can be written
HELLO_BYTES = 4096  # the longest first line of a connection
KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}  # a host is lost after a minute without an answer


class NotConnected(Exception):
    """Not all node processes have connected."""


def meet(folder: Path, name: str, node: int, nodes: int, interface: str | None = None,
         stopped: Callable[[], bool] = lambda: False, write: Callable[[Callable[[], None]], None] = lambda write: write()
         ) -> NodeGroup:
    """Connect the node processes of all `nodes` nodes. Each of them calls this function, with the same `name`.

    Args:
        folder: a folder that all nodes share.
        name: names this meeting: the job, and how often the job was restarted.
        node: the number of this node, from 0.
        interface: the network interface between nodes; None: any that works.
        stopped: is called again and again; True stops the waiting.
        write: calls a function that writes a file; it may call the function again if that raises OSError.

    Raises:
        NotConnected: a node process did not connect in time, could not connect, or the waiting was stopped.
        OSError: the folder could not be read or written.
    """
    if nodes == 1:
        return NodeGroup(0, "127.0.0.1", "lo")
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
            return _accept_all(file, nodes, interface, given_up, write)
        return _connect(file, node, interface, given_up)
    except (NotConnected, OSError) as error:
        with suppress(OSError):
            if not stopped() and not any(path.name.startswith(absent) for path in folder.iterdir()):
                replace_text(folder / f"{absent}{node}.txt", str(error))  # the other nodes need not wait until the deadline
        raise


def _connect(file: Path, node: int, interface: str | None, given_up: Callable[[], bool]) -> NodeGroup:
    """Connect to the head, on any other node."""
    if interface is not None:
        _addresses(interface)  # raises NotConnected at once if this host does not have the interface
    deadline, probe = time.monotonic() + MEETING_S, time.monotonic() + PROBE_S
    while time.monotonic() < deadline and not given_up():
        if time.monotonic() > probe:
            probe = time.monotonic() + PROBE_S
            if not _writable(file.parent):  # the head waits until it can write the file
                deadline = time.monotonic() + MEETING_S
        try:
            meeting = read_json(file)
        except (OSError, ValueError):
            meeting = None
        if meeting and (group := _join(meeting, node, interface)):
            return group
        time.sleep(POLL_S)
    raise NotConnected("the head node's process could not be reached")


def _writable(folder: Path) -> bool:
    """Return whether a file can be written in the folder."""
    probe = folder / ".probe"
    try:
        replace_text(probe, "x")
        probe.unlink(missing_ok=True)  # several node processes use this name
    except OSError:
        return False
    return True


def _accept_all(file: Path, nodes: int, interface: str | None, given_up: Callable[[], bool],
                write: Callable[[Callable[[], None]], None]) -> NodeGroup:
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
            write(lambda: replace_json(file, {"addresses": addresses, "port": listener.getsockname()[1], "token": token}))
        finally:
            os.umask(umask)
        deadline = time.monotonic() + MEETING_S
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
