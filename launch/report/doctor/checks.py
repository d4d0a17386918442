"""The checks of `launch doctor`: software, the folder of runs, GPUs or SLURM, W&B, and a trial."""

from __future__ import annotations

import os
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
from packaging.version import InvalidVersion, Version

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
from trainers.contract.cores import usable_cores
from trainers.contract.errors import UserError
from trainers.contract.files import read_json
from trainers.contract.paths import RunPaths

DISTRIBUTION = "launch-training"
ROOM_BYTES, ROOM_FILES = 10 * 2**30, 10_000  # less free space than this is a warning
RECENT_RUNS = 50   # the runs whose times for a checkpoint are read
LISTED = 8         # the most nodes that a message names

# File systems that other hosts cannot see. Any other counts as shared, because shared file systems have many names.
LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "vfat", "exfat", "ntfs", "tmpfs", "ramfs", "rootfs", "overlay",
         "squashfs", "iso9660", "devtmpfs", "ecryptfs"}


def doctor(cluster: ClusterConfig, runs: Path, job: bool = False, nodes: int | None = None,
           say: Callable[[str], object] = lambda text: None) -> Iterator[Check]:
    """Check, one by one, the things that a run on this cluster needs. Files that a check writes are removed at once.

    Args:
        cluster: where runs will run.
        runs: the folder of runs, absolute.
        job: also run a trial of about a minute. Its run is removed afterwards, unless it fails.
        nodes: nodes of the trial; None: two, or one if the partition has only one.
        say: called with a message while the trial waits.
    """
    yield from _software()
    yield from _folder(cluster, runs)
    reachable = cluster.kind == "local"
    if reachable:
        cores, present = usable_cores(), os.cpu_count() or 1
        yield Check("CPU cores", "ok", str(cores) if cores == present else
                    f"{cores} of {present}, by the affinity of this process or the CPU quota of its cgroup")
        count = visible_gpus(os.environ)
        yield Check("GPUs", "ok", f"{count} visible" + ("" if count else ": runs here use the CPU"))
    else:
        for check in _slurm(cluster, runs):
            reachable |= check.name == "slurm" and check.ok == "ok"
            yield check
    yield Check("W&B", "ok", f"has a key for {server(os.environ)}" if has_key() else
                f"no key for {server(os.environ)}: wandb.mode=online tracks offline (`wandb login` or WANDB_API_KEY gives one)")
    if job and reachable:
        yield from trial_on_slurm(cluster, runs, nodes, say) if cluster.kind == "slurm" else trial_here(cluster, runs, say)


# Software


def _software() -> Iterator[Check]:
    """Compare the installed packages with what launch needs. No package is imported: pip's records are read."""
    python, needs = requirements()
    # Not platform's version: `packaging` does not understand the "3.13.0+" of a Python that was built from source.
    running = ".".join(map(str, sys.version_info[:3]))
    if running not in python:
        yield Check("Python", "error", f"{running}; {python} is needed", "install launch into a newer Python")
    installed = {need.name: _version(need.name) for need in needs}
    unmet = [need for need in needs if not fits(installed[need.name], need)]
    for need in unmet:
        yield Check("packages", "error", f"{need.name} {installed[need.name] or 'is not installed'}; "
                    f"{need.specifier or 'any version'} is needed", f"{sys.executable} -m pip install '{need}'")
    if not unmet:
        versions = [f"{name} {version}" for name, version in installed.items()]
        yield Check("packages", "ok", ", ".join([f"Python {running}", *versions]))


