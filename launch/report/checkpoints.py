"""A run's checkpoints, for a person."""

from __future__ import annotations

from typing import Any

from trainers.contract.clock import local_time
from trainers.contract.events import brief, metrics_line
from trainers.contract.text import size

COLUMNS = ("STEP", "WHEN", "SIZE", "STRATEGY", "RANKS", "KEPT AS", "METRICS")


def table(rows: list[dict[str, Any]]) -> str:
    """`listing` for a person."""
    from launch.report.columns import columns

    if not rows:
        return "no checkpoints"
    cells = [COLUMNS]
    for row in rows:
        if row["bytes"] is None:
            cells.append((str(row["step"]), "-", "-", "-", "-", "-", f"broken: {row['problem']}"))
            continue
        said = f"broken: {row['problem']}" if row["problem"] else metrics_line(brief(row["metrics"]))
        cells.append((str(row["step"]), local_time(row["created"]), size(row["bytes"]), row["strategy"], str(row["world_size"]),
                      ", ".join(row["kept"]) or "-", said))
    return columns(cells)


def pruned(found: dict[str, Any]) -> str:
    """What `prune` did, for a person."""
    verb = "would delete" if found["dry_run"] else "deleted"
    gone = [*(f"step_{step}" for step in found["deleted"]), *found["leftovers"]]
    kept = ", ".join(f"step_{step} ({', '.join(why)})" for step, why in found["kept"].items())
    what = f"{', '.join(gone)}: {size(found['bytes'])}" if gone else "nothing"
    return f"{verb} {what}\nkept {kept or 'nothing'}"
