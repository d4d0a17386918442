"""A free port for rank 0's store, reserved so that no other process takes it."""

from __future__ import annotations

import random
import socket
from contextlib import closing, contextmanager
from typing import Iterator

FIRST_PORT, LAST_PORT = 20_000, 32_000


@contextmanager
def reserved_port(tries: int = 200) -> Iterator[int]:
    """Reserve a free port until the block ends, and give its number.

    The socket is first bound exclusively, so that no other process and no other launcher gets the port. Only then is its
    address marked reusable: rank 0's store, which asks for reuse, can then listen on the same port. The kernel gives the
    ports of its ephemeral range to outgoing connections, so those ports are avoided.

    Raises:
        OSError: no free port was found in `tries` tries.
    """
    low, high = FIRST_PORT, min(LAST_PORT, _ephemeral_start())
    for _ in range(tries):
        with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as holder:
            try:
                holder.bind(("", random.SystemRandom().randrange(low, high)))
            except OSError:
                continue
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            yield holder.getsockname()[1]
            return
    raise OSError(f"no free port between {low} and {high} in {tries} tries")


def _ephemeral_start() -> int:
    """Return the first port that the kernel gives to outgoing connections, or LAST_PORT where that is of no use."""
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
            start = int(file.read().split()[0])
    except (OSError, ValueError):
        return LAST_PORT
    return start if start > FIRST_PORT + 1_000 else LAST_PORT
