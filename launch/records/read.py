"""Read run directories: find a run, list all runs, and gather the status of one run."""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cluster import reasons
from launch.cluster.resources import node_of_rank
from launch.records.life_sign import doubt
from launch.records.naming import command_name
from launch.records.process import stopped
from launch.records.run import SWEEP, Run, read_record, read_run
from launch.records.state import ACTIVE, NOT_SUBMITTED, Truth, local_state, on_slurm, true_states
from trainers.checkpoints import folders
from trainers.contract.clock import utc_at, utc_now
from trainers.contract.errors import UserError, system_error
from trainers.contract.files import read_json
from trainers.contract.paths import RunPaths
from trainers.contract.text import either

if TYPE_CHECKING:  # imported only where SLURM is asked
    from launch.cluster.slurm import Queued

FORGOTTEN_DAYS = 30
TAIL_BYTES = 64 * 1024  # how much of metrics.jsonl is read, from its end: some hundred logged steps


def find_run(root: Path, word: str) -> Run:
    """Find a run.

    Args:
        root: the folder that holds the runs.
        word: the run's id, the beginning of only one id, or the path of the run's folder.

    Raises:
        UserError: there is no such run, there are several, or the run cannot be read.
    """
    if not word:
        raise UserError("the run's id is empty", "see `launch runs`")
    root = root.absolute()
    if os.sep in word or word in (".", ".."):
        folder = Path(word).resolve()
        if not folder.is_dir():
            raise UserError(f"the folder `{word}` does not exist", "give the id of a run (see `launch runs`) or its folder")
        return read_run(folder)
    if (root / word).is_dir():
        return read_run(root / word)
    if RunPaths(Path(word)).record.is_file():
        return read_run(Path(word).resolve())

    ids = [name for name in _folders(root) if RunPaths(root / name).record.exists()]
    matches = [id for id in ids if id.startswith(word)]
    if len(matches) == 1:
        return read_run(root / matches[0])
    if matches:
        more = f" and {len(matches) - 6} more" if len(matches) > 6 else ""
        raise UserError(f"{len(matches)} runs have an id that starts with `{word}`: {', '.join(matches[-6:])}{more}",
                        "give more of the id")
    for id, job in _jobs_without_folder(root).items():
        if id.startswith(word):
            raise UserError(f"there is no run `{id}` in `{root}`: its folder was deleted or moved, but SLURM has its job {job}",
                            f"end the job with `scancel {job}`, or give the path of the folder")
    near = difflib.get_close_matches(word, ids, n=3, cutoff=0.4)
    raise UserError(f"there is no run `{word}` in `{root}`",
                    f"did you mean {either(near)}?" if near
                    else "see `launch runs`; for runs in another folder use --runs DIR or LAUNCH_RUNS")


def _jobs_without_folder(root: Path) -> dict[str, str]:
    """Return the ids of the user's jobs whose run has no folder in `root` any more, by the run's id; none without SLURM."""
    if not shutil.which("squeue"):
        return {}
    from launch.cluster import slurm

    try:
        queue = slurm.queue()
    except UserError:
        return {}
    scripts = {id: re.fullmatch(rf"{re.escape(str(root))}/([^/]+)/submissions/\d+/job\.sh", job.script or "")
               for id, job in queue.items()}
    return {match[1]: id for id, match in scripts.items() if match and not RunPaths(root / match[1]).record.exists()}


def find_sweep(root: Path, word: str) -> Path | None:
    """Find the folder of a sweep; None if there is no such sweep.

    Args:
        root: the folder that holds the runs and sweeps.
        word: the sweep's id, the beginning of only one id, or the path of the sweep's folder.

    Raises:
        UserError: several sweeps have an id that starts with `word`.
    """
    if not word:
        return None
    if os.sep in word or (root / word / SWEEP).is_file():
        folder = (Path(word) if os.sep in word else root / word).absolute()
        return folder if (folder / SWEEP).is_file() else None
    matches = [name for name in _folders(root) if name.startswith(word) and (root / name / SWEEP).is_file()]
    if len(matches) > 1:
        raise UserError(f"{len(matches)} sweeps have an id that starts with `{word}`: {', '.join(matches[-6:])}",
                        "give more of the id")
    return (root / matches[0]).absolute() if matches else None