def _version(name: str) -> str | None:
    """The installed version of a package; None if the package is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements(pyproject: Path = OWN / "pyproject.toml") -> tuple[SpecifierSet, list[Requirement]]:
    """(the versions of Python, the packages) that launch needs.

    They are read from the pyproject.toml of a clone; without that file, from what pip has recorded.
    """
    try:
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        python, needs = project["requires-python"], project["dependencies"]
    except OSError:
        python = metadata.metadata(DISTRIBUTION)["Requires-Python"]
        needs = [text for text in metadata.requires(DISTRIBUTION) or () if "extra ==" not in text]
    return SpecifierSet(python), [Requirement(text) for text in needs]


def fits(version: str | None, need: Requirement) -> bool:
    """Whether an installed version meets a requirement. None, not installed, does not.

    A site's own build of a pre-release (2.11.0a0+site) counts as its release, because containers of sites hold such builds.
    A version that is not one by Python's rules cannot be compared, and passes.
    """
    if version is None:
        return False
    try:
        return need.specifier.contains(Version(version).base_version)
    except InvalidVersion:
        return True


# The folder of runs


def _folder(cluster: ClusterConfig, runs: Path) -> Iterator[Check]:
    existing = next(path for path in (runs, *runs.parents) if os.path.lexists(path))  # a broken link is not skipped
    try:
        with tempfile.NamedTemporaryFile(dir=existing):
            pass
    except OSError as error:
        yield Check("runs", "error", f"cannot write to {existing}: {error.strerror}", "use --runs DIR, or set LAUNCH_RUNS")
        return
    kind, source = file_system(existing)
    space, inodes = shutil.disk_usage(existing), os.statvfs(existing)
    what = f"can write to {runs}: {kind} ({source}), {space.free / 2**30:.0f} GiB free"
    if space.free < ROOM_BYTES or 0 < inodes.f_files and inodes.f_favail < ROOM_FILES:
        yield Check("runs", "warning", f"{what}, room for {inodes.f_favail} files", "free some space: checkpoints need it")
    else:
        yield Check("runs", "ok", what)
    if cluster.kind == "slurm" and not _is_only_node(cluster):
        python = [] if cluster.prefix else [("Python", Path(cluster.python or sys.prefix))]
        data = [("`data`", Path(cluster.data))] if cluster.data else []
        for name, path in [("the folder of runs", existing), *python, *data]:
            kind, source = file_system(path)
            if kind in LOCAL:
                yield Check("shared", "warning", f"{name}, {path}, is on {kind} ({source}), which other hosts probably cannot "
                            "see", "all nodes must see it; add --job to test that they do")


def file_system(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> tuple[str, str]:
    """(type, source) of the file system that holds a path; ("?", "?") if that is not known.

    Args:
        mounts: the kernel's list of mounts.
    """
    found = ("?", "?")
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return found
    real, longest = os.path.realpath(path), ""
    for mount, _, device in (row.partition(" - ") for row in lines):
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), mount.split()[4])
        if (real == point or real.startswith(point.rstrip("/") + "/")) and len(point) >= len(longest):
            kind, source = device.split()[:2]
            longest, found = point, (kind, source)
    return found


def _is_only_node(cluster: ClusterConfig) -> bool:
    """Whether this host is the only node of the cluster."""
    import psutil

    own_addresses = {socket.gethostname(), "localhost",
                     *(address.address for addresses in psutil.net_if_addrs().values() for address in addresses)}
    try:
        return {row["address"] for row in _nodes(cluster)} <= own_addresses
    except UserError:
        return False


# SLURM


def _slurm(cluster: ClusterConfig, runs: Path) -> Iterator[Check]:
    try:
        controller = slurm.call("scontrol", "ping").strip().splitlines()[0]
        config = dict(re.findall(r"^(\S+)\s+= (.*?)\s*$", slurm.call("scontrol", "show", "config"), re.MULTILINE))
    except UserError as error:
        fix = error.hint or "SLURM's controller is down, or this host cannot reach it: ask your site, or try again later"
        yield Check("slurm", "error", error.message.partition(";")[0], fix)
        return
    yield Check("slurm", "ok", f"SLURM {config.get('SLURM_VERSION')}, cluster {config.get('ClusterName')}: {controller}")
    for check in (_partition, _sizes, _ends):
        try:
            yield from check(cluster, runs, config)
        except UserError as error:
            yield Check("slurm", "error", error.message, error.hint)


def _nodes(cluster: ClusterConfig) -> list[dict[str, str]]:
    """The nodes that the cluster's jobs may go to, as {"name", "address", "state", "reason"}.

    Raises:
        UserError: SLURM does not answer.
    """
    names = ("name", "address", "state", "reason")
    where = [f"--partition={','.join(part.name for part in parts)}"] if (parts := partitions_of(cluster)) else ["--all"]
    rows = slurm.call("sinfo", "--noheader", *where, "--Node", "-o", "%N|%o|%T|%E").splitlines()
    return [dict(zip(names, row.split("|", 3))) for row in dict.fromkeys(rows)]


def _partition(cluster: ClusterConfig, runs: Path, config: Mapping[str, str]) -> Iterator[Check]:
    for part in partitions_of(cluster):
        longest = slurm_time(part.time_s) if part.time_s else "no limit"
        what = f"{part.name}: {part.nodes} node(s), jobs of up to {longest}; runs ask for {cluster.time}"
        yield Check("partition", "ok", what) if part.up else Check("partition", "warning", f"{part.name} is {part.state}",
                                                                  "jobs wait until the partition takes jobs again")
    nodes = _nodes(cluster)
    unfit = [f"{node['name']} ({node['state']}{'' if node['reason'] == 'none' else ', ' + node['reason']})" for node in nodes
             if not slurm.takes_jobs(slurm.node_state(node["state"]))]
    names = ", ".join(unfit[:LISTED]) + (f" and {len(unfit) - LISTED} more" if len(unfit) > LISTED else "")
    if unfit:
        what = f"{len(unfit)} of {len(nodes)} take no jobs: {names}"
        yield Check("nodes", "error" if len(unfit) == len(nodes) else "warning", what, "`sinfo -R` shows since when, and why")
    elif nodes:
        yield Check("nodes", "ok", f"all {len(nodes)} take jobs")


def _sizes(cluster: ClusterConfig, runs: Path, config: Mapping[str, str]) -> Iterator[Check]:
    """Whether SLURM accepts jobs as this cluster's file describes them: the smallest job, and a job on a whole node."""
    whole = [1] if cluster.gpus_per_node or cluster.cpus_per_node else []
    accepted = []
    for nodes in (None, *whole):
        try:
            resources = slurm_resources(cluster, Wanted(nodes=nodes))
            job = make_job(Request(cluster), resources, name="doctor", folder=str(runs / "doctor"),
                           python=cluster.python or sys.executable, grace_s=trial_spec(cluster).config.run.grace_s)
            try_out(job, resources)
            accepted.append(_size(resources))
        except UserError as error:
            what = "the smallest job" if nodes is None else "a whole node"
            yield Check("sbatch", "error", f"{what}: {error.message}", error.hint)
    if accepted:
        yield Check("sbatch", "ok", f"accepts {' and '.join(dict.fromkeys(accepted))}")


