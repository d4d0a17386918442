"""The connections between the node processes of one job: lines of JSON over TCP, between the head and every other node.

The death of a process is noticed at once, by its closed connection. A process that is stopped (SIGSTOP), or whose host hangs,
closes nothing: it is noticed because its heartbeats stop. A job on a single node has only one node process, which nobody
watches: if that process is stopped, its ranks stop too once their pipes are full, and only SLURM's time limit ends the job.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BEAT_S = 5.0        # between two heartbeats of a node process
SILENCE_S = 120.0   # a node process that sends nothing for so long is lost, unless `NodeGroup.silence_s` says otherwise
LOOK_S = 1.0        # at most so much of the time between two looks counts as silence: this process may have been stopped too


@dataclass
class Link:
    """One connection; each message is one line."""

    socket: socket.socket
    open: bool = True
    silent_s: float = 0.0   # for how long nothing has arrived
    silent: bool = False    # whether the connection was closed because nothing arrived
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
            self.silent_s = 0.0
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
    silence_s: float = SILENCE_S
    _looked: float = field(default_factory=time.monotonic)
    _beat: float = 0.0
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

        A node process that is gone, or has been silent for `silence_s`, adds {"lost": True, "node": its node}. The head
        forwards failures, signals and losses to the other nodes. Call this often: it also sends this process's heartbeats.
        """
        self.beat()
        messages, self._kept = self._kept, []
        now = time.monotonic()
        passed_s, self._looked = min(now - self._looked, LOOK_S), now
        for node, link in self.links.items():
            if not link.open:
                continue
            link.silent_s += passed_s
            arrived = [message for message in link.receive() if "beat" not in message]
            if link.open and link.silent_s > self.silence_s:
                link.silent = True
                link.close()
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

    def beat(self) -> None:
        """Tell the other nodes that this process is alive, if it is time to."""
        if time.monotonic() - self._beat >= BEAT_S:
            self._beat = time.monotonic()
            self.send({"beat": True})

    def put_back(self, messages: list[dict[str, Any]]) -> None:
        """Put back messages that arrived too early. The next call of `receive` returns them first."""
        self._kept = messages

    def close(self) -> None:
        for link in self.links.values():
            link.socket.close()
