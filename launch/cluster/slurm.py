"""SLURM's own commands: what they print, as data.

Ids have SLURM's form: "101" is a job, "101_3" an element of a job array, "101.0" a job step.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product

from launch.cluster.slurm_command import call
from trainers.contract.errors import UserError

WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
UNDER_WAY = {*WAITING, "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT",
             "RESIZING"}
# Beginnings of node states. DOWN: nothing runs on the node any more. CLOSED: the node takes no new jobs, but its present jobs
# may still run.
DOWN = ("DOWN", "FAIL", "NOT_RESPONDING", "NO_RESPOND", "UNKNOWN")
CLOSED = ("DRAIN", "MAINT")
IDS_PER_CALL = 5000  # one argument of a command may have 128 KiB
# What squeue prints of a job: as long as the value is, each value followed by |.
FIELDS = ("JobArrayID:|,State:|,exit_code:|,StartTime:|,EndTime:|,PriorityLong:|,NumNodes:|,NodeList:|,Partition:|,"
          "SubmitTime:|,Reason:|,Command:")


@dataclass(frozen=True)
class Queued:
    """A job that waits or runs: one row of squeue."""

    id: str
    state: str               # PENDING, RUNNING, COMPLETING, ...
    reason: str              # why the job does not run, in SLURM's word; "None" if there is none
    start: str | None        # when the job started, or SLURM's estimate of its start; ISO, UTC
    priority: int
    nodes: int
    node_list: str           # "n[1-2]"; "" while the job waits
    partition: str           # "a,b" if the job may run in either
    script: str | None
    submitted: str | None    # ISO, UTC

    @property
    def waiting(self) -> bool:
        return self.state in WAITING


@dataclass(frozen=True)
class Ended:
    """A job that has ended, as SLURM remembers it."""

    id: str
    state: str               # COMPLETED, FAILED, CANCELLED, TIMEOUT, NODE_FAIL, OUT_OF_MEMORY, PREEMPTED, ...
    exit_code: int | None    # exit code of the job script; None if a signal ended the script
    signal: int | None
    reason: str
    node_list: str
    ended: str | None        # ISO, UTC
    script: str | None = None  # None: not known; SLURM's accounting does not say it

    @property
    def nodes(self) -> list[str]:
        return expand(self.node_list)


@dataclass(frozen=True)
class Partition:
    """A partition and the size of its nodes. If nodes differ, each number is that of the largest node."""

    name: str
    default: bool
    time_s: int | None       # longest time limit of a job; None: no limit
    nodes: int
    gpus: dict[str, int]     # GPUs of a node, by type ("" for GPUs without a type)
    cpus: int                # CPU cores of a node
    memory_mib: int          # memory of a node
    state: str               # up, down, drain, inact

    @property
    def up(self) -> bool:
        return self.state == "up"


def queue(ids: Iterable[str] | None = None) -> dict[str, Queued]:
    """Return the jobs that wait or run, by id. Each element of a job array counts as a job.

    Args:
        ids: return only these; None: return all of this user.

    Raises:
        UserError: see `call`.
    """
    if ids is None:
        return {job.id: job for job in _jobs_of_squeue(f"--user={os.getuid()}") if isinstance(job, Queued)}
    return look(ids, ended=False)[0]


def look(ids: Iterable[str], ended: bool = True) -> tuple[dict[str, Queued], dict[str, Ended]]:
    """Return the jobs among `ids` that wait or run, and those that have ended and that SLURM's controller still remembers.

    squeue is called once for every 5000 jobs, and again for every 5000 job steps among the ids.

    Args:
        ended: whether to ask for jobs that have ended.

    Raises:
        UserError: see `call`.
    """
    wanted = set(ids)
    steps = {id for id in wanted if "." in id}
    states = ["--states=all"] if ended else []
    found = {job.id: job for chunk in _chunks(_jobs(wanted - steps)) for job in _jobs_of_squeue(*states, f"--jobs={chunk}")
             if job.id in wanted}
    for chunk in _chunks(sorted(steps)):
        for line in _squeue("--steps=" + chunk, "-o", "%i|%S|%P|%N").splitlines():
            id, start, partition, nodes = line.split("|")
            found[id] = Queued(id, "RUNNING", "None", _time(start), 0, len(expand(nodes)), nodes, partition, None, None)
    return ({id: job for id, job in found.items() if isinstance(job, Queued) and id in wanted},
            {id: job for id, job in found.items() if isinstance(job, Ended)})


def history(ids: Iterable[str]) -> dict[str, Ended]:
    """Return the jobs among `ids` that have ended, by id.

    SLURM's controller remembers a job for some minutes. Older jobs are looked up in SLURM's accounting, if the cluster has
    accounting. If a job was requeued and ended several times, the last end counts.

    Raises:
        UserError: SLURM's controller does not answer.
    """
    wanted = set(ids)
    found = look(id for id in wanted if "." not in id)[1]
    return found | accounted(wanted - found.keys())


def accounted(ids: Iterable[str]) -> dict[str, Ended]:
    """Return the jobs among `ids` that have ended according to SLURM's accounting; none if the cluster has no accounting."""
    wanted = set(ids)
    return {ended.id: ended for chunk in _chunks(_jobs(wanted)) for ended in _accounted(chunk) if ended.id in wanted}


