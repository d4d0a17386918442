"""How a run's jobs ended, as SLURM said: written down when a reader has seen it, because SLURM forgets it after minutes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from launch.records.run import Run
from trainers.contract.files import read_json, replace_json

if TYPE_CHECKING:  # `slurm` is imported only where SLURM is asked
    from launch.cluster.slurm import Ended


def known(run: Run, seen: Mapping[str, Ended]) -> dict[str, Ended]:
    """Return how the jobs of the run's last submission ended, by id, from SLURM's answer and from what was seen earlier.

    What is new is written down. An end from before the last attempt began does not count: that job was started again.
    """
    ids = run.record["job"]["ids"]
    kept = _read(run)
    ended = {**kept, **{id: seen[id] for id in ids if id in seen}}
    if ended != kept:
        try:
            replace_json(run.paths.slurm, {id: asdict(end) for id, end in ended.items()})
        except OSError:
            pass  # the reader may not write there, or the disk is full
    began = run.attempt_record(max(run.paths.attempt_numbers(), default=0)).get("began") or ""
    return {id: ended[id] for id in ids if id in ended and (id in seen or (ended[id].ended or "") >= began)}


def _read(run: Run) -> dict[str, Ended]:
    from launch.cluster.slurm import Ended

    names = {field.name for field in fields(Ended)}  # another version of launch may have written more
    try:
        return {id: Ended(**{key: value for key, value in end.items() if key in names})
                for id, end in read_json(run.paths.slurm).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
