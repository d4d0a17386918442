"""SLURM's own commands: the only file that calls squeue, sacct, scontrol, sinfo, scancel and sbatch.

Ids are written as SLURM writes them: "101" a job, "101_3" an element of an array, "101.0" a step.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product

from trainers.contract.errors import UserError

# Read by SLURM's commands, or left by an enclosing job, torchrun, accelerate or a run: none of them is for a job.
DROPPED = re.compile(r"(SLURM|SLURMD|SBATCH|SRUN|SALLOC|SQUEUE|SINFO|SCANCEL|SACCT|SCONTROL|PMI|PMIX|TORCHELASTIC)_"
                     r"|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)$|ROLE_NAME$|MASTER_(ADDR|PORT)$"
                     r"|(CUDA|ROCR|HIP)_VISIBLE_DEVICES$|GPU_DEVICE_ORDINAL$|ZE_AFFINITY_MASK$"
                     r"|LAUNCH_(RUN_DIR|ATTEMPT|EVENTS)$")
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
UNDER_WAY = {*WAITING, "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT",
             "RESIZING"}
# How the states of nodes begin on which nothing runs any more, and of those that only take no new jobs.
DOWN = ("DOWN", "FAIL", "NOT_RESPONDING", "NO_RESPOND", "UNKNOWN")
CLOSED = ("DRAIN", "MAINT")
IDS_A_CALL = 5000  # one argument of a command holds 128 KiB


@dataclass(frozen=True)
class Queued:
    """A job that SLURM has before it: one row of squeue."""

    id: str
    state: str               # PENDING, RUNNING, COMPLETING, ...
    reason: str              # why it does not run, in SLURM's word; "None"
    start: str | None        # when it started, or SLURM's estimate of when it will; ISO, UTC
    priority: int
    nodes: int
    node_list: str           # "n[1-2]"; "" while it waits
    partition: str           # several, if it may run in any of them: "a,b"
    script: str | None
    submitted: str | None    # ISO, UTC

    @property
    def waiting(self) -> bool:
        return self.state in WAITING


@dataclass(frozen=True)
class Ended:
    """What SLURM remembers of a job that is over."""

    id: str
    state: str               # COMPLETED, FAILED, CANCELLED, TIMEOUT, NODE_FAIL, OUT_OF_MEMORY, PREEMPTED, ...
    exit_code: int | None    # of its script; None if a signal ended that
    signal: int | None
    reason: str
    node_list: str
    ended: str | None        # ISO, UTC

    @property
    def nodes(self) -> list[str]:
        return expand(self.node_list)


@dataclass(frozen=True)
class Partition:
    """What a partition's nodes have; of unequal ones the most that any has."""

    name: str
    default: bool
    time_s: int | None       # the longest job; None: without end
    nodes: int
    gpus: dict[str, int]     # of a node, by type ("" where types have no names)
    cpus: int
    memory_mib: int
    state: str               # up, down, drain, inact

    @property
    def up(self) -> bool:
        return self.state == "up"


def environment(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What SLURM's commands get of an environment, and with sbatch the jobs: nothing that would change them unasked."""
    return {key: value for key, value in env.items() if (value if key == "SLURM_CONF" else not DROPPED.match(key))}


def available() -> bool:
    """Whether this host has SLURM's commands; not whether they reach a cluster."""
    return shutil.which("squeue") is not None


def call(*words: str, timeout_s: float = 30, check: bool = True, stdin: str | None = None) -> str:
    """What a command of SLURM prints.

    Args:
        check: whether its failing is an error here.

    Raises:
        UserError: it is not installed, did not answer in time, or failed: its own words.
    """
    env = environment()
    conf = env.get("SLURM_CONF")
    if conf and not os.path.exists(conf):  # SLURM would look for it for a minute
        raise UserError(f"SLURM_CONF says `{conf}`, and there is no such file", "mend it, or unset it")
    if words[0] != "sbatch":  # which hands its environment to the job
        env["LC_ALL"] = "C"
    try:
        done = subprocess.run(words, env=env, input=stdin, stdin=subprocess.DEVNULL if stdin is None else None,
                              capture_output=True, encoding="utf-8", errors="surrogateescape", timeout=timeout_s)
    except FileNotFoundError:
        raise UserError(f"there is no SLURM here: `{words[0]}` is not installed",
                        "use a host that has SLURM's commands, such as the cluster's login node") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"`{words[0]}` has not answered within {timeout_s:g} s",
                        "SLURM's controller may be busy or down (`scontrol ping`): try again later") from None
    if check and done.returncode:
        said = _said(words[0], done.stderr) or _said(words[0], done.stdout) or f"exit code {done.returncode}"
        raise UserError(f"`{words[0]}` failed: {said}", _hint(said))
    return done.stdout


