"""What would go wrong, found before anything is queued."""

from __future__ import annotations

import io
import json
import operator
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from launch import local, record, slurm, snapshot
from launch.batch import Request, make_job, slurm_time
from launch.cluster import ClusterConfig
from launch.explain import explain
from launch.plan import make_plan
from launch.resources import Resources, local_resources, slurm_resources, visible_gpus
from launch.runs import read_run
from launch.spec import Spec, script_spec
from launch.start import new_run_id
from launch.submit import OWN, code_of, make_submission, submit, try_out
from launch.sync import has_key, server
from launch.view import make_view
from trainers.errors import UserError
from trainers.files import read_json
from trainers.paths import RunPaths

DISTRIBUTION = "launch-training"
PROBE = OWN / "trainers" / "probe.py"
ROOM_BYTES, ROOM_FILES = 10 * 2**30, 10_000  # fewer are few
RECENT_RUNS = 50   # whose checkpoints are looked at
LISTED = 8         # nodes by name
START_S = 300.0    # for the small job to start
END_S = 240.0      # and then to end
TROUBLE_S = 20.0   # of these, once it has failed, or a node has complained and no rank has begun
GONE_S = 30.0      # and then to leave the queue
JOB_TIME = "5m"
JOB_GRACE_S = 10

# File systems that other hosts do not see. Any other is taken for a shared one: their names are many.
LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "vfat", "exfat", "ntfs", "tmpfs", "ramfs", "rootfs", "overlay",
         "squashfs", "iso9660", "devtmpfs", "ecryptfs"}
UNFIT = ("DOWN", "FAIL", "DRAIN", "NOT_RESPONDING", "UNKNOWN", "MAINT")  # how the states of nodes begin that take no jobs
COMPARE = {">=": operator.ge, "<=": operator.le, "<": operator.lt, ">": operator.gt, "==": operator.eq, "!=": operator.ne}
MENDS = {  # by what has failed; those of the probes in their order
    "folder": "all nodes must see the folder of runs, and you must be allowed to write there: --runs DIR, or `runs:` in the "
              "cluster's file",
    "torch": "`python:` and `setup:` in the cluster's file say which Python the nodes run: is torch installed there?",
    "GPU": "the driver must be there and fit torch's CUDA (`nvidia-smi` on that node); sbatch.exclude=NODE does without it",
    "all-reduce": "`interface:` in the cluster's file names the network between nodes; NCCL_DEBUG=INFO in its `env:` makes NCCL "
                  "say more",
}
START = "`setup:`, `prefix:`, `python:` and `interface:` in the cluster's file say how nodes start launch"
COMPLAINT = re.compile(r"^(?:slurmstepd[^:]*: error: .*|.*/slurm_script: .*|error: .*|\S*Error: .*)$", re.MULTILINE)
CONSEQUENCE = re.compile(r"CANCELLED AT|did not come|could not be reached")  # of what another node did


@dataclass(frozen=True)
class Check:
    name: str
    ok: Literal["ok", "warning", "error"]
    what: str                # was found
    mend: str | None = None


def doctor(cluster: ClusterConfig, runs: Path, job: bool = False, nodes: int | None = None,
           say: Callable[[str], object] = lambda text: None) -> Iterator[Check]:
    """Look at what runs on this cluster will need, one thing after another. Nothing is written but for a moment.

    Args:
        runs: the folder where runs will lie, absolute.
        job: try it, in a run of a minute on `nodes` nodes (by default two, if there are as many) which is removed
            afterwards, unless it fails.
        say: told what is waited for.
    """
    yield from _software()
    yield from _folder(cluster, runs)
    reached = cluster.kind == "local"
    if reached:
        count = visible_gpus(os.environ)
        yield Check("GPUs", "ok", f"{count} visible" + ("" if count else ": runs here use the CPU"))
    else:
        for check in _slurm(cluster, runs):
            reached |= check.name == "slurm" and check.ok == "ok"
            yield check
    yield Check("W&B", "ok", f"there is a key for {server(os.environ)}" if has_key() else
                f"no key for {server(os.environ)}: wandb.mode=online tracks offline (`wandb login`, or WANDB_API_KEY)")
    if job and reached:
        yield from _job_on_slurm(cluster, runs, nodes, say) if cluster.kind == "slurm" else _job_here(cluster, runs, say)


