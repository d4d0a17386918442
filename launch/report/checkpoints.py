"""Text about the checkpoints of a run, for a person."""

from __future__ import annotations

from typing import Any

from trainers.contract.clock import local_time
from trainers.contract.events import brief, metrics_line
from trainers.contract.text import size

COLUMNS = ("STEP", "WHEN", "SIZE", "STRATEGY", "RANKS", "KEPT AS", "METRICS")


def table(rows: list[dict[str, Any]], best_by: str | None) -> str:
    """The rows of `launch.records.checkpoints.listing` as a table, and below it what makes a checkpoint one of the best."""
    from launch.report.columns import columns

    if not rows:
        return "no checkpoints"
    cells = [COLUMNS]
    for row in rows:
        if row["bytes"] is None:
            cells.append((str(row["step"]), "-", "-", "-", "-", "-", f"broken: {row['problem']}"))
            continue
        metrics = f"broken: {row['problem']}" if row["problem"] else metrics_line(brief(row["metrics"]))
        cells.append((str(row["step"]), local_time(row["created"]), size(row["bytes"]), row["strategy"], str(row["world_size"]),
                      ", ".join(row["kept"]) or "-", metrics))
    return columns(cells) + (f"\nbest by {best_by}" if best_by else "")


def pruned(result: dict[str, Any]) -> str:
    """The result of `launch.records.checkpoints.prune` as text."""
    verb = "would delete" if result["dry_run"] else "deleted"
    names = [*(f"step_{step}" for step in result["deleted"]), *result["leftovers"]]
    kept = ", ".join(f"step_{step} ({', '.join(why)})" for step, why in result["kept"].items())
    deleted = f"{', '.join(names)}: {size(result['bytes'])}" if names else "nothing"
    return f"{verb} {deleted}\nkept {kept or 'nothing'}"
