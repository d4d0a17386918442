"""Make a run of its own of a copied run folder (`cp -r runs/A runs/B`)."""

from __future__ import annotations

import sys
from pathlib import Path

from launch.plan.spec import spec_of, with_values
from launch.records.run import Run
from trainers.contract.clock import utc_now
from trainers.contract.files import read_json, replace_json, replace_text, update_json
from trainers.contract.paths import RunPaths


def adopt(run: Run) -> None:
    """Write to a copied folder what makes it a run of its own: its id, by which W&B knows it too, and its own code.

    Nothing is done for a run that is no copy, or whose copy has been made a run of its own before.
    """
    paths, origin = run.paths, run.record.get("copy_of")
    # A copy that was made a run of its own and was then renamed keeps its id, as every renamed run does.
    if not origin or run.id != run.record["id"] or read_json(paths.record)["id"] == paths.id:
        return
    for number in paths.attempt_numbers():
        attempt = run.attempt_record(number)
        if attempt["outcome"] == "running":  # the original's process, not one of this run
            replace_json(paths.attempt_record(number), {**attempt, "outcome": "lost"})
    spec, code = spec_of(paths), RunPaths(paths.root.parent / origin).code
    own = {key: str(paths.code / Path(path).relative_to(code)) for key in ("script", "path")
           if (path := getattr(spec.config, key, None)) and Path(path).is_relative_to(code)}
    if own:
        replace_text(paths.spec, with_values(spec, own).text)
    changed = {key: run.record[key] for key in ("id", "copy_of", "state", "job", "sweep")}
    update_json(paths.record, **changed, updated=utc_now())
    print(f"run {paths.id} is a copy of run {origin}: it continues as a run of its own", file=sys.stderr)