def line(check: Check) -> str:
    """A check for a person."""
    mend = f"\n{'':<21}{check.mend}" if check.mend and check.ok != "ok" else ""
    return f"{check.ok:<9}{check.name:<12}{check.what}{mend}"


# Software


def _software() -> Iterator[Check]:
    """By what is recorded of installed packages: none is imported."""
    python, wanted = requirements()
    here = ".".join(map(str, sys.version_info[:3]))
    if not fits(here, python):
        yield Check("Python", "error", f"{here}; {python} is needed", "install launch into a newer Python")
    there = {name: _version(name) for name in wanted}
    bad = [name for name, version in there.items() if version is None or not fits(version, wanted[name])]
    for name in bad:
        yield Check("packages", "error", f"{name} {there[name] or 'is not installed'}; {wanted[name] or 'any version'} is needed",
                    f"{sys.executable} -m pip install '{name}{wanted[name]}'")
    if not bad:
        yield Check("packages", "ok", ", ".join([f"Python {here}", *(f"{name} {version}" for name, version in there.items())]))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements(pyproject: Path = OWN / "pyproject.toml") -> tuple[str, dict[str, str]]:
    """(the versions of Python, those of each package): of a clone as its pyproject.toml says, else as was installed."""
    try:
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        python, wanted = project["requires-python"], project["dependencies"]
    except OSError:
        python = metadata.metadata(DISTRIBUTION)["Requires-Python"]
        wanted = [text for text in metadata.requires(DISTRIBUTION) or () if "extra ==" not in text]
    return python, dict(re.match(r"\s*([\w.-]+)\s*([^;]*)", text).groups() for text in wanted)


def fits(version: str, versions: str) -> bool:
    """Whether '2.11.0+cu128' is among '>=2.11,<3'. Of a version its numbers count: 2.11.0a0 is 2.11."""
    def numbers(text: str) -> list[int]:
        found = [int(number) for number in re.match(r"[\d.]*", text)[0].split(".") if number]
        return found + [0] * (6 - len(found))

    bounds = re.findall(r"([<>=!]=?)\s*([\w.]+)", versions)
    return all(COMPARE[sign](numbers(version), numbers(bound)) for sign, bound in bounds)


# The folder of runs


def _folder(cluster: ClusterConfig, runs: Path) -> Iterator[Check]:
    there = next(path for path in (runs, *runs.parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there):
            pass
    except OSError as error:
        yield Check("runs", "error", f"nothing can be written into {there}: {error.strerror}", "--runs DIR, or LAUNCH_RUNS")
        return
    kind, source = file_system(there)
    space, names = shutil.disk_usage(there), os.statvfs(there)
    what = f"{runs} can be written: {kind} ({source}), {space.free / 2**30:.0f} GiB free"
    if space.free < ROOM_BYTES or 0 < names.f_files and names.f_favail < ROOM_FILES:
        yield Check("runs", "warning", f"{what}, room for {names.f_favail} files", "make room: checkpoints need it")
    else:
        yield Check("runs", "ok", what)
    if cluster.kind == "slurm" and not _alone(cluster):
        python = [] if cluster.prefix else [("Python", Path(cluster.python or sys.prefix))]
        for name, path in [("the folder of runs", there), *python, *([("`data`", Path(cluster.data))] if cluster.data else [])]:
            kind, source = file_system(path)
            if kind in LOCAL:
                yield Check("shared", "warning", f"{name}, {path}, is on {kind} ({source}), which other hosts most likely do "
                            "not see", "the nodes must: --job tries whether they do")


def file_system(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> tuple[str, str]:
    """(type, source) of the file system that a path lies on; "?" where that cannot be found out."""
    found = ("?", "?")
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return found
    real, longest = os.path.realpath(path), ""
    for mount, _, about in (row.partition(" - ") for row in lines):
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), mount.split()[4])
        if (real == point or real.startswith(point.rstrip("/") + "/")) and len(point) >= len(longest):
            longest, found = point, tuple(about.split()[:2])
    return found


