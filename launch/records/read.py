"""Runs as their readers see them: finding one, listing all, what became of it."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cluster import reasons
from launch.cluster.resources import node_of_rank
from launch.records.run import SWEEP, Run, read_record, read_run
from launch.records.state import ACTIVE, NOT_SUBMITTED, Truth, local_state, look, on_slurm
from trainers.contract.clock import utc_at
from trainers.contract.errors import UserError
from trainers.contract.files import read_json
from trainers.contract.paths import RunPaths
from trainers.contract.text import either

if TYPE_CHECKING:  # imported only where SLURM is asked
    from launch.cluster.slurm import Queued

TAIL_BYTES = 64 * 1024  # of metrics.jsonl: some hundred logged steps


def find_run(root: Path, word: str) -> Run:
    """The run that `word` names: an id under `root`, the unique beginning of one, or a run's folder.

    Raises:
        UserError: no such run, several, or one that cannot be read.
    """
    if not word:
        raise UserError("a run's id is empty", "see `launch runs`")
    root = root.absolute()
    if os.sep in word or word in (".", ".."):
        folder = Path(word).resolve()
        if not folder.is_dir():
            raise UserError(f"there is no folder `{word}`", "give a run's id (see `launch runs`) or its folder")
        return read_run(folder)
    if (root / word).is_dir():
        return read_run(root / word)
    if RunPaths(Path(word)).record.is_file():
        return read_run(Path(word).resolve())

    ids = [name for name in _folders(root) if RunPaths(root / name).record.exists()]
    found = [id for id in ids if id.startswith(word)]
    if len(found) == 1:
        return read_run(root / found[0])
    if found:
        more = f" and {len(found) - 6} more" if len(found) > 6 else ""
        raise UserError(f"`{word}` begins the ids of {len(found)} runs: {', '.join(found[-6:])}{more}",
                        "give more of the id")
    near = difflib.get_close_matches(word, ids, n=3, cutoff=0.4)
    raise UserError(f"there is no run `{word}` in `{root}`",
                    f"did you mean {either(near)}?" if near
                    else "see `launch runs`; runs elsewhere: --runs DIR or LAUNCH_RUNS")


def find_sweep(root: Path, word: str) -> Path | None:
    """The folder of the sweep that `word` names: an id under `root`, the unique beginning of one, or a folder.

    Raises:
        UserError: several sweeps' ids begin so.
    """
    if not word:
        return None
    if os.sep in word or (root / word / SWEEP).is_file():
        folder = (Path(word) if os.sep in word else root / word).absolute()
        return folder if (folder / SWEEP).is_file() else None
    found = [name for name in _folders(root) if name.startswith(word) and (root / name / SWEEP).is_file()]
    if len(found) > 1:
        raise UserError(f"`{word}` begins the ids of {len(found)} sweeps: {', '.join(found[-6:])}", "give more of the id")
    return (root / found[0]).absolute() if found else None


def read_sweep(root: Path, word: str) -> dict[str, Any]:
    """sweep.json of the sweep that `word` names, and its `path`.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    folder = find_sweep(root, word)
    if folder is None:
        raise UserError(f"there is no sweep `{word}` in `{root.absolute()}`",
                        "`launch runs --json` says of each run of which sweep it is")
    try:
        return {**read_json(folder / SWEEP), "path": str(folder)}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read `{folder / SWEEP}`: {error}", "its runs are whole: see `launch runs`") from None