def read_sweep(root: Path, word: str) -> dict[str, Any]:
    """Return the content of a sweep's sweep.json, and the folder's `path`. `word` is as in `find_sweep`.

    Raises:
        UserError: there is no such sweep, there are several, or sweep.json cannot be read.
    """
    folder = find_sweep(root, word)
    if folder is None:
        raise UserError(f"there is no sweep `{word}` in `{root.absolute()}`",
                        "`launch runs --json` shows the sweep of each run")
    try:
        return {**read_json(folder / SWEEP), "path": str(folder)}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read `{folder / SWEEP}`: {error}", "its runs are not affected: see `launch runs`") from None


def list_runs(root: Path, sweep: str | None = None) -> list[dict[str, Any]]:
    """Return the record of every run, newest first, with the run's true `state`, its `path`, and a `note` if the state
    needs one.

    Only run.json is read, and SLURM is asked once about all runs that have not ended. SLURM is not asked about runs of which
    nothing was heard for FORGOTTEN_DAYS: otherwise it would be asked about a lost run for ever. A run whose record cannot be
    read has the state `unreadable`, and the reason is in `problem`.

    10,000 runs were read in 0.3 s (one core, files in the cache).

    Args:
        sweep: return only the runs of this sweep, in its order, each also with its `overrides`.

    Raises:
        UserError: there is no such sweep, or `root` is not a folder.
    """
    if sweep is None:
        names, overrides = _folders(root), {}
    else:
        record = read_sweep(root, sweep)
        root = Path(record["path"]).parent
        overrides = {point["run"]: point["overrides"] for point in record["points"]}
        names = list(overrides)
    rows, unsettled, long_ago = [], [], utc_at(time.time() - FORGOTTEN_DAYS * 86400)
    for name in names:
        folder = f"{root}/{name}"
        file = f"{folder}/run.json"  # RunPaths.record, without the cost of 10,000 Paths
        try:
            record = read_record(file)
            row = {**record, "state": local_state(record), "path": folder}
            if on_slurm(record) and sweep is None and (record.get("updated") or utc_now()) < long_ago:
                row["note"] = f"nothing was heard of it for {FORGOTTEN_DAYS} days; `launch status {name}` asks SLURM about it"
                row["state"] = "lost" if record["state"] == "running" else record["state"]
            elif on_slurm(record):
                unsettled.append((row, Run(RunPaths(Path(folder)), record)))
        except FileNotFoundError:
            continue  # the folder is not a run
        except (OSError, ValueError) as error:
            row = {"id": name, "task": None, "state": "unreadable", "step": None, "total": None,
                   "attempt": None, "job": None, "sweep": None, "metrics": {}, "checkpoint": None,
                   "created": _changed(folder), "updated": _changed(file),
                   "path": folder, "problem": str(error)}
        rows.append(row if sweep is None else {**row, "overrides": overrides[name]})
    for (row, _), (run, truth) in zip(unsettled, true_states([run for _, run in unsettled])):
        row.update(run.record, state=truth.state, **({"note": truth.note} if truth.note else {}))
    return rows if sweep else sorted(rows, key=lambda row: row["created"], reverse=True)