def _alone(cluster: ClusterConfig) -> bool:
    """Whether this very host is all the nodes."""
    import psutil

    mine = {socket.gethostname(), "localhost",
            *(address.address for found in psutil.net_if_addrs().values() for address in found)}
    try:
        return {row["address"] for row in _nodes(cluster)} <= mine
    except UserError:
        return False


# SLURM


def _slurm(cluster: ClusterConfig, runs: Path) -> Iterator[Check]:
    try:
        controller = slurm.call("scontrol", "ping").strip().splitlines()[0]
        config = dict(re.findall(r"^(\S+)\s+= (.*?)\s*$", slurm.call("scontrol", "show", "config"), re.MULTILINE))
    except UserError as error:
        mend = error.hint or "SLURM's controller is down, or cannot be reached from this host: ask your site, or try again later"
        yield Check("slurm", "error", error.message.partition(";")[0], mend)
        return
    yield Check("slurm", "ok", f"SLURM {config.get('SLURM_VERSION')}, cluster {config.get('ClusterName')}: {controller}")
    for check in (_partition, _sizes, _ends):
        try:
            yield from check(cluster, runs, config)
        except UserError as error:
            yield Check("slurm", "error", error.message, error.hint)


def _nodes(cluster: ClusterConfig) -> list[dict[str, str]]:
    """The nodes of the partition, or of all: {"name", "address", "state", "reason"}. Raises: UserError."""
    names = ("name", "address", "state", "reason")
    where = [f"--partition={','.join(part.name for part in parts)}"] if (parts := _partitions(cluster)) else ["--all"]
    rows = slurm.call("sinfo", "--noheader", *where, "--Node", "-o", "%N|%o|%T|%E").splitlines()
    return [dict(zip(names, row.split("|", 3))) for row in dict.fromkeys(rows)]


def _partitions(cluster: ClusterConfig) -> list[slurm.Partition]:
    """Those that its jobs may go to. Raises: UserError."""
    wanted = (cluster.partition or "").split(",")
    return [part for part in slurm.partitions() if part.name in wanted or not cluster.partition and part.default]


def _partition(cluster: ClusterConfig, runs: Path, config: Mapping[str, str]) -> Iterator[Check]:
    for part in _partitions(cluster):
        longest = slurm_time(part.time_s) if part.time_s else "no limit"
        what = f"{part.name}: {part.nodes} node(s), jobs of up to {longest}; runs ask for {cluster.time}"
        yield Check("partition", "ok", what) if part.up else Check("partition", "warning", f"{part.name} is {part.state}",
                                                                  "jobs wait until it takes them again")
    nodes = _nodes(cluster)
    unfit = [f"{node['name']} ({node['state']}{'' if node['reason'] == 'none' else ', ' + node['reason']})" for node in nodes
             if node["state"].upper().startswith(UNFIT) or "*" in node["state"]]
    told = ", ".join(unfit[:LISTED]) + (f" and {len(unfit) - LISTED} more" if len(unfit) > LISTED else "")
    if unfit:
        what = f"{len(unfit)} of {len(nodes)} take no jobs: {told}"
        yield Check("nodes", "error" if len(unfit) == len(nodes) else "warning", what, "`sinfo -R` says since when and why")
    elif nodes:
        yield Check("nodes", "ok", f"all {len(nodes)} are in order")