def list_runs(root: Path, sweep: str | None = None) -> list[dict[str, Any]]:
    """The record of every run, newest first, each with its true `state`, its `path`, and a `note` where the state
    needs one; run.json alone is read, and SLURM asked once for all that it has before it. One that cannot be read
    has the state `unreadable` and says why under `problem`.

    Args:
        sweep: its runs alone, in its order, each also with the `overrides` by which it differs.

    10,000 runs were read in 0.3 s (one core, files in the cache).
    """
    if sweep is None:
        names, overrides = _folders(root), {}
    else:
        found = read_sweep(root, sweep)
        root = Path(found["path"]).parent
        overrides = {point["run"]: point["overrides"] for point in found["points"]}
        names = list(overrides)
    rows, unsettled = [], []
    for name in names:
        folder = f"{root}/{name}"
        file = f"{folder}/run.json"  # RunPaths.record, without the cost of 10,000 Paths
        try:
            record = read_record(file)
            row = {**record, "state": local_state(record), "path": folder}
            if on_slurm(record):
                unsettled.append((row, Run(RunPaths(Path(folder)), record)))
        except FileNotFoundError:
            continue  # no run
        except (OSError, ValueError) as error:
            row = {"id": name, "task": None, "state": "unreadable", "step": None, "total": None,
                   "attempt": None, "job": None, "sweep": None, "metrics": {}, "checkpoint": None,
                   "created": _changed(folder), "updated": _changed(file),
                   "path": folder, "problem": str(error)}
        rows.append(row if sweep is None else {**row, "overrides": overrides[name]})
    for (row, _), (run, truth) in zip(unsettled, look([run for _, run in unsettled])):
        row.update(run.record, state=truth.state, **({"note": truth.note} if truth.note else {}))
    return rows if sweep else sorted(rows, key=lambda row: row["created"], reverse=True)


def status(run: Run) -> dict[str, Any]:
    """All that is known of a run: its record with the true `state`, and

    - `note`: what there is to say of the state, or None
    - `queue`: None, or what SLURM has before it: {"state", "reason", "reason_words", "position", "of", "start"
      (when it began, or SLURM's estimate of when it will), "nodes" (names, once it has some), "partition", "ids"}
    - `attempts`: their records, oldest first; `failure`: the last attempt's, or None
    - `slow`: of the ranks of a running attempt that are slower than the others, what launch/supervise/watchdog.py's `slow_ranks`
      says and the `node`
    - `loss`, `rate` (samples or tokens a second): as last logged, or None
    - `path`, `log` (rank 0 of the last attempt), `job_log` (the newest of node 0), `checkpoint_path`: where things
      lie, or None
    - `next`: what one might type now
    """
    [(run, truth)] = look([run])
    paths = run.paths
    attempts = [attempt_record(paths, number) for number in paths.attempt_numbers()]
    if attempts and attempts[-1]["outcome"] == "running" and truth.state not in ACTIVE:
        attempts[-1]["outcome"] = "lost"
    logs = paths.logs(attempts[-1]["attempt"]) if attempts else {}
    node_0 = [log.path for log in node_logs(run) if log.node == 0]
    checkpoint = run.record.get("checkpoint")
    trained = [line for line in _tail(paths.metrics) if line.get("split") == "train"]
    return {
        **run.record,
        "state": truth.state,
        "note": truth.note,
        "queue": _queue(truth.jobs),
        "attempts": attempts,
        "failure": attempts[-1].get("failure") if attempts else None,
        "slow": _slow(paths, attempts[-1]) if attempts and attempts[-1]["outcome"] == "running" else [],
        "loss": trained[-1].get("loss") if trained else None,
        "rate": trained[-1].get("rate") if trained else None,
        "path": str(paths.root),
        "log": str(logs[0]) if 0 in logs else None,
        "job_log": str(node_0[-1]) if node_0 else None,
        "checkpoint_path": None if checkpoint is None else str(paths.checkpoint(checkpoint)),
        "next": _next(run, truth),
    }