def position(job: Queued) -> tuple[int, int]:
    """Return (a pending job's place in the queue of its partition, the length of that queue). Jobs are in order of priority.

    Each element of a job array counts as a job.

    Raises:
        UserError: see `call`.
    """
    rows = _squeue("--array", "--states=PENDING", f"--partition={job.partition}", "-o", "%i|%Q").splitlines()
    waiting = {id: int(priority) for id, _, priority in (row.partition("|") for row in rows)} | {job.id: job.priority}
    order = sorted(waiting, key=lambda id: (-waiting[id], _number(id)))
    return order.index(job.id) + 1, len(order)


def cancel(ids: Iterable[str], signal: str | None = None) -> None:
    """Cancel jobs, or send a signal to their steps (not to their batch scripts). Skip jobs that have already ended.

    Raises:
        UserError: see `call`.
    """
    for chunk in _chunks(ids):
        try:
            call("scancel", "--quiet", *([f"--signal={signal}"] if signal else []), *chunk.split(","))
        except UserError as error:
            # Even with --quiet, scancel prints errors about a step that has ended, and about a job that cannot get signals
            # yet, or no longer can.
            over = r"Invalid job id|[Aa]lready comple|can not be altered now"
            if not all(re.search(over, part) for part in error.message.split("; ")):
                raise


def excluded(job: str) -> list[str]:
    """Return the nodes that a job of the queue excludes: those that the user excludes, and those excluded since.

    Raises:
        UserError: see `call`.
    """
    lines = _squeue("--array", f"--jobs={job}", "-o", "%x").splitlines()
    return sorted({name for line in lines for name in expand(line) if name != "(null)"})


def exclude(job: str, nodes: Iterable[str]) -> None:
    """Exclude nodes from a job that waits or is being requeued.

    Raises:
        UserError: see `call`; for example, the job is running.
    """
    call("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")


