"""A run's checkpoints from outside: which there are, whether they are whole, and deleting what is superfluous."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.records.run import Run
from launch.records.state import ACTIVE, look
from trainers.checkpoints import folders, manifest, retention
from trainers.config import yaml12
from trainers.config.schema import Checkpoint
from trainers.config.spec import mapping, read_text, validate
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths


def listing(paths: RunPaths) -> list[dict[str, Any]]:
    """The committed checkpoints, newest first: `step`, `created`, `bytes`, `strategy`, `world_size`, `metrics`, `kept` (as
    `last`, `best` or `every`), `path`, and the `problem` that manifest and sizes alone show, or None.

    Raises:
        UserError: run.yaml cannot be read.
    """
    keep = retention.kept(folders.metrics(folders.manifests(paths)), settings(paths))
    rows = []
    for step in reversed(paths.checkpoint_steps()):
        content, problem = _glance(paths.checkpoint(step), step)
        rows.append({
            "step": step, **{key: content.get(key) for key in ("created", "strategy", "world_size", "metrics")},
            "bytes": sum(entry["size"] for entry in content["files"].values()) if content else None,
            "kept": keep.get(step, []), "problem": problem, "path": str(paths.checkpoint(step)),
        })
    return rows


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
        folders.put_back(paths)
    existing(paths)
    found = folders.metrics(folders.manifests(paths))
    keep = retention.kept(found, config)
    stale = [step for step in found if step not in keep]
    leftovers = folders.leftovers(paths, folders.TMP, folders.OLD, folders.BROKEN)
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
        folders.sweep(paths)
        for step in stale:
            folders.delete(paths, step)
    return {"deleted": stale, "kept": {step: keep[step] for step in sorted(keep)}, "leftovers": [path.name for path in leftovers],
            "bytes": size_bytes, "dry_run": dry_run}


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


@dataclass(frozen=True)
class Choice:
    step: int
    passed_over: dict[int, str]  # what is wrong with each that was preferred, or may have been

    def warnings(self) -> list[str]:
        return [f"the checkpoint of step {step} is broken ({problem}): passed over" for step, problem in self.passed_over.items()]


def choose(paths: RunPaths, which: str | None, look: Callable[[Path, int], Any] = manifest.sealed) -> Choice:
    """A whole checkpoint of a run: of the newest, or the best, the first that is whole; of a step, that one or none.

    Args:
        which: a step, `best` by the run's `checkpoint.metric` (of equals the newer), or `newest`, as None.
        look: says whether one is whole: `manifest.sealed` by its manifest and the sizes of its files, `manifest.verify` by
            reading them all.

    Raises:
        UserError: there is none such, or none is whole.
    """
    steps = existing(paths)
    passed_over: dict[int, str] = {}
    if which in (None, "newest"):
        steps.reverse()
    elif which == "best":
        steps, passed_over = _best_first(paths)
    elif which.isdecimal():
        steps = existing(paths, int(which))
    else:
        raise UserError(f"`{which}` names no checkpoint of a run", f"give `newest`, `best` or a step: {_listed(steps)}")
    for step in steps:
        try:
            look(paths.checkpoint(step), step)
            return Choice(step, passed_over)
        except manifest.Broken as problem:
            passed_over[step] = str(problem)
    step, problem = max(passed_over.items())
    see = f"`launch checkpoint verify {paths.id}` looks at all"
    if which in (None, "newest", "best"):
        evaluated = " that was evaluated" if which == "best" else ""
        hint = "`newest` takes the newest whole one" if which == "best" else "put a good copy back"
        raise UserError(f"no checkpoint of `{paths.id}`{evaluated} is whole (step {step}: {problem})", f"{hint}; {see}")
    raise UserError(f"the checkpoint of step {step} of `{paths.id}` is broken: {problem}",
                    f"`newest` takes the newest whole one; {see}")


def existing(paths: RunPaths, step: int | None = None) -> list[int]:
    """The steps of which there are checkpoints, whole or not, oldest first; or this one alone.

    Raises:
        UserError: there is none, or not this one.
    """
    steps = paths.checkpoint_steps()
    if not steps:
        raise UserError(f"`{paths.id}` has no checkpoint", f"looked in {paths.checkpoints}")
    if step is not None and step not in steps:
        raise UserError(f"`{paths.id}` has no checkpoint of step {step}", f"there is {_listed(steps)}")
    return steps if step is None else [step]


def settings(paths: RunPaths) -> Checkpoint:
    """The run's `checkpoint` section: no more of its spec, which may need modules that are not here. Raises: UserError."""
    values = mapping(yaml12.read(read_text(paths.spec), paths.spec.name).value, paths.spec.name)
    return validate(Checkpoint, values.get("checkpoint") or {}, lambda key: paths.spec.name)


def _best_first(paths: RunPaths) -> tuple[list[int], dict[int, str]]:
    """(the steps that can be ranked, the problem of each that cannot say how good it is)"""
    config = settings(paths)
    see = f"`launch checkpoint list {paths.id}` shows the metrics of each: give a step"
    if config.metric is None:
        raise UserError(f"`{paths.id}` names no metric by which a checkpoint is the best (`checkpoint.metric`)", see)
    metrics, unreadable = {}, {}
    for step in existing(paths):
        try:
            metrics[step] = manifest.read(paths.checkpoint(step), step)["metrics"]
        except manifest.Broken as problem:
            unreadable[step] = str(problem)
    ranked = retention.ranked(metrics, config)[::-1]
    if not ranked and not unreadable:
        raise UserError(f"no checkpoint of `{paths.id}` was evaluated by `{config.metric}` (`checkpoint.metric`)", see)
    return ranked, unreadable


def _listed(steps: list[int], most: int = 8) -> str:
    return ("..., " if len(steps) > most else "") + ", ".join(f"step {step}" for step in steps[-most:])