def _slow(paths: RunPaths, attempt: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        rows = read_json(paths.slow(attempt["attempt"]))
    except (OSError, ValueError):
        return []
    return [{**row, "node": node_of(attempt, row["rank"]) or attempt.get("host")} for row in rows]


def node_of(attempt: Mapping[str, Any], rank: int | None) -> str | None:
    """The node of one of an attempt's ranks, where it had several."""
    nodes, ranks = attempt.get("nodes"), attempt.get("ranks")
    return nodes[node_of_rank(rank, ranks, len(nodes))] if nodes and ranks and rank is not None else None


def slow_words(slow: Mapping[str, Any]) -> str:
    """'rank 3 on n2: 2.4 times the others' own work in a step (310 ms, 130 ms; a step takes 330 ms)'"""
    work, others, step = (f"{1000 * slow[key]:.3g} ms" for key in ("work_s", "others_s", "step_s"))
    return (f"rank {slow['rank']} on {slow['node']}: {slow['factor']:g} times the others' own work in a step "
            f"({work}, theirs {others}; a step takes {step})")


def _queue(jobs: Sequence[Queued]) -> dict[str, Any] | None:
    if not jobs:
        return None
    from launch.cluster import slurm

    job = next((job for job in jobs if not job.waiting), jobs[0])
    place, of = None, None
    if job.waiting and not reasons.NOT_ELIGIBLE.match(job.reason):
        try:
            place, of = slurm.position(job)
        except UserError:
            pass
    return {"state": job.state, "reason": job.reason if job.waiting else None,
            "reason_words": reasons.words(job.reason) if job.waiting else None, "position": place, "of": of,
            "start": job.start, "nodes": slurm.expand(job.node_list), "partition": job.partition,
            "ids": [job.id for job in jobs]}


@dataclass(frozen=True)
class NodeLog:
    """What the node process of one node of one job has said: the supervisor's words, and rank 0's."""

    submission: int
    job: str
    node: int
    path: Path


def node_logs(run: Run) -> list[NodeLog]:
    """The logs that node processes have left, oldest job first. Those of a sweep's array lie in the sweep's folder."""
    element = element_of(run)
    folders = [(run.paths, "*_log.out")]
    if element is not None:
        folders.append((RunPaths(run.paths.root.parent / run.record["sweep"]), f"*_{element}_*_log.out"))
    logs = [NodeLog(number, named[1], int(named[2]), path)
            for paths, pattern in folders for number in paths.submission_numbers()
            for path in paths.submission(number).glob(pattern)
            if (named := re.fullmatch(r"(\d+(?:_\d+)?)_(\d+)_log\.out", path.name))]
    return sorted(logs, key=lambda log: ([int(part) for part in log.job.split("_")], log.node))


def element_of(run: Run) -> int | None:
    """Which of its sweep's points it is, and so which element of the sweep's array."""
    try:
        sweep = read_json(run.paths.root.parent / run.record["sweep"] / SWEEP) if run.record.get("sweep") else {"points": []}
        return [point["run"] for point in sweep["points"]].index(run.id)
    except (OSError, ValueError, KeyError):
        return None


def _folders(root: Path) -> list[str]:
    """The names of the folders in `root`, sorted."""
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise UserError(f"`{root}` is no folder",
                        "give the folder that holds runs: --runs DIR or LAUNCH_RUNS") from None


def attempt_record(paths: RunPaths, number: int) -> dict[str, Any]:
    """An attempt's record; what is known without it where it is missing or broken (a full disk)."""
    try:
        return read_json(paths.attempt_record(number))
    except (OSError, ValueError):
        return {"attempt": number, "outcome": "unreadable", "failure": None}


def _tail(file: Path) -> list[dict[str, Any]]:
    """The last lines of a JSON lines file; a broken line (the last may be half written) is passed over."""
    try:
        with open(file, "rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            start = max(0, size - TAIL_BYTES)
            opened.seek(start)
            lines = opened.read().splitlines()[1 if start else 0:]
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _next(run: Run, truth: Truth) -> list[str]:
    job = run.record.get("job") or {}
    going = truth.jobs or truth.blind or truth.state in ACTIVE and job and truth.note != NOT_SUBMITTED
    if truth.state == "finished":
        return []
    if going:
        return [f"launch logs {run.id} --follow", f"launch cancel {run.id}"]
    if truth.state in ("failed", "lost"):
        return [f"launch explain {run.id}", f"launch logs {run.id}", f"launch resume {run.id}"]
    return [f"launch resume {run.id}"]


def _changed(file: str) -> str | None:
    """When the file was last changed, in UTC."""
    try:
        return utc_at(os.stat(file).st_mtime)
    except OSError:
        return None