def _size(resources: Resources) -> str:
    what = f"{resources.gpus} GPU(s)" if resources.gpus else f"{resources.ranks} CPU rank(s)"
    return f"{what} on {resources.nodes} node(s)"


def _ends(cluster: ClusterConfig, runs: Path, config: Mapping[str, str]) -> Iterator[Check]:
    """How jobs end, whether they are requeued, and how long SLURM remembers them."""
    if config.get("AccountingStorageType", "").endswith("/none"):
        age = config.get("MinJobAge", "?")
        yield Check("accounting", "ok", f"none: SLURM knows how a job ended for {age}; after that, only the run's record says it")
    else:
        yield Check("accounting", "ok", config.get("AccountingStorageType", "?"))
    if cluster.requeue:
        by_request = "" if config.get("JobRequeue") == "1" else "; SLURM requeues only jobs that ask for it, and launch's jobs do"
        yield Check("requeue", "ok", f"jobs are requeued after time limits and preemption{by_request}")
    else:
        yield Check("requeue", "ok", f"`requeue: false`: a run is submitted as a chain of {cluster.chain} jobs instead")
    grace_s, kill_s = trial_spec(cluster).config.run.grace_s, _preempted_s(cluster, config)
    yield grace(grace_s, kill_s, slowest_checkpoint(runs))


def grace(grace_s: float, kill_s: float, slowest: tuple[float, str] | None) -> Check:
    """Whether a run that is stopped has enough time for a checkpoint.

    Args:
        grace_s: run.grace_s, the seconds that launch waits for a stop.
        kill_s: the seconds that SLURM gives a job that is preempted, requeued or cancelled.
        slowest: the seconds of the slowest checkpoint, and the id of its run.
    """
    limits = f"run.grace_s is {grace_s:g} s; a preempted job is killed after {kill_s:g} s"
    if slowest is None:
        return Check("grace", "ok", f"{limits}; no run here has measured a checkpoint yet")
    what = f"{limits}; the slowest checkpoint took {slowest[0]:.1f} s (run {slowest[1]})"
    if slowest[0] > grace_s:
        return Check("grace", "warning", what,
                     f"put `defaults: {{run: {{grace_s: {round(3 * slowest[0])}}}}}` in the cluster's file")
    if slowest[0] > kill_s:
        return Check("grace", "warning", what, "a preempted run continues from its previous checkpoint: lower checkpoint.every "
                     "to lose less, or ask the site to raise KillWait or the partition's GraceTime")
    return Check("grace", "ok", what)


def _preempted_s(cluster: ClusterConfig, config: Mapping[str, str]) -> float:
    """Seconds from SLURM's signal to its kill of a preempted job."""
    def seconds(text: str) -> int:
        digits = re.match(r"\d+", text)
        return int(digits[0]) if digits else 0

    rows = slurm.call("scontrol", "show", "partition", "-o").splitlines()
    partitions = {row["PartitionName"]: row for row in (dict(re.findall(r"(\w+)=(\S*)", row)) for row in rows) if row}
    graces = [seconds(partitions[part.name].get("GraceTime", "0")) for part in partitions_of(cluster) if part.name in partitions]
    return seconds(config.get("KillWait", "30")) + min(graces, default=0)


def slowest_checkpoint(runs: Path) -> tuple[float, str] | None:
    """(seconds, run id) of the slowest checkpoint among the RECENT_RUNS runs that changed last; None if none was timed."""
    def changed(file: Path) -> float:
        return file.stat().st_mtime

    records = sorted(runs.glob(f"*/{RunPaths(Path()).record}"), key=changed, reverse=True)[:RECENT_RUNS]
    times = []
    for paths in (RunPaths(file.parent) for file in records):
        for number in paths.attempt_numbers():
            try:
                times.append((read_json(paths.attempt_record(number)).get("checkpoint_s"), paths.id))
            except (OSError, ValueError):
                continue
    return max((time for time in times if time[0] is not None), default=None)