def queue(ids: Iterable[str] | None = None) -> dict[str, Queued]:
    """The jobs that wait or run, by id (of an array each element): those of `ids` that there are, or all.

    One call of squeue for jobs (for every 5000), and one more if there are steps among the ids.

    Raises:
        UserError: see `call`.
    """
    if ids is None:
        return {job.id: job for job in _queued([])}
    wanted = set(ids)
    steps = {id for id in wanted if "." in id}
    found = [job for chunk in _chunks(_jobs(wanted - steps)) for job in _queued([f"--jobs={chunk}"])]
    for chunk in _chunks(sorted(steps)):
        for line in _squeue("--steps=" + chunk, "-o", "%i|%S|%P|%N").splitlines():
            id, start, partition, nodes = line.split("|")
            found.append(Queued(id, "RUNNING", "None", _time(start), 0, len(expand(nodes)), nodes, partition, None, None))
    return {job.id: job for job in found if job.id in wanted}


def history(ids: Iterable[str]) -> dict[str, Ended]:
    """What is remembered of those of `ids` that are over, by id: by SLURM's controller, for some minutes, then by its
    accounting, where there is any. A job that was requeued: of its last end.

    Raises:
        UserError: SLURM's controller does not answer.
    """
    wanted = set(ids)
    found = {ended.id: ended for chunk in _chunks(_jobs(id for id in wanted if "." not in id)) for ended in _remembered(chunk)
             if ended.id in wanted}
    for chunk in _chunks(_jobs(wanted - found.keys())):
        found |= {ended.id: ended for ended in _accounted(chunk) if ended.id in wanted - found.keys()}
    return found


def position(job: Queued) -> tuple[int, int]:
    """The place of a pending job among the pending jobs of its partition (of an array each element), by priority, and
    how many these are.

    Raises:
        UserError: see `call`.
    """
    rows = _squeue("--array", "--states=PENDING", f"--partition={job.partition}", "-o", "%i|%Q").splitlines()
    waiting = {id: int(priority) for id, _, priority in (row.partition("|") for row in rows)} | {job.id: job.priority}
    order = sorted(waiting, key=lambda id: (-waiting[id], _number(id)))
    return order.index(job.id) + 1, len(order)


def cancel(ids: Iterable[str], signal: str | None = None) -> None:
    """End jobs, or send their steps (not their batch scripts) a signal. Those that are over already are passed over.

    Raises:
        UserError: see `call`.
    """
    for chunk in _chunks(ids):
        try:
            call("scancel", "--quiet", *([f"--signal={signal}"] if signal else []), *chunk.split(","))
        except UserError as error:
            # What --quiet does not hold back: of a step that is gone, of a job that cannot be signalled any more, or not yet.
            over = r"Invalid job id|[Aa]lready comple|can not be altered now"
            if not all(re.search(over, part) for part in error.message.split("; ")):
                raise


def exclude(job: str, nodes: Iterable[str]) -> None:
    """Let a job that waits, or is on its way back into the queue, never start on these nodes.

    Raises:
        UserError: see `call`; it runs, for instance.
    """
    call("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")


