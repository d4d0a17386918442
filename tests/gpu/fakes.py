"""Checks that end in every way, to test the driver. They import only the standard library."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from gpu.place import Place
from gpu.table import Check


def right(place: Place) -> None:
    place.say(one=1)
    place.expect(True, "nothing")


def wrong(place: Place) -> None:
    place.expect(1 > 2, "1 is not larger than 2")
    place.say(still="said")


def raises(place: Place) -> None:
    raise ValueError("broken\ninput")


def dies(place: Place) -> None:
    place.say(before="death")
    print("the last words")
    os.kill(os.getpid(), signal.SIGSEGV)


def leaves(place: Place) -> None:
    """Exit at once, with the code of a process that was right."""
    os._exit(0)


def fills_memory(place: Place) -> None:
    raise MemoryError("out of memory")


def hangs(place: Place) -> None:
    """Hang, deaf to SIGTERM, with a process in a session of its own."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
    place.say(pid=child.pid)
    print("waiting for nothing")
    time.sleep(300)


FAKES = (Check("right", "gpu.fakes:right", 1, 20), Check("wrong", "gpu.fakes:wrong", 1, 20),
         Check("raises", "gpu.fakes:raises", 1, 20), Check("dies", "gpu.fakes:dies", 1, 20),
         Check("leaves", "gpu.fakes:leaves", 1, 20), Check("fills_memory", "gpu.fakes:fills_memory", 1, 20),
         Check("missing", "gpu.fakes:no_such_function", 1, 20), Check("hangs", "gpu.fakes:hangs", 1, 3, alone=True),
         Check("after", "gpu.fakes:right", 1, 20))
STUCK = (Check("hangs", "gpu.fakes:hangs", 1, 20), Check("later", "gpu.fakes:right", 1, 20, alone=True))