def node_states(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return each node's state and the reason that was given for the state ("" if there is none).

    States are IDLE, DOWN, DRAINED and so on, and NOT_RESPONDING for a node that SLURM does not call down yet.

    Raises:
        UserError: see `call`.
    """
    names = list(names)
    if not names:
        return {}
    rows = call("sinfo", "--noheader", "--all", "--Node", f"--nodes={','.join(names)}", "-o", "%N|%T|%E").splitlines()
    return {name: (node_state(state), "" if reason == "none" else reason)
            for name, state, reason in (row.split("|", 2) for row in rows)}


def node_state(text: str) -> str:
    """Return a node's state without SLURM's suffixes.

    'mixed*' -> NOT_RESPONDING, 'down*' -> DOWN, 'idle~' (powered down) -> IDLE.
    """
    state = text.rstrip("*~#!%$@^-+").upper()
    return "NOT_RESPONDING" if "*" in text and not state.startswith("DOWN") else state


def is_down(state: str) -> bool:
    """Return whether nothing runs any more on a node in this state."""
    return state.upper().startswith(DOWN)


def takes_jobs(state: str) -> bool:
    """Return whether a node in this state takes new jobs."""
    return not state.upper().startswith(DOWN + CLOSED)


def time_left_s(job: str) -> int | None:
    """Return the seconds until a running job's time limit; None if the job has no limit or does not run.

    Raises:
        UserError: see `call`.
    """
    from launch.cluster.times import seconds

    left = _squeue(f"--jobs={job}", "-o", "%L").strip()
    if not re.fullmatch(r"[\d:-]+", left):  # UNLIMITED, or nothing
        return None
    return seconds(left) if re.search("[1-9]", left) else 0


def kill_wait_s() -> float:
    """Return the seconds from SLURM's SIGTERM to its SIGKILL.

    Raises:
        UserError: see `call`.
    """
    match = re.search(r"^KillWait\s*=\s*(\d+)", call("scontrol", "show", "config"), re.MULTILINE)
    return float(match[1]) if match else 30.0  # SLURM's default


def partitions() -> list[Partition]:
    """Return the partitions that the user may see.

    Raises:
        UserError: see `call`.
    """
    from launch.cluster.times import seconds

    result: dict[str, Partition] = {}
    for row in call("sinfo", "--noheader", "--exact", "-o", "%P|%a|%l|%D|%c|%m|%G").splitlines():
        name, state, limit, nodes, cpus, memory, gres = row.split("|", 6)
        time_s = None if limit in ("infinite", "n/a") else seconds(limit)
        part = Partition(name.rstrip("*"), name.endswith("*"), time_s, int(nodes), gpus(gres), int(cpus), int(memory), state)
        if other := result.get(part.name):  # sinfo prints a row for each kind of node
            most = {kind: max(part.gpus.get(kind, 0), other.gpus.get(kind, 0)) for kind in {**other.gpus, **part.gpus}}
            part = Partition(part.name, part.default, part.time_s, part.nodes + other.nodes, most,
                             max(part.cpus, other.cpus), max(part.memory_mib, other.memory_mib), part.state)
        result[part.name] = part
    return list(result.values())


def gpus(gres: str) -> dict[str, int]:
    """Return the number of GPUs in a list of gres, by type.

    'gpu:a100:4(S:0-1),gpu:v100:2,mps:8' -> {"a100": 4, "v100": 2}; 'gpu:8' -> {"": 8}.
    """
    counts: dict[str, int] = {}
    for kind, count in re.findall(r"(?:^|,)gpu:(?:([^:,()]+):)?(\d+)", gres):
        counts[kind] = counts.get(kind, 0) + int(count)
    return counts


def expand(node_list: str) -> list[str]:
    """Return the names in a list of nodes: 'n[1-3,7],m01' -> ["n1", "n2", "n3", "n7", "m01"]."""
    names = []
    for word in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", node_list):
        parts = [_range(part[1:-1]) if part.startswith("[") else [part] for part in re.findall(r"\[[^\]]*\]|[^\[\]]+", word)]
        names += ["".join(choice) for choice in product(*parts)]
    return names


def _range(text: str) -> list[str]:
    """Return the numbers of a range: '01-03,7' -> ["01", "02", "03", "7"]."""
    names = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        names += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return names


def _squeue(*options: str) -> str:
    try:
        return call("squeue", "--noheader", "--all", *options)
    except UserError as error:
        if "Invalid job id" in error.message:  # squeue fails so only for a single job that SLURM has forgotten
            return ""
        raise


def _jobs_of_squeue(*options: str) -> Iterator[Queued | Ended]:
    # squeue and not scontrol: one call of squeue covers all jobs.
    for line in _squeue("--array", *options, "-O", FIELDS).splitlines():
        # The script comes last: a path may hold any character but a line end.
        id, state, status, start, end, priority, nodes, node_list, partition, submitted, reason, script = line.split("|", 11)
        if state in UNDER_WAY:
            yield Queued(id, state, reason, _time(start), int(priority), int(nodes), node_list, partition,
                         None if script == "(null)" else script, _time(submitted))
        else:
            code, signal = divmod(int(status), 256)
            yield Ended(id, state, *_exit(code, signal % 128), reason, node_list, _time(end),
                        None if script == "(null)" else script)


def _accounted(ids: str) -> Iterator[Ended]:
    try:
        lines = call("sacct", "--noheader", "--parsable2", f"--jobs={ids}",
                     "--format=JobID,State,ExitCode,End,NodeList,Reason").splitlines()
    except UserError:
        return  # most often "Slurm accounting storage is disabled"
    for line in lines:
        id, state, code, end, nodes, reason = line.split("|", 5)
        state = state.partition(" ")[0]  # "CANCELLED by 1000"
        if state not in UNDER_WAY:  # accounting lags behind the controller
            exit_code, _, signal = code.partition(":")
            nodes = "" if nodes == "None assigned" else nodes
            yield Ended(id, state, *_exit(int(exit_code or 0), int(signal or 0)), reason, nodes, _time(end))


def _exit(code: int, signal: int) -> tuple[int | None, int | None]:
    return (None, signal) if signal else (code, None)


def _jobs(ids: Iterable[str]) -> list[str]:
    """Return the ids of the jobs to which the ids belong, each once: one id for all elements of an array."""
    return sorted({re.split(r"\D", id, maxsplit=1)[0] for id in ids})


def _chunks(ids: Iterable[str]) -> Iterator[str]:
    ids = list(ids)
    for i in range(0, len(ids), IDS_PER_CALL):
        yield ",".join(ids[i:i + IDS_PER_CALL])


def _number(id: str) -> list[int]:
    """Return the numbers in an id, to sort by: '101_3' -> [101, 3]."""
    return [int(number) for number in re.findall(r"\d+", id)]


def _time(text: str) -> str | None:
    """Return SLURM's local time in the form of our records, ISO in UTC; None for 'N/A' and 'Unknown'."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC).isoformat(timespec="seconds")
    except ValueError:
        return None
