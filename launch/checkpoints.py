"""A run's checkpoints from outside: which there are, whether they are whole, and deleting what is superfluous."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.choose import existing, settings
from launch.runs import Run
from launch.truth import ACTIVE, look
from trainers.engine import manifest, retention, shelf
from trainers.errors import UserError
from trainers.events import brief, metrics_line, size
from trainers.paths import RunPaths

COLUMNS = ("STEP", "WHEN", "SIZE", "STRATEGY", "RANKS", "KEPT AS", "METRICS")


def listing(paths: RunPaths) -> list[dict[str, Any]]:
    """The committed checkpoints, newest first: `step`, `created`, `bytes`, `strategy`, `world_size`, `metrics`, `kept` (as
    `last`, `best` or `every`), `path`, and the `problem` that manifest and sizes alone show, or None.

    Raises:
        UserError: run.yaml cannot be read.
    """
    keep = retention.kept(shelf.metrics(shelf.manifests(paths)), settings(paths))
    rows = []
    for step in reversed(paths.checkpoint_steps()):
        content, problem = _glance(paths.checkpoint(step), step)
        rows.append({
            "step": step, **{key: content.get(key) for key in ("created", "strategy", "world_size", "metrics")},
            "bytes": sum(entry["size"] for entry in content["files"].values()) if content else None,
            "kept": keep.get(step, []), "problem": problem, "path": str(paths.checkpoint(step)),
        })
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """`listing` for a person."""
    from launch.show_runs import columns, local

    if not rows:
        return "no checkpoints"
    cells = [COLUMNS]
    for row in rows:
        if row["bytes"] is None:
            cells.append((str(row["step"]), "-", "-", "-", "-", "-", f"broken: {row['problem']}"))
            continue
        said = f"broken: {row['problem']}" if row["problem"] else metrics_line(brief(row["metrics"]))
        cells.append((str(row["step"]), local(row["created"]), size(row["bytes"]), row["strategy"], str(row["world_size"]),
                      ", ".join(row["kept"]) or "-", said))
    return columns(cells)


def verify(paths: RunPaths, step: int | None) -> list[dict[str, Any]]:
    """Read and hash every file of every checkpoint, or of one: `step`, `bytes`, `problem` or None; newest first. One that
    the run deletes meanwhile is left out.

    Raises:
        UserError: there is no such checkpoint, or none.
    """
    rows = []
    for one in reversed(existing(paths, step)):
        folder = paths.checkpoint(one)
        try:
            content = manifest.verify(folder, one)
            rows.append({"step": one, "bytes": sum(entry["size"] for entry in content["files"].values()), "problem": None})
        except manifest.Broken as problem:
            if folder.exists():
                rows.append({"step": one, "bytes": None, "problem": str(problem)})
    return rows


def prune(run: Run, keep_last: int | None, dry_run: bool) -> dict[str, Any]:
    """Delete what retention does not keep, and what interruptions have left: `deleted`, `kept` (with the reasons), steps;
    `leftovers`, names; `bytes`, what is freed.

    The newest whole one stays in any case, and those whose manifest cannot be read: somebody may want to look at them.

    Args:
        keep_last: instead of the run's own `checkpoint.keep_last`.
        dry_run: say so, and do nothing.
    Raises:
        UserError: the run is at work or in a queue, or none of its checkpoints is whole.
    """
    paths = run.paths
    [(_, truth)] = look([run])
    if truth.state in ACTIVE or truth.jobs:
        raise UserError(f"`{run.id}` is {truth.state}, and deletes by itself what is superfluous",
                        f"once it has ended, or after `launch cancel {run.id}`")
    config = settings(paths)
    if keep_last is not None:
        config = config.model_copy(update={"keep_last": keep_last})
    if not dry_run:
        shelf.put_back(paths)
    existing(paths)
    found = shelf.metrics(shelf.manifests(paths))
    keep = retention.kept(found, config)
    stale = [step for step in found if step not in keep]
    leftovers = shelf.leftovers(paths, shelf.TMP, shelf.OLD, shelf.BROKEN)
    if stale or leftovers:
        whole = next((step for step in sorted(found, reverse=True) if _whole(paths, step)), None)
        if whole is None:
            raise UserError(f"no checkpoint of `{run.id}` is whole: nothing is deleted",
                            f"`launch checkpoint verify {run.id}` says what is wrong with each")
        if whole in stale:
            stale.remove(whole)
            keep[whole] = ["whole"]
    size_bytes = sum(_size(path) for path in [*leftovers, *map(paths.checkpoint, stale)])
    if not dry_run:
        shelf.sweep(paths)
        for step in stale:
            shelf.delete(paths, step)
    return {"deleted": stale, "kept": {step: keep[step] for step in sorted(keep)}, "leftovers": [path.name for path in leftovers],
            "bytes": size_bytes, "dry_run": dry_run}


def pruned(found: dict[str, Any]) -> str:
    """What `prune` did, for a person."""
    verb = "would delete" if found["dry_run"] else "deleted"
    gone = [*(f"step_{step}" for step in found["deleted"]), *found["leftovers"]]
    kept = ", ".join(f"step_{step} ({', '.join(why)})" for step, why in found["kept"].items())
    what = f"{', '.join(gone)}: {size(found['bytes'])}" if gone else "nothing"
    return f"{verb} {what}\nkept {kept or 'nothing'}"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _glance(folder: Path, step: int) -> tuple[dict[str, Any], str | None]:
    """(the manifest, or nothing; the problem that it and the sizes of files show)"""
    content: dict[str, Any] = {}
    try:
        content = manifest.read(folder, step)
        manifest.sealed(folder, step)
    except manifest.Broken as problem:
        return content, str(problem)
    return content, None


def _whole(paths: RunPaths, step: int) -> bool:
    try:
        manifest.verify(paths.checkpoint(step), step)
    except manifest.Broken:
        return False
    return True
