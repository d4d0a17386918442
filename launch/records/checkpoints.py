"""A run's checkpoints, seen from outside the run: list, verify, prune, and choose one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.records.naming import command_name
from launch.records.run import Run
from launch.records.state import ACTIVE, true_states
from trainers.checkpoints import evaluation, folders, manifest, retention
from trainers.checkpoints.averaging import too_few
from trainers.config import yaml12
from trainers.config.schema import Checkpoint
from trainers.config.spec import mapping, read_text, validate
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths


def listing(paths: RunPaths) -> list[dict[str, Any]]:
    """Return the committed checkpoints, newest first.

    Each has `step`, `created`, `bytes`, `strategy`, `world_size`, `metrics`, `kept` (the reasons: `last`, `best`,
    `every`), `path`, and `problem` (None if the manifest and the file sizes show none; no file is hashed).

    Raises:
        UserError: run.yaml cannot be read.
    """
    keep = retention.kept(folders.metrics(paths), settings(paths))
    rows = []
    for step in reversed(paths.checkpoint_steps()):
        folder = paths.checkpoint(step)
        content, problem = _glance(folder, step)
        rows.append({
            "step": step, **{key: content.get(key) for key in ("created", "strategy", "world_size")},
            "metrics": evaluation.metrics(folder, content) if content else None,
            "bytes": sum(entry["size"] for entry in content["files"].values()) if content else None,
            "kept": keep.get(step, []), "problem": problem, "path": str(folder),
        })
    return rows


def verify(paths: RunPaths, step: int | None) -> list[dict[str, Any]]:
    """Read and hash every file of one checkpoint, or of all of them.

    Args:
        step: the checkpoint; None: all.

    Returns:
        `step`, `bytes` and `problem` (or None) of each, newest first. Checkpoints that the run deletes meanwhile are left
        out.

    Raises:
        UserError: the run has no checkpoint, or none of this step.
    """
    rows = []
    for existing_step in reversed(existing(paths, step)):
        folder = paths.checkpoint(existing_step)
        try:
            content = manifest.verify(folder, existing_step)
            size_bytes = sum(entry["size"] for entry in content["files"].values())
            rows.append({"step": existing_step, "bytes": size_bytes, "problem": None})
        except manifest.Broken as error:
            if folder.exists():
                rows.append({"step": existing_step, "bytes": None, "problem": str(error)})
    return rows


def prune(run: Run, keep_last: int | None, dry_run: bool) -> dict[str, Any]:
    """Delete the checkpoints that the retention rules do not keep, and what interruptions have left behind.

    The newest whole checkpoint is always kept. Checkpoints whose manifest cannot be read are also kept, so that they can
    be examined.

    Args:
        keep_last: replaces the run's own `checkpoint.keep_last`.
        dry_run: delete nothing, and return what would be deleted.

    Returns:
        `deleted` (steps), `kept` (the reasons by step), `leftovers` (names of folders), `bytes` (freed) and `dry_run`.

    Raises:
        UserError: the run is running or in a queue, or none of its checkpoints is whole.
    """
    paths = run.paths
    [(_, truth)] = true_states([run])
    if truth.state in ACTIVE or truth.jobs:
        raise UserError(f"`{run.id}` is {truth.state}: it deletes its old checkpoints itself",
                        f"wait until it has ended, or type `launch cancel {command_name(run.paths)}`")
    config = settings(paths)
    if keep_last is not None:
        config = config.model_copy(update={"keep_last": keep_last})
    if not dry_run:
        folders.put_back(paths)
    existing(paths)
    metrics = folders.metrics(paths)
    keep = retention.kept(metrics, config)
    stale = [step for step in metrics if step not in keep]
    leftovers = folders.leftovers(paths, folders.TMP, folders.OLD, folders.BROKEN)
    if stale or leftovers:
        whole = next((step for step in sorted(metrics, reverse=True) if _is_whole(paths, step)), None)
        if whole is None:
            raise UserError(f"no checkpoint of `{run.id}` is whole: nothing is deleted",
                            f"type `launch checkpoint verify {run.id}` to see what is wrong with each")
        if whole in stale:
            stale.remove(whole)
            keep[whole] = ["whole"]
    size_bytes = sum(_size(path) for path in [*leftovers, *map(paths.checkpoint, stale)])
    if not dry_run:
        folders.delete_leftovers(paths)
        for step in stale:
            folders.delete(paths, step)
    return {"deleted": stale, "kept": {step: keep[step] for step in sorted(keep)}, "leftovers": [path.name for path in leftovers],
            "bytes": size_bytes, "dry_run": dry_run}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _glance(folder: Path, step: int) -> tuple[dict[str, Any], str | None]:
    """Return the manifest ({} if it cannot be read), and the problem that the manifest and the file sizes show, or None."""
    content: dict[str, Any] = {}
    try:
        content = manifest.read(folder, step)
        manifest.verify_sizes(folder, step)
    except manifest.Broken as error:
        return content, str(error)
    return content, None


def _is_whole(paths: RunPaths, step: int) -> bool:
    try:
        manifest.verify(paths.checkpoint(step), step)
    except manifest.Broken:
        return False
    return True


@dataclass(frozen=True)
class Choice:
    """A checkpoint that was chosen."""

    step: int
    passed_over: dict[int, str]  # by step: the problem of each broken checkpoint that is preferred to this one, or may be
    older: tuple[int, ...] = ()  # the steps of the checkpoints before it, newest first, if several were asked for

    def warnings(self) -> list[str]:
        """Return one line for each checkpoint that was passed over."""
        return [f"the checkpoint of step {step} is broken ({problem}): passed over" for step, problem in self.passed_over.items()]


def choose(paths: RunPaths, which: str | None, count: int = 1) -> Choice:
    """Choose a whole checkpoint of a run. Reads all files of the checkpoint, which finds any changed byte.

    Broken checkpoints are passed over, except when `which` is a step.

    Args:
        which: `newest` or None; `best` by the run's `checkpoint.metric` (of equal ones the newer); or a step.
        count: how many checkpoints to choose: this one and those before it.

    Raises:
        UserError: there is no such checkpoint, or no such checkpoint is whole, or fewer than `count` are.
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
        raise UserError(f"`{which}` is not a checkpoint of a run", f"give `newest`, `best` or a step: {_listed(steps)}")
    for step in steps:
        try:
            manifest.verify(paths.checkpoint(step), step)
            return Choice(step, passed_over, _older(paths, step, count - 1, passed_over))
        except manifest.Broken as error:
            if paths.checkpoint(step).exists():
                passed_over[step] = str(error)
    if not passed_over:
        raise UserError(f"`{paths.id}` has just deleted the checkpoint", "try again: the run has a newer checkpoint")
    step, problem = max(passed_over.items())
    verify_hint = f"`launch checkpoint verify {paths.id}` checks all of them"
    newest_hint = "use `newest` for the newest whole checkpoint"
    if which in (None, "newest", "best"):
        evaluated = " that was evaluated" if which == "best" else ""
        hint = newest_hint if which == "best" else "restore a good copy"
        raise UserError(f"no checkpoint of `{paths.id}`{evaluated} is whole (step {step}: {problem})", f"{hint}; {verify_hint}")
    raise UserError(f"the checkpoint of step {step} of `{paths.id}` is broken: {problem}", f"{newest_hint}; {verify_hint}")