def status(run: Run) -> dict[str, Any]:
    """Return everything that is known about a run: its record with the true `state`, and

    - `note`: an explanation of the state, or None
    - `queue`: the run's job if it is waiting or running, or None: {"state", "reason", "reason_words", "position", "of",
      "start" (when it started, or when SLURM expects it to start), "nodes" (names, once it has nodes), "partition", "ids"}
    - `attempts`: the record of each attempt, oldest first
    - `failure`: the failure of the last attempt, or None
    - `slow`: the ranks of a running attempt that are slower than the others, as `slow_ranks` in
      launch/supervise/watchdog.py describes them, each with its `node`
    - `loss`, `rate` (samples or tokens per second): the last logged values, or None
    - `path`, `log` (of rank 0 in the last attempt), `job_log` (the newest of node 0), `checkpoint_path`: paths, or None
    - `next`: commands that the user may want to type now
    """
    [(run, truth)] = true_states([run])
    paths = run.paths
    attempts = [run.attempt_record(number) for number in paths.attempt_numbers()]
    if attempts and attempts[-1]["outcome"] == "running" and (truth.state not in ACTIVE or truth.restarted):
        attempts[-1]["outcome"] = "lost"
    going = attempts[-1] if attempts and attempts[-1]["outcome"] == "running" else None
    logs = paths.logs(attempts[-1]["attempt"]) if attempts else {}
    node_0 = [log.path for log in node_logs(run) if log.node == 0]
    newest = folders.newest(paths)  # the record may be older: its writer may have been killed after the commit
    checkpoint = run.record.get("checkpoint") if newest is None else newest
    trained = [line for line in _tail(paths.metrics) if line.get("split") == "train"]
    return {
        **run.record,
        "state": truth.state,
        "note": truth.note or (_doubt(run, going) if going and truth.state == "running" else None),
        "checkpoint": checkpoint,
        "queue": _queue(truth.jobs),
        "attempts": attempts,
        "failure": attempts[-1].get("failure") if attempts else None,
        "slow": _slow(paths, going) if going else [],
        "loss": trained[-1].get("loss") if trained else None,
        "rate": trained[-1].get("rate") if trained else None,
        "path": str(paths.root),
        "log": str(logs[0]) if 0 in logs else None,
        "job_log": str(node_0[-1]) if node_0 else None,
        "checkpoint_path": None if checkpoint is None else str(paths.checkpoint(checkpoint)),
        "next": _next(run, truth),
    }


def _doubt(run: Run, attempt: Mapping[str, Any]) -> str | None:
    """Return what speaks against an attempt that should be running; None if nothing does."""
    job = run.record["job"] or {}
    if job.get("kind") == "local" and job["host"] == socket.gethostname() and stopped(job["pid"]):
        return (f"process {job['pid']} is stopped, by Ctrl-Z or SIGSTOP: `fg` in its terminal or `kill -CONT {job['pid']}` "
                "continues it")
    return doubt(run.paths, attempt["attempt"], attempt.get("nodes") or [attempt.get("host") or "its host"])


