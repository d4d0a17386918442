"""What would go wrong, found before anything is queued."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from launch.cluster import slurm
from launch.cluster.config import ClusterConfig
from launch.cluster.resources import Resources, Wanted, slurm_resources, visible_gpus
from launch.cluster.times import slurm_time
from launch.execute.submission_plan import OWN
from launch.execute.submit import try_out
from launch.plan.job_script import Request, make_job
from launch.records.sync import has_key, server
from launch.report.doctor.check import Check, partitions_of
from launch.report.doctor.trial_job import trial_here, trial_on_slurm, trial_spec
from trainers.contract.errors import UserError
from trainers.contract.files import read_json
from trainers.contract.paths import RunPaths

DISTRIBUTION = "launch-training"
ROOM_BYTES, ROOM_FILES = 10 * 2**30, 10_000  # fewer are few
RECENT_RUNS = 50   # whose checkpoints are looked at
LISTED = 8         # nodes by name

# File systems that other hosts do not see. Any other is taken for a shared one: their names are many.
LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "vfat", "exfat", "ntfs", "tmpfs", "ramfs", "rootfs", "overlay",
         "squashfs", "iso9660", "devtmpfs", "ecryptfs"}


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
        yield from trial_on_slurm(cluster, runs, nodes, say) if cluster.kind == "slurm" else trial_here(cluster, runs, say)


# Software


def _software() -> Iterator[Check]:
    """Compare what is installed with what launch needs, by the records of installed packages: none is imported."""
    python, wanted = requirements()
    here = platform.python_version()
    if here not in python:
        yield Check("Python", "error", f"{here}; {python} is needed", "install launch into a newer Python")
    there = {need.name: _version(need.name) for need in wanted}
    bad = [need for need in wanted if not fits(there[need.name], need)]
    for need in bad:
        yield Check("packages", "error", f"{need.name} {there[need.name] or 'is not installed'}; "
                    f"{need.specifier or 'any version'} is needed", f"{sys.executable} -m pip install '{need}'")
    if not bad:
        yield Check("packages", "ok", ", ".join([f"Python {here}", *(f"{name} {version}" for name, version in there.items())]))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements(pyproject: Path = OWN / "pyproject.toml") -> tuple[SpecifierSet, list[Requirement]]:
    """(the versions of Python that launch needs, its packages): of a clone from its pyproject.toml, else as pip recorded
    them."""
    try:
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        python, wanted = project["requires-python"], project["dependencies"]
    except OSError:
        python = metadata.metadata(DISTRIBUTION)["Requires-Python"]
        wanted = [text for text in metadata.requires(DISTRIBUTION) or () if "extra ==" not in text]
    return SpecifierSet(python), [Requirement(text) for text in wanted]


def fits(version: str | None, need: Requirement) -> bool:
    """Whether an installed version is one that is needed. A site's own build of a pre-release (2.11.0a0+site) counts as
    its release: such builds are what a site's containers hold."""
    return version is not None and need.specifier.contains(Version(version).base_version)


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
    where = [f"--partition={','.join(part.name for part in parts)}"] if (parts := partitions_of(cluster)) else ["--all"]
    rows = slurm.call("sinfo", "--noheader", *where, "--Node", "-o", "%N|%o|%T|%E").splitlines()
    return [dict(zip(names, row.split("|", 3))) for row in dict.fromkeys(rows)]


def _partition(cluster: ClusterConfig, runs: Path, config: Mapping[str, str]) -> Iterator[Check]:
    for part in partitions_of(cluster):
        longest = slurm_time(part.time_s) if part.time_s else "no limit"
        what = f"{part.name}: {part.nodes} node(s), jobs of up to {longest}; runs ask for {cluster.time}"
        yield Check("partition", "ok", what) if part.up else Check("partition", "warning", f"{part.name} is {part.state}",
                                                                  "jobs wait until it takes them again")
    nodes = _nodes(cluster)
    unfit = [f"{node['name']} ({node['state']}{'' if node['reason'] == 'none' else ', ' + node['reason']})" for node in nodes
             if not slurm.takes_jobs(slurm.node_state(node["state"]))]
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
            resources = slurm_resources(cluster, Wanted(nodes=count))
            job = make_job(Request(cluster), resources, name="doctor", folder=str(runs / "doctor"),
                           python=cluster.python or sys.executable, grace_s=trial_spec(cluster).config.run.grace_s)
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
    grace_s, kill_s = trial_spec(cluster).config.run.grace_s, _preempted_s(cluster, config)
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
    graces = [seconds(found[part.name].get("GraceTime", "0")) for part in partitions_of(cluster) if part.name in found]
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