def _older(paths: RunPaths, step: int, count: int, passed_over: dict[int, str]) -> tuple[int, ...]:
    """Return the steps of the last `count` whole checkpoints before a step, newest first. Adds broken ones to `passed_over`.

    Raises:
        UserError: there are fewer.
    """
    found: list[int] = []
    for earlier in reversed(paths.checkpoint_steps()):
        if earlier < step and len(found) < count:
            try:
                manifest.verify(paths.checkpoint(earlier), earlier)
                found.append(earlier)
            except manifest.Broken as error:
                passed_over[earlier] = str(error)
    if len(found) < count:
        raise too_few(f"`{paths.id}`", step, len(found) + 1, count + 1)
    return tuple(found)


def existing(paths: RunPaths, step: int | None = None) -> list[int]:
    """Return the steps that have a checkpoint, whole or not, oldest first; if `step` is given, only this step.

    Raises:
        UserError: the run has no checkpoint, or none of this step.
    """
    steps = paths.checkpoint_steps()
    if not steps:
        raise UserError(f"`{paths.id}` has no checkpoint", f"looked in {paths.checkpoints}")
    if step is not None and step not in steps:
        raise UserError(f"`{paths.id}` has no checkpoint of step {step}", f"the run has {_listed(steps)}")
    return steps if step is None else [step]


def settings(paths: RunPaths) -> Checkpoint:
    """Return the `checkpoint` section of the run's spec. The rest may need modules that this machine does not have.

    Raises:
        UserError: run.yaml cannot be read, or its `checkpoint` section is wrong.
    """
    values = mapping(yaml12.read(read_text(paths.spec), paths.spec.name).value, paths.spec.name)
    return validate(Checkpoint, values.get("checkpoint") or {}, lambda key: paths.spec.name)


def _best_first(paths: RunPaths) -> tuple[list[int], dict[int, str]]:
    """Return the steps that have the run's metric, best first, and the problem of each step whose manifest is broken.

    Raises:
        UserError: the run has no `checkpoint.metric`, or no checkpoint has a value of the metric.
    """
    config = settings(paths)
    hint = f"give a step; `launch checkpoint list {paths.id}` shows the metrics of each"
    if config.metric is None:
        raise UserError(f"`{paths.id}` has no best checkpoint, because it sets no `checkpoint.metric`", hint)
    metrics, unreadable = {}, {}
    for step in existing(paths):
        try:
            folder = paths.checkpoint(step)
            metrics[step] = evaluation.metrics(folder, manifest.read(folder, step))
        except manifest.Broken as error:
            unreadable[step] = str(error)
    ranked = retention.ranked(metrics, config)[::-1]
    if not ranked and not unreadable:
        raise UserError(f"no checkpoint of `{paths.id}` has a value of `{config.metric}` (`checkpoint.metric`)", hint)
    return ranked, unreadable


def _listed(steps: list[int], most: int = 8) -> str:
    return ("..., " if len(steps) > most else "") + ", ".join(f"step {step}" for step in steps[-most:])