def _sizes(cluster: ClusterConfig, runs: Path, config: Mapping[str, str]) -> Iterator[Check]:
    """Whether SLURM would ever run a job as this cluster's file describes it: the smallest, and on a whole node."""
    whole = [1] if cluster.gpus_per_node or cluster.cpus_per_node else []
    done = []
    for count in (None, *whole):
        try:
            resources = slurm_resources(cluster, None, None, count)
            job = make_job(Request(cluster), resources, name="doctor", folder=str(runs / "doctor"),
                           python=cluster.python or sys.executable, grace_s=_spec(cluster).config.run.grace_s)
            try_out(job, resources)
            done.append(_size(resources))
        except UserError as error:
            what = "the smallest job" if count is None else "a whole node"
            yield Check("sbatch", "error", f"{what}: {error.message}", error.hint)
    if done:
        yield Check("sbatch", "ok", f"would take {' and '.join(dict.fromkeys(done))}")


def _size(resources: Resources) -> str:
    what = f"{resources.gpus} GPU(s)" if resources.gpus else f"{resources.ranks} CPU rank(s)"
    return f"{what} on {resources.nodes} node(s)"


def _ends(cluster: ClusterConfig, runs: Path, config: Mapping[str, str]) -> Iterator[Check]:
    """How jobs end, and come back, and what is remembered of them."""
    if config.get("AccountingStorageType", "").endswith("/none"):
        age = config.get("MinJobAge", "?")
        yield Check("accounting", "ok", f"none: what became of a job is known for {age} after its end, then by the run's record")
    else:
        yield Check("accounting", "ok", config.get("AccountingStorageType", "?"))
    if cluster.requeue:
        own = "" if config.get("JobRequeue") == "1" else "; not by default here, but jobs ask for it"
        yield Check("requeue", "ok", f"jobs come back after time limits and preemption{own}")
    else:
        yield Check("requeue", "ok", f"`requeue: false`: a chain of {cluster.chain} jobs takes its place")
    grace_s, kill_s = _spec(cluster).config.run.grace_s, _preempted_s(cluster, config)
    yield grace(grace_s, kill_s, slowest_checkpoint(runs))


def grace(grace_s: float, kill_s: float, slowest: tuple[float, str] | None) -> Check:
    """Whether stops leave enough time for a checkpoint.

    Args:
        kill_s: what SLURM leaves a job that it preempts, requeues or cancels.
        slowest: the seconds that a checkpoint took, and of which run.
    """
    given = f"run.grace_s is {grace_s:g} s; preempted, a job is killed after {kill_s:g} s"
    if slowest is None:
        return Check("grace", "ok", f"{given}; no run here has timed a checkpoint yet")
    took = f"{given}; the slowest checkpoint took {slowest[0]:.1f} s (of {slowest[1]})"
    if slowest[0] > grace_s:
        return Check("grace", "warning", took, f"`defaults: {{run: {{grace_s: {round(3 * slowest[0])}}}}}` in the cluster's file")
    if slowest[0] > kill_s:
        return Check("grace", "warning", took, "a preempted run goes on from the checkpoint before: a lower checkpoint.every "
                     "loses less; the site may raise KillWait, or the partition's GraceTime")
    return Check("grace", "ok", took)


def _preempted_s(cluster: ClusterConfig, config: Mapping[str, str]) -> float:
    """From the signal to the end of a job that is preempted."""
    def seconds(text: str) -> int:
        return int(re.match(r"\d*", text)[0] or 0)

    rows = slurm.call("scontrol", "show", "partition", "-o").splitlines()
    found = {row["PartitionName"]: row for row in (dict(re.findall(r"(\w+)=(\S*)", row)) for row in rows) if row}
    graces = [seconds(found[part.name].get("GraceTime", "0")) for part in _partitions(cluster) if part.name in found]
    return seconds(config.get("KillWait", "30")) + min(graces, default=0)


def slowest_checkpoint(runs: Path) -> tuple[float, str] | None:
    """(seconds, run id), of the runs that changed last."""
    def changed(file: Path) -> float:
        return file.stat().st_mtime

    records = sorted(runs.glob(f"*/{RunPaths(Path()).record}"), key=changed, reverse=True)[:RECENT_RUNS]
    took = []
    for paths in (RunPaths(file.parent) for file in records):
        for number in paths.attempt_numbers():
            try:
                took.append((read_json(paths.attempt_record(number)).get("checkpoint_s"), paths.id))
            except (OSError, ValueError):
                continue
    return max((found for found in took if found[0] is not None), default=None)


