"""How fast a run trains: the rates between two logged steps."""

from __future__ import annotations

import time
from collections.abc import Sequence

from trainers.engine.update_runner import Reading


class Rates:
    """Measures the time of training steps, without evaluations and saves.

    The times are right only where the device has nothing left to do. That holds after every `Reading`.
    """

    def __init__(self) -> None:
        self.begin(0, [])

    def begin(self, step: int, readings: Sequence[Reading]) -> None:
        """Measure from now on; `readings` are those of step `step`."""
        self._step, self._readings, self._since = step, readings, time.perf_counter()

    def leave_out(self, began: float) -> None:
        """Do not count the time since `began`, a value of time.perf_counter()."""
        self._since += time.perf_counter() - began

    def measured(self, step: int, total: int, readings: Sequence[Reading], leader: int) -> dict[str, float]:
        """Return the rates since the last call or `begin`, and measure anew from now on.

        Args:
            readings: of each update at step `step`; read immediately before this call.
            leader: index of the update whose items count.

        Returns:
            `rate`: items a second, over all ranks; `data_wait`: the share of the time in which this rank waited for batches;
            `eta_s`: seconds until step `total`.
        """
        seconds = max(time.perf_counter() - self._since, 1e-9)
        before = self._readings or [Reading.nothing()] * len(readings)
        items = readings[leader].items - before[leader].items
        wait_s = sum(now.data_wait_s - then.data_wait_s for now, then in zip(readings, before))
        result = {"rate": items / seconds, "data_wait": wait_s / seconds,
                  "eta_s": (total - step) * seconds / max(step - self._step, 1)}
        self.begin(step, readings)
        return result
