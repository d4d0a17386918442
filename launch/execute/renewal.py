"""Resume a run with its code and its cluster file as they are at that time, and keep the copy of the code that it had.

    runs/<id>/code/                       the code that the next attempt uses
    runs/<id>/code-until-attempt-<n>/     the code that attempts up to number n used, back to the next older copy

A requeue by SLURM changes nothing: the job continues with the code as it was submitted.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.cluster.config import ClusterConfig
from launch.cluster.resources import Resources, Wanted, resources_of
from launch.execute import snapshot
from launch.execute.submission_plan import code_of, take_code
from launch.plan.spec import PATIENCE, Spec, with_values
from launch.records.naming import command_name, short_path
from launch.records.run import Run
from trainers.config.schema import SearchConfig
from trainers.contract.errors import UserError
from trainers.contract.files import exchange_folder, temporary_path

# Keys of a cluster's file that decide what a run gets.
RESOURCE_KEYS = ("device", "gpus_per_node", "cpus_per_node", "cpus_per_gpu", "cpus_per_rank", "max_nodes")


def complete(run: Run, changes: Sequence[str]) -> str | None:
    """Return what to tell a user who resumes a finished run; None if it stopped early, and `changes` set its patience anew."""
    early, record = run.record.get("stopped_early"), run.record
    if not early:
        return f"run {run.id} is finished: nothing to resume"
    if any(word.partition("=")[0] == PATIENCE for word in changes):
        return None
    return (f"run {run.id} is finished: it stopped early at step {record['step']} of {record['total']}, because {early}; "
            f"`launch resume {command_name(run.paths)} {PATIENCE}=N` trains on with more patience")


def survey(specs: Sequence[Spec], code: Path) -> tuple[list[Spec], snapshot.Snapshot | None]:
    """Look where the code of stopped runs lies.

    Args:
        specs: of the runs; they name the code in `code`.
        code: the folder with the code, of one run or of a whole sweep.

    Returns:
        The specs with the paths of the user's own files; empty if the code must stay as it is, because the user's files are
        gone. And the snapshot for the plans of the next submission; None if there is none.
    """
    old = snapshot.load(code)
    if old is None:
        return [], None
    specs = [_with_own_paths(spec, old) for spec in specs]
    try:
        planned = snapshot.survey([path for spec in specs for path in code_of(spec)], code)
    except UserError as error:
        print(f"warning: the code is used as it was submitted: {error.message}", file=sys.stderr)
        return [], old
    return specs, planned if old.is_copy else old


def renew(specs: Sequence[Spec], code: Path, kept: str) -> None:
    """Replace the code in `code` by the code as it is, and say what has changed.

    Files that ranks have written into the copy stay in place.

    Args:
        specs: as `survey` returns them; empty: do nothing.
        kept: the name under which the old copy is kept.

    Raises:
        UserError: the code cannot be copied, and nothing has changed; or files that ranks have written into the old copy cannot
            be moved to the new copy, which is in place.
    """
    old = snapshot.load(code)
    if not specs or old is None:
        return
    fresh = temporary_path(code)
    new = take_code(specs, fresh, strict=False, copy=old.is_copy)
    lines = changes(old, new)
    if not lines:
        shutil.rmtree(fresh, ignore_errors=True)
        return
    if old.is_copy:
        for warning in new.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        _link_old_places(old, new, fresh)
    target = code.with_name(kept)
    try:
        if target.exists():  # no attempt has begun since the last renewal
            target = temporary_path(target)
        exchange_folder(code, fresh, target)
        _carry_over(old, target, code)
    except OSError as error:
        raise UserError(f"the code in {code} cannot be replaced: {error.strerror}", "make that folder writable") from error
    if target.name != kept:
        shutil.rmtree(target, ignore_errors=True)
    print("\n".join(["the code has changed since the last attempt:", *(f"  {line}" for line in lines),
                     f"  the code before is kept in {short_path(code.with_name(kept))}"]), file=sys.stderr)


def changes(old: snapshot.Snapshot, new: snapshot.Snapshot) -> list[str]:
    """How two snapshots differ, as lines to print; empty if they do not."""
    lines = []
    before = {tree["source"]: tree for tree in old.trees}
    for tree in new.trees:
        past = before.pop(tree["source"], None)
        if past is None:
            lines.append(f"{tree['source']}: new")
            continue
        parts = []
        if past["commit"] != tree["commit"]:
            parts.append(f"commit {(past['commit'] or 'none')[:10]} -> {(tree['commit'] or 'none')[:10]}")
        files, now = past.get("files"), tree["files"]
        if files is None:
            parts.append("the older copy has no list of its files")
        else:
            groups = {"changed": [name for name in now if name in files and files[name] != now[name]],
                      "new": [name for name in now if name not in files], "gone": [name for name in files if name not in now]}
            parts += [f"{word}: {snapshot.some(names)}" for word, names in groups.items() if names]
        if parts:
            lines.append(f"{tree['source']}: {'; '.join(parts)}")
    lines += [f"{source}: no longer part of it" for source in before]
    lines += [f"{name} {old.versions[name]} -> {version}" for name, version in new.versions.items()
              if old.versions.get(name, version) != version]
    return lines


def cluster_changes(before: ClusterConfig, now: ClusterConfig) -> list[str]:
    """The keys of a cluster's file that have changed, each with both values."""
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    return [f"{key}: {old.get(key)} -> {new[key]}" for key in new if new[key] != old.get(key)]