# The small job


def _spec(cluster: ClusterConfig, *overrides: str) -> Spec:
    return script_spec(PROBE, overrides=overrides, cluster=cluster)


def _job_here(cluster: ClusterConfig, runs: Path, say: Callable[[str], object]) -> Iterator[Check]:
    gpus = visible_gpus(os.environ)
    resources = local_resources(gpus or None, None if gpus else 2)
    spec = _spec(cluster, "run.max_restarts=0")
    run_id = new_run_id("doctor")

    def plan_of(number: int):
        return make_plan(run_id, spec, cluster, resources, runs=runs, python=sys.executable, cwd=Path.cwd(), attempt=number)

    say(f"{resources.ranks} rank(s) on {resources.device} try this machine")
    paths = record.create_run(plan_of(1))
    local.execute(plan_of, paths, 1, make_view(json=True, stream=io.StringIO()), restarts=0)
    yield from _found(paths, [socket.gethostname()], "")


def _job_on_slurm(cluster: ClusterConfig, runs: Path, nodes: int | None, say: Callable[[str], object]) -> Iterator[Check]:
    try:
        if nodes is None:
            nodes = 2 if max((part.nodes for part in _partitions(cluster)), default=1) > 1 and (cluster.max_nodes or 2) > 1 else 1
        gpus = nodes * (cluster.gpus_per_node or 1) if cluster.device == "cuda" else None
        resources = slurm_resources(cluster, gpus, None if gpus else nodes, nodes)
        spec = _spec(cluster, "run.max_restarts=0", f"run.grace_s={JOB_GRACE_S}")
        run_id = new_run_id("doctor")
        copy = snapshot.survey(code_of(spec), RunPaths(runs / run_id).code)
        request = Request(cluster.model_copy(update={"chain": 1}), time=JOB_TIME)
        plan = make_submission(run_id, spec, request, resources, runs=runs, cwd=Path.cwd(), copy=copy)
        paths, (job,), _ = submit(plan, spec, cluster.name)
        try:
            if cluster.requeue and "Requeue=0" in slurm.call("scontrol", "show", "job", job):
                yield Check("requeue", "warning", "this site does not let jobs be requeued, though they ask for it",
                            "`requeue: false` in the cluster's file: a chain of jobs does the same")
            hosts, problem = _wait(paths, job, say)
        finally:
            slurm.cancel([job])
            _wait_gone(job)
    except UserError as error:
        yield Check("job", "error", error.message, error.hint)
        return
    if problem and not hosts:
        shutil.rmtree(paths.root, ignore_errors=True)
        yield Check("job", "warning", problem, "try again when nodes are free, or with fewer: --nodes 1")
    else:
        yield from _found(paths, hosts, problem)


def _wait(paths: RunPaths, job: str, say: Callable[[str], object]) -> tuple[list[str], str]:
    """Until the job has ended, or is not worth waiting for: (its nodes, what was the matter with it)."""
    said, hosts, troubled = "", [], None
    deadline = time.monotonic() + START_S
    while queued := slurm.queue([job]).get(job):
        if queued.node_list and not hosts:
            hosts, deadline = slurm.expand(queued.node_list), time.monotonic() + END_S
        now = f"job {job} runs on {', '.join(hosts)}" if hosts else f"job {job} waits: {slurm.words(queued.reason)}"
        if now != said:
            said = now
            say(f"{now} (for {deadline - time.monotonic():.0f} s at most)")
        failed = read_run(paths.root).record["state"] == "failed" or not paths.logs(1) and _failed_starts(paths, hosts, [job])
        troubled = (troubled or time.monotonic()) if failed else None
        if troubled and time.monotonic() > troubled + TROUBLE_S:
            return hosts, "not all nodes have started launch"
        if time.monotonic() > deadline:
            return hosts, (f"job {job} did not end within {END_S:.0f} s" if hosts else
                           f"job {job} has not started within {START_S:.0f} s: {slurm.words(queued.reason)}")
        time.sleep(0.5)
    return hosts or [node for ended in slurm.history([job]).values() for node in ended.nodes], ""