def node_states(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Each node's state (IDLE, DOWN, DRAINED, ...; NOT_RESPONDING, if SLURM does not call it down yet) and the reason
    that was given for it ("" if none).

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
    """'mixed*' -> NOT_RESPONDING, 'down*' -> DOWN, 'idle~' (powered down) -> IDLE."""
    state = text.rstrip("*~#!%$@^-+").upper()
    return "NOT_RESPONDING" if "*" in text and not state.startswith("DOWN") else state


def is_down(state: str) -> bool:
    """Whether nothing runs any more on a node in this state."""
    return state.upper().startswith(DOWN)


def takes_jobs(state: str) -> bool:
    """Whether a node in this state takes new jobs."""
    return not state.upper().startswith(DOWN + CLOSED)


def kill_wait_s() -> float:
    """From SLURM's SIGTERM to its SIGKILL.

    Raises:
        UserError: see `call`.
    """
    found = re.search(r"^KillWait\s*=\s*(\d+)", call("scontrol", "show", "config"), re.MULTILINE)
    return float(found[1]) if found else 30.0  # SLURM's default


def partitions() -> list[Partition]:
    """The partitions that the user may see.

    Raises:
        UserError: see `call`.
    """
    from launch.cluster.times import seconds

    found: dict[str, Partition] = {}
    for row in call("sinfo", "--noheader", "--exact", "-o", "%P|%a|%l|%D|%c|%m|%G").splitlines():
        name, state, limit, nodes, cpus, memory, gres = row.split("|", 6)
        time_s = None if limit in ("infinite", "n/a") else seconds(limit)
        part = Partition(name.rstrip("*"), name.endswith("*"), time_s, int(nodes), gpus(gres), int(cpus), int(memory), state)
        if other := found.get(part.name):
            most = {kind: max(part.gpus.get(kind, 0), other.gpus.get(kind, 0)) for kind in {**other.gpus, **part.gpus}}
            part = Partition(part.name, part.default, part.time_s, part.nodes + other.nodes, most,
                             max(part.cpus, other.cpus), max(part.memory_mib, other.memory_mib), part.state)
        found[part.name] = part
    return list(found.values())


def gpus(gres: str) -> dict[str, int]:
    """'gpu:a100:4(S:0-1),gpu:v100:2,mps:8' -> {"a100": 4, "v100": 2}; 'gpu:8' -> {"": 8}."""
    found: dict[str, int] = {}
    for kind, count in re.findall(r"(?:^|,)gpu:(?:([^:,()]+):)?(\d+)", gres):
        found[kind] = found.get(kind, 0) + int(count)
    return found


def expand(node_list: str) -> list[str]:
    """'n[1-3,7],m01' -> ["n1", "n2", "n3", "n7", "m01"]."""
    names = []
    for word in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", node_list):
        parts = [_range(part[1:-1]) if part.startswith("[") else [part] for part in re.findall(r"\[[^\]]*\]|[^\[\]]+", word)]
        names += ["".join(choice) for choice in product(*parts)]
    return names


def _range(text: str) -> list[str]:
    """'01-03,7' -> ["01", "02", "03", "7"]."""
    names = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        names += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return names


def _squeue(*options: str) -> str:
    try:
        return call("squeue", "--noheader", "--all", *options)
    except UserError as error:
        if "Invalid job id" in error.message:  # said only if one job is asked for, and SLURM knows it no more
            return ""
        raise


def _queued(options: list[str]) -> Iterator[Queued]:
    for line in _squeue("--array", *options, "-o", "%i|%T|%S|%Q|%D|%N|%P|%V|%r|%o").splitlines():
        id, state, start, priority, nodes, node_list, partition, submitted, rest = line.split("|", 8)
        reason, _, script = rest.partition("|")  # last, since a path may hold anything but a line end
        if state in UNDER_WAY:
            yield Queued(id, state, reason, _time(start), int(priority), int(nodes), node_list, partition,
                         None if script == "(null)" else script, _time(submitted))


def _remembered(ids: str) -> Iterator[Ended]:
    # squeue and not scontrol: one call for all of them.
    fields = "JobArrayID:|,State:|,exit_code:|,EndTime:|,NodeList:|,Reason:"
    for line in _squeue("--array", "--states=all", f"--jobs={ids}", "-O", fields).splitlines():
        id, state, status, end, nodes, reason = line.split("|", 5)
        if state not in UNDER_WAY:
            code, signal = divmod(int(status), 256)
            yield Ended(id, state, *_exit(code, signal % 128), reason, nodes, _time(end))


def _accounted(ids: str) -> Iterator[Ended]:
    try:
        lines = call("sacct", "--noheader", "--parsable2", f"--jobs={ids}",
                     "--format=JobID,State,ExitCode,End,NodeList,Reason").splitlines()
    except UserError:
        return  # most often "Slurm accounting storage is disabled"
    for line in lines:
        id, state, code, end, nodes, reason = line.split("|", 5)
        state = state.partition(" ")[0]  # "CANCELLED by 1000"
        if state not in UNDER_WAY:  # it lags behind the controller
            exit_code, _, signal = code.partition(":")
            nodes = "" if nodes == "None assigned" else nodes
            yield Ended(id, state, *_exit(int(exit_code or 0), int(signal or 0)), reason, nodes, _time(end))


def _exit(code: int, signal: int) -> tuple[int | None, int | None]:
    return (None, signal) if signal else (code, None)


def _jobs(ids: Iterable[str]) -> list[str]:
    """The jobs that the ids are of, each once: for a thousand elements of an array one."""
    return sorted({re.match(r"\d*", id)[0] for id in ids})


def _chunks(ids: Iterable[str]) -> Iterator[str]:
    ids = list(ids)
    for i in range(0, len(ids), IDS_A_CALL):
        yield ",".join(ids[i:i + IDS_A_CALL])


def _number(id: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", id)]


def _time(text: str) -> str | None:
    """SLURM's local time as the records have it: ISO, UTC. None for 'N/A', 'Unknown'."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC).isoformat(timespec="seconds")
    except ValueError:
        return None


def _said(program: str, text: str) -> str:
    """The end of a command's complaint on one line, without its own name before each part."""
    lines = [re.sub(rf"^{program}: (error: |fatal: )?", "", line.strip()) for line in text.splitlines()]
    return "; ".join(list(dict.fromkeys(line for line in lines if line))[-3:])


def _hint(said: str) -> str | None:
    if re.search(r"configuration source|configuration file|slurm\.conf", said):
        return "SLURM's commands are here but no cluster: is SLURM_CONF right, and this host one of the cluster's?"
    if re.search(r"[Uu]nable to contact|Connection refused|[Tt]imed out|Zero Bytes", said):
        return "SLURM's controller may be down (`scontrol ping`): try again later"
    return None
