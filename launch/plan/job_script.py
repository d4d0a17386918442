"""The script of a SLURM job, rendered by submitit. Pure: the same arguments, the same bytes."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

from launch.cluster.config import ClusterConfig
from launch.cluster.resources import Resources
from launch.cluster.times import seconds, slurm_time
from trainers.contract.errors import UserError

Option = str | int | bool

PERCENT = "\ue000"  # for a folder's own %, until submitit has replaced %t and %j wherever they stand
AFTER_GRACE_S = 45  # SLURM looks at time limits every 30 s, and records and requeueing take a moment

# Options of sbatch that are decided elsewhere, and where.
DECIDED = {
    "array": "`launch sweep` makes arrays", "nodes": "use --nodes", "time": "use --time",
    "gpus": "use --gpus", "gpus-per-node": "use --gpus", "gpus-per-task": "use --gpus",
    "ntasks": "use --gpus or --procs", "ntasks-per-node": "use --gpus or --procs",
    "cpus-per-task": "it follows from `cpus_per_gpu` or `cpus_per_rank` in the cluster's file",
    "signal": "it follows from run.grace_s", "requeue": "`requeue` in the cluster's file says so",
    "no-requeue": "`requeue` in the cluster's file says so",
    "hold": "`scontrol hold JOB` holds a job that was submitted",
    **dict.fromkeys(("output", "error", "open-mode"), "logs lie in the run directory: `launch logs RUN`"),
    **dict.fromkeys(("wrap", "wait", "parsable", "test-only", "export", "export-file", "get-user-env", "chdir"),
                    "launch needs its own setting of it"),
}


@dataclass(frozen=True)
class Request:
    """What is asked of SLURM for a run, beside its resources."""

    cluster: ClusterConfig
    time: str | None = None             # the cluster's own if None
    options: Mapping[str, Option] = field(default_factory=dict)  # of sbatch, over the cluster's
    after: Sequence[str] = ()           # ids of jobs of a run that must finish first (any of them: they are a chain)


@dataclass(frozen=True)
class Job:
    """One submission: a script, and in how many links of a chain, or elements of an array, it runs."""

    folder: str          # the submission's, absolute
    script: str
    links: int = 1
    elements: tuple[int, ...] | None = None

    @property
    def file(self) -> str:
        return f"{self.folder}/job.sh"

    @property
    def command(self) -> tuple[str, ...]:
        return ("sbatch", "--parsable", "--hold", self.file)


def make_job(request: Request, resources: Resources, *, name: str, folder: str, python: str, grace_s: float,
             code: str | None = None, elements: Sequence[int] | None = None, parallel: int | None = None) -> Job:
    """The job of a run, or of a sweep's runs.

    Args:
        name: the job's, unless an option names it.
        folder: the submission's: it holds submission.json and gets the log of each node.
        code: a folder in which launch's own packages lie as they were at submission.
        elements: of an array, in order; at most `parallel` at once.

    Raises:
        UserError: an option is not for the user to set, or cannot be said to sbatch.
    """
    from submitit.slurm.slurm import _make_sbatch_string

    cluster = request.cluster
    options = {"job-name": name, **_asked(request, resources)}
    for key, value in options.items():
        if not _one_line(str(value)):
            raise UserError(f"sbatch's option `{key}` is {str(value)!r}, which holds a line end or control character",
                            f"give sbatch.{key} another value")
    # srun (22.05) drops backslashes, and loses count of the %s where a width or one of its own letters follows.
    if not _one_line(folder) or re.search(r"\\|%\d|%.*%[utnN]", folder):
        raise UserError(f"the run directory's path {folder!r} holds a backslash, a line end, a control character, or such a % "
                        "as srun cannot be told", "choose another place with --runs DIR or LAUNCH_RUNS")
    time_s, lead_s = seconds(str(options["time"])), ceil(grace_s) + AFTER_GRACE_S
    if time_s <= lead_s:
        raise UserError(f"the time limit is {time_s} s, of which the last {lead_s} s are for the checkpoint at its end "
                        f"(run.grace_s is {grace_s:g})", "give a longer --time, or a shorter run.grace_s")
    if elements:
        options["array"] = _ranges(elements) + (f"%{parallel}" if parallel else "")
    script = _make_sbatch_string(
        command=shlex.join(node_process(cluster, python, folder)),
        folder=folder.replace("%", PERCENT), job_name=None, time=None, wckey=None, nodes=resources.nodes, ntasks_per_node=1,
        signal_delay_s=lead_s, stderr_to_stdout=True, map_count=elements and len(elements),
        # sbatch takes a backslash for an escape inside single quotes too (seen in 22.05).
        additional_parameters={key: value.replace("\\", r"\\") if isinstance(value, str) else value
                               for key, value in options.items() if value is not False},
        setup=setup(cluster, code), teardown=_teardown(folder, cluster.requeue), srun_args=srun_args(cluster, resources),
    )
    links = 1 if cluster.requeue or elements else cluster.chain
    return Job(folder, script.replace(PERCENT, "%%") + "\n", links, tuple(elements) if elements else None)


def node_process(cluster: ClusterConfig, python: str, folder: str) -> list[str]:
    """What srun starts once on each node."""
    return [*cluster.prefix, python, "-P", "-u", "-m", "launch.execute.node_process", folder]


def srun_args(cluster: ClusterConfig, resources: Resources, here: bool = False) -> list[str]:
    """What sbatch is told, srun is told too: since 22.05 it does not take it over. No binding: ranks share the cores.
    `here`: in an allocation of the user's own making, all that it has, beside the step of the shell that one stands in."""
    cores = None if here else _cpus(cluster, resources)
    return [f"--nodes={resources.nodes}", "--ntasks-per-node=1", *([f"--cpus-per-task={cores}"] if cores else []),
            *(["--overlap"] if here else []), "--cpu-bind=none", "--mpi=none", "--kill-on-bad-exit=0", "--export=ALL",
            *cluster.srun]