def _wait_gone(job: str) -> None:
    """What it still writes would be missed, or come after its folder is gone."""
    deadline = time.monotonic() + GONE_S
    while slurm.queue([job]) and time.monotonic() < deadline:
        time.sleep(0.2)


def _found(paths: RunPaths, hosts: Sequence[str], problem: str) -> Iterator[Check]:
    """What the probes have found; their run is removed if all is well."""
    run = read_run(paths.root)
    ranks = {rank: list(_findings(log)) for rank, log in paths.logs(1).items()}
    if run.record["state"] == "finished":
        said = "; ".join(f"{finding['probe']}: {finding['said']}" for finding in ranks[0] if finding["probe"] != "folder")
        yield Check("job", "ok", f"{len(ranks)} rank(s) on {', '.join(hosts)}; of rank 0: {said}")
        shutil.rmtree(paths.root, ignore_errors=True)
        return
    failed = _failed_probes(paths, hosts, ranks) if ranks else _failed_starts(paths, hosts, run.record["job"].get("ids"))
    for host, (probe, what) in failed.items():
        yield Check("job", "error", f"node {host}: {probe}: {what}", MENDS.get(probe, START))
    where, more = ", ".join(hosts) or "no node", f"`launch explain {shlex.quote(str(paths.root))}` tells more"
    if failed:
        yield Check("job", "error", f"failed on {', '.join(failed)}", more)
    else:
        yield Check("job", "error", f"on {where}: {problem or explain(run)['sentence']}", more)


def _failed_probes(paths: RunPaths, hosts: Sequence[str], ranks: Mapping[int, Sequence[Mapping[str, Any]]]
                   ) -> dict[str, tuple[str, str]]:
    """By node: which probe failed, and how, in its first rank that failed. Where ranks were not well by themselves, it
    does not count that others then waited for them."""
    found = [(rank, finding["probe"], finding["said"]) for rank, findings in ranks.items() for finding in findings
             if not finding["ok"]]
    alone = [one for one in found if one[1] != "all-reduce"]
    failure = read_json(paths.attempt_record(1))["failure"] or {}
    if not alone and failure.get("signal"):
        rank = failure["rank"]
        alone = [(rank, _next_probe(ranks[rank]), failure["message"])]
    hung = [(rank, _next_probe(findings), "it did not come to an end") for rank, findings in ranks.items()
            if len(findings) < len(MENDS)]
    return {hosts[rank * len(hosts) // len(ranks)]: (probe, f"rank {rank}: {said}")
            for rank, probe, said in reversed(alone or found or hung)}


def _next_probe(findings: Sequence[Mapping[str, Any]]) -> str:
    """The one that has not said how it went."""
    return list(MENDS)[min(len(findings), len(MENDS) - 1)]


def _failed_starts(paths: RunPaths, hosts: Sequence[str], jobs: Sequence[str] | None) -> dict[str, tuple[str, str]]:
    """By node: why it has started no rank, where that is known."""
    logs = {host: _log(paths, job, node) for job in jobs or () for node, host in enumerate(hosts)}
    head = next(iter(hosts), "")
    if logs and not logs[head].exists():  # no other node was asked then
        return {head: ("folder", f"it could write nothing into {paths.root}")}
    found = {}
    for host, log in logs.items():
        said = [line for line in COMPLAINT.findall(_read(log)) if not CONSEQUENCE.search(line)]
        if said:
            found[host] = ("start", said[-1])
        elif not log.exists() and "launch failed" in _read(logs[head]):
            found[host] = ("folder", f"it could write nothing into {paths.root}")
    return found


def _log(paths: RunPaths, job: str, node: int) -> Path:
    return paths.submission(1) / f"{job}_{node}_log.out"


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _findings(log: Path) -> Iterator[dict[str, Any]]:
    for text in _read(log).splitlines():
        try:
            found = json.loads(text)
        except ValueError:
            continue
        if isinstance(found, dict) and "probe" in found:
            yield found
