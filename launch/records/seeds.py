"""Mean and deviation over the seeds of a sweep: for each grid point, of every metric of its finished runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from launch.records.read import read_sweep
from trainers.contract.events import brief
from trainers.contract.text import number


def means(root: Path, word: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the means over seeds, one for each grid point of a sweep; [] if the sweep does not vary the seed.

    Each is {"overrides": the point without its seed, "runs": their number, "finished": how many of them, "metrics": by name
    {"mean", "deviation", "n"}}. The deviation is the sample's (with n - 1), and None where n is 1. A value that is not finite
    does not count: n may be smaller than `finished`.

    Args:
        root, word: as for `read_sweep`.
        rows: the sweep's runs, from `launch.records.read.list_runs`.

    Raises:
        UserError: the sweep cannot be read.
    """
    key = read_sweep(root, word).get("seed_key")  # sweeps of older versions have none
    if key is None:
        return []
    by_point: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        point = tuple(override for override in row["overrides"] if override.partition("=")[0] != key)
        by_point.setdefault(point, []).append(row)
    found = []
    for point, runs in by_point.items():
        finished = [run["metrics"] or {} for run in runs if run["state"] == "finished"]
        names = dict.fromkeys(name for metrics in finished for name in metrics)
        found.append({"overrides": list(point), "runs": len(runs), "finished": len(finished),
                      "metrics": {name: _mean([metrics.get(name) for metrics in finished]) for name in names}})
    return found


def _mean(values: Sequence[float | None]) -> dict[str, Any]:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return {"mean": fmean(finite) if finite else None, "deviation": stdev(finite) if len(finite) > 1 else None,
            "n": len(finite)}


def lines(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The means as text, one line for each grid point, below a heading. Metrics of single parts are left out."""
    if not points:
        return []
    told = ["mean ± sample standard deviation of the finished runs, over seeds:"]
    for point in points:
        metrics = "  ".join(f"{name} {_value(value, point['finished'])}" for name, value in brief(point["metrics"]).items())
        parts = (" ".join(point["overrides"]), f"{point['finished']} of {point['runs']} runs", metrics)
        told.append("  ".join(part for part in parts if part))
    return told


def _value(value: Mapping[str, Any], finished: int) -> str:
    """'0.1234 ± 0.001', with the number of values if not every finished run has one."""
    if value["mean"] is None:
        return "-"
    text = number(value["mean"]) + (f" ± {number(value['deviation'])}" if value["deviation"] is not None else "")
    return text + (f" (n = {value['n']})" if value["n"] < finished else "")