def say_cluster_changes(before: ClusterConfig, now: ClusterConfig) -> None:
    """Say how the cluster's file has changed since the last submission."""
    if before.name == now.name and (lines := cluster_changes(before, now)):
        print("\n".join([f"the file of cluster `{now.name}` has changed since the last submission:",
                         *(f"  {line}" for line in lines)]), file=sys.stderr)


def resources_again(spec: Spec, last: Resources, before: ClusterConfig, now: ClusterConfig) -> Resources:
    """The resources of a run that is submitted again, without numbers on the command line.

    Raises:
        UserError: the cluster does not have what the run had.
    """
    same = before.name == now.name
    if same and all(getattr(before, key) == getattr(now, key) for key in RESOURCE_KEYS):
        return last
    if isinstance(spec.config, SearchConfig):
        return last if same else resources_of(spec.config, now, Wanted())
    on_gpus = last.gpus or last.device == "cuda"
    wanted = {"gpus": last.gpus or last.ranks} if on_gpus else {"procs": last.ranks}
    if same:
        try:
            return resources_of(spec.config, now, Wanted(**wanted, nodes=last.nodes))
        except UserError:
            pass  # a node has become smaller
    return resources_of(spec.config, now, Wanted(**wanted))


def _with_own_paths(spec: Spec, old: snapshot.Snapshot) -> Spec:
    """The spec with the user's own files in place of their copies."""
    copies = {str(old.folder / place): source for source, place in reversed(old.places.items())}
    own = {key: copies[path] for key in ("script", "path") if (path := getattr(spec.config, key, None)) in copies}
    return with_values(spec, own) if own else spec


def _link_old_places(old: snapshot.Snapshot, new: snapshot.Snapshot, fresh: Path) -> None:
    """Let run.yaml's paths hold where a source has another place in the new copy, as after `git init` in a folder above.

    run.yaml never changes, and it names the place in the old copy.
    """
    places: Mapping[str, str] = {source: place for source, place in new.places.items() if old.places.get(source, place) != place}
    for source, place in places.items():
        link = fresh / old.places[source]
        if not os.path.lexists(link):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(fresh / place, link.parent))


def _carry_over(old: snapshot.Snapshot, past: Path, code: Path) -> None:
    """Move files that ranks have written into the old copy, such as a script's own checkpoints, to the new copy."""
    for tree in old.trees:
        known = tree.get("files") or {}
        for folder, folders, names in os.walk(past / tree["copy"]):
            folders[:] = [name for name in folders if name != "__pycache__"]
            inside = os.path.relpath(folder, past)
            for name in names:
                target = code / inside / name
                if os.path.relpath(f"{folder}/{name}", past / tree["copy"]) not in known and not os.path.lexists(target):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.rename(f"{folder}/{name}", target)
