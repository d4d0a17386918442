"""Make a run of its own of a copied run folder (`cp -r runs/A runs/B`), and find the code of a renamed or moved one."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

from launch.plan.spec import spec_of, with_values
from launch.records.run import Run
from trainers.contract.clock import utc_now
from trainers.contract.files import read_json, replace_json, replace_text, update_json
from trainers.contract.paths import RunPaths


def adopt(run: Run) -> None:
    """Write to a copied folder what makes it a run of its own: its id, by which W&B knows it too, and its own code.

    A run that is no copy, or that was made a run of its own before, only gets the new place of its code if its folder was
    renamed or moved: run.yaml names the code by its absolute path.
    """
    paths, origin = run.paths, run.record.get("copy_of")
    _find_code(paths, RunPaths(paths.root.parent / origin).code if origin else None)
    # A copy that was made a run of its own and was then renamed keeps its id, as every renamed run does.
    if not origin or run.id != run.record["id"] or read_json(paths.record)["id"] == paths.id:
        return
    for number in paths.attempt_numbers():
        attempt = run.attempt_record(number)
        if attempt["outcome"] == "running":  # the original's process, not one of this run
            replace_json(paths.attempt_record(number), {**attempt, "outcome": "lost"})
    changed = {key: run.record[key] for key in ("id", "copy_of", "state", "job", "sweep")}
    update_json(paths.record, **changed, updated=utc_now())
    print(f"run {paths.id} is a copy of run {origin}: it continues as a run of its own", file=sys.stderr)


def _find_code(paths: RunPaths, original: Path | None) -> None:
    """Let run.yaml name the code in the run's own folder, where it names the code of the original or a place that is gone.

    Args:
        original: the folder with the code of the run from which this one was copied.
    """
    spec, found = spec_of(paths), {}
    for key in ("script", "path"):
        if not (name := getattr(spec.config, key, None)):
            continue
        path = Path(name)
        if original and path.is_relative_to(original):
            found[key] = str(paths.code / path.relative_to(original))
        elif not path.exists():
            places = (paths.code.joinpath(*path.parts[number + 1:]) for number, part in enumerate(path.parts)
                      if part == paths.code.name)
            found |= {key: str(place) for place in islice(filter(Path.exists, places), 1)}
    if found:
        replace_text(paths.spec, with_values(spec, found).text)