def _asked(request: Request, resources: Resources) -> dict[str, Option]:
    """sbatch's options, by their long names."""
    cluster, given = request.cluster, {}
    for key, value in {**cluster.sbatch, **request.options}.items():
        key = key.replace("_", "-")
        if not re.fullmatch(r"[a-z][a-z-]+", key):
            raise UserError(f"{key!r} is no option of sbatch", "write its long name: sbatch.partition=NAME, not sbatch.p")
        if decided := next((name for name in DECIDED if name.startswith(key)), None):  # sbatch takes abbreviations
            raise UserError(f"sbatch's option `{decided}` cannot be set", DECIDED[decided])
        given[key] = value
    asked: dict[str, Option | None] = {
        "partition": cluster.partition, "account": cluster.account, "qos": cluster.qos, "constraint": cluster.constraint,
        "time": slurm_time(seconds(request.time or cluster.time)),
        "cpus-per-task": _cpus(cluster, resources),
    }
    if resources.gpus:
        count = resources.gpus // resources.nodes
        asked |= _gpus(cluster, count)
        if cluster.mem_per_gpu:
            asked["mem"] = f"{int(cluster.mem_per_gpu.rstrip('KMGT')) * count}{cluster.mem_per_gpu.lstrip('0123456789')}"
    if cluster.mem_per_cpu and "mem" not in asked:
        asked["mem-per-cpu"] = cluster.mem_per_cpu
    if cluster.requeue:
        asked["requeue"] = True
    else:
        asked["no-requeue"] = True
    after = ["?".join(f"afterok:{job}" for job in request.after)] if request.after else []
    if after or "dependency" in given:
        asked["dependency"] = ",".join([*after, *([str(given.pop("dependency"))] if "dependency" in given else [])])
    if "gres" in given and "gres" in asked:
        given["gres"] = f"{asked['gres']},{given['gres']}"
    return {key: value for key, value in {**asked, **given}.items() if value is not None}


def _gpus(cluster: ClusterConfig, count: int) -> dict[str, str]:
    kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
    match cluster.gpu_request:
        case "gpus-per-node":
            return {"gpus-per-node": f"{kind}{count}"}
        case "gres":
            return {"gres": f"gpu:{kind}{count}"}
        case "none":
            return {}


def _cpus(cluster: ClusterConfig, resources: Resources) -> int | None:
    """Cores of one node's process and its ranks."""
    if resources.gpus:
        return cluster.cpus_per_gpu and cluster.cpus_per_gpu * (resources.gpus // resources.nodes)
    return resources.threads * resources.ranks_per_node


def setup(cluster: ClusterConfig, code: str | None) -> list[str]:
    """Shell lines before srun's."""
    lines = ["export SLURM_EXPORT_ENV=ALL"]  # what sbatch was told of the environment is not for srun
    if cluster.data:
        lines.append(f"export LAUNCH_DATA={shlex.quote(cluster.data)}")
    lines += cluster.setup
    if code:
        lines.append(f"export LAUNCH_CODE={shlex.quote(code)}")
        lines.append('export PYTHONPATH="$LAUNCH_CODE${PYTHONPATH:+:$PYTHONPATH}"')
    return lines


def _teardown(folder: str, requeue: bool) -> list[str]:
    """What the batch shell does after the last node process has gone, however it went."""
    if not requeue:
        return ['exit "$?"']
    return [
        "code=$?",
        'job="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"',
        'name="$job-${SLURM_RESTART_COUNT:-0}"',
        f'if [ -e {shlex.quote(folder)}/"requeue-$name" ]; then',
        # The requeue signals this shell too; what it excludes can be said only once the job is back in the queue.
        "    trap '' TERM CONT",
        "    for pause in 0 2 4 8 8; do",  # SLURM's controller may be away for a moment
        '        sleep "$pause"',
        '        shown="$(scontrol show job "$job")" || continue',
        # Not if SLURM has begun the job anew elsewhere: this shell may have outlived its node's slurmd.
        '        case "$shown" in *" Restarts=${SLURM_RESTART_COUNT:-0} "*) ;; *) break ;; esac',
        f'        touch {shlex.quote(folder)}/"again-$name"',
        '        scontrol requeue "$job" || continue',
        f'        [ -s {shlex.quote(folder)}/"exclude-$job" ] && '
        f'scontrol update JobId="$job" ExcNodeList="$(cat {shlex.quote(folder)}/"exclude-$job")"',
        "        break",
        "    done",
        "fi",
        'exit "$code"',
    ]


def _one_line(text: str) -> bool:
    """Whether a #SBATCH line can hold it: no line ends, no control characters, nothing that is no text."""
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Co", "Zl", "Zp") for character in text)


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> '0-2,5'."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


