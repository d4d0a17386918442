"""A port for the ranks' rendezvous that nobody else can take meanwhile."""

from __future__ import annotations

import random
import socket
from contextlib import closing, contextmanager
from typing import Iterator


@contextmanager
def reserved_port(tries: int = 200) -> Iterator[int]:
    """A free port, held until the block ends.

    The socket is bound exclusively, so that no other process, and no other launcher, is given the
    port; only then is its address marked reusable, which lets rank 0's store (it asks for reuse)
    listen there. Ports of the range from which the kernel serves outgoing connections are avoided.
    """
    low, high = 20_000, min(32_000, _ephemeral_start())
    for _ in range(tries):
        with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as held:
            try:
                held.bind(("", random.SystemRandom().randrange(low, high)))
            except OSError:
                continue
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            yield held.getsockname()[1]
            return
    raise OSError(f"no free port between {low} and {high} in {tries} tries")


def _ephemeral_start() -> int:
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
            start = int(file.read().split()[0])
    except (OSError, ValueError):
        return 32_000
    return start if start > 21_000 else 32_000