def _slow(paths: RunPaths, attempt: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        rows = read_json(paths.slow(attempt["attempt"]))
    except (OSError, ValueError):
        return []
    return [{**row, "node": node_of(attempt, row["rank"]) or attempt.get("host")} for row in rows]


def node_of(attempt: Mapping[str, Any], rank: int | None) -> str | None:
    """Return the node of a rank, or None if the attempt's record does not list nodes. `attempt` is the record."""
    nodes, ranks = attempt.get("nodes"), attempt.get("ranks")
    return nodes[node_of_rank(rank, ranks, len(nodes))] if nodes and ranks and rank is not None else None


def slow_words(slow: Mapping[str, Any]) -> str:
    """Describe a slow rank in words. `slow` is an item of the list `slow` that `status` returns."""
    work, others, step = (f"{1000 * slow[key]:.3g} ms" for key in ("work_s", "others_s", "step_s"))
    return (f"rank {slow['rank']} on {slow['node']}: its own work in a step takes {slow['factor']:g} times as long as the "
            f"others' ({work} against {others}; a whole step takes {step})")


def _queue(jobs: Sequence[Queued]) -> dict[str, Any] | None:
    if not jobs:
        return None
    from launch.cluster import slurm

    job = next((job for job in jobs if not job.waiting), jobs[0])
    position, total = None, None
    if job.waiting and not reasons.NOT_ELIGIBLE.match(job.reason):
        try:
            position, total = slurm.position(job)
        except UserError:
            pass
    return {"state": job.state, "reason": job.reason if job.waiting else None,
            "reason_words": reasons.in_words(job.reason) if job.waiting else None, "position": position, "of": total,
            "start": job.start, "nodes": slurm.expand(job.node_list), "partition": job.partition,
            "ids": [job.id for job in jobs]}


@dataclass(frozen=True)
class NodeLog:
    """The log of one node process of one job: the supervisor's output, and rank 0's."""

    submission: int
    job: str
    node: int
    path: Path


def node_logs(run: Run) -> list[NodeLog]:
    """Return the logs of a run's node processes, oldest job first. The logs of a sweep's array are in the sweep's folder."""
    element = element_of(run)
    folders = [(run.paths, "*_log.out")]
    if element is not None:
        folders.append((RunPaths(run.paths.root.parent / run.record["sweep"]), f"*_{element}_*_log.out"))
    logs = [NodeLog(number, match[1], int(match[2]), path)
            for paths, pattern in folders for number in paths.submission_numbers()
            for path in paths.submission(number).glob(pattern)
            if (match := re.fullmatch(r"(\d+(?:_\d+)?)_(\d+)_log\.out", path.name))]
    return sorted(logs, key=lambda log: ([int(part) for part in log.job.split("_")], log.node))


def element_of(run: Run) -> int | None:
    """Return the index of the run among its sweep's points, which is its element of the sweep's array; None if it has none."""
    try:
        sweep = read_json(run.paths.root.parent / run.record["sweep"] / SWEEP) if run.record.get("sweep") else {"points": []}
        return [point["run"] for point in sweep["points"]].index(run.id)
    except (OSError, ValueError, KeyError):
        return None


def _folders(root: Path) -> list[str]:
    """Return the names of the folders in `root`, sorted; none if `root` does not exist.

    Raises:
        UserError: `root` is not a folder, or cannot be read.
    """
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except FileNotFoundError:
        if root.is_symlink():  # on a disk that is not mounted, for instance: the runs are not gone
            raise UserError(f"`{root}` is a link to `{os.readlink(root)}`, which does not exist",
                            "mount that disk, or give the folder that holds runs: --runs DIR or LAUNCH_RUNS") from None
        return []
    except NotADirectoryError:
        raise UserError(f"`{root}` is not a folder",
                        "give the folder that holds runs: --runs DIR or LAUNCH_RUNS") from None
    except OSError as error:
        raise system_error(error) from error


def _tail(file: Path) -> list[dict[str, Any]]:
    """Return the last objects of a JSON lines file. Broken lines are skipped: the last line may be half written."""
    try:
        with open(file, "rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            start = max(0, size - TAIL_BYTES)
            opened.seek(start)
            lines = opened.read().splitlines()[1 if start else 0:]
    except FileNotFoundError:
        return []
    values = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            values.append(value)
    return values


def _next(run: Run, truth: Truth) -> list[str]:
    """Return commands that the user may want to type now."""
    job = run.record.get("job") or {}
    active = truth.jobs or truth.unreachable or truth.state in ACTIVE and job and truth.note != NOT_SUBMITTED
    name = command_name(run.paths)
    if truth.state == "finished":
        return []
    if active:
        return [f"launch logs {name} --follow", f"launch cancel {name}"]
    if truth.state in ("failed", "lost"):
        return [f"launch explain {name}", f"launch logs {name}", f"launch resume {name}"]
    return [f"launch resume {name}"]


def _changed(file: str) -> str | None:
    """Return the time of the file's last change, in UTC; None if the file cannot be looked up."""
    try:
        return utc_at(os.stat(file).st_mtime)
    except OSError:
        return None
