"""The script of a SLURM job, rendered by submitit. Pure: the same arguments give the same bytes."""

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
from launch.records.requeue import AGAIN, FLAG, REQUEUE
from trainers.contract.errors import UserError
from trainers.contract.exit_codes import PREEMPTED

Option = str | int | bool

PERCENT = "\ue000"  # stands for a % in the folder's name while submitit replaces %t and %j everywhere in the path
AFTER_GRACE_S = 45  # SLURM checks time limits every 30 s; writing records and requeueing take a moment more
LEFT_BEHIND_S = 30  # after the first node process has ended, srun kills the others, which may be stopped, after this time
UNHEARD = 140       # srun's exit code if SIGUSR2, the signal before the time limit, ended a node process that was just starting
UNHEARD_JOBS = 5    # the batch shell requeues a job so often for that reason: the job may be too short to start an attempt
REFUSALS = 20       # the batch shell believes that SLURM never requeues the job after so many refusals

# Options of sbatch that users cannot set, each with a hint: what to use instead.
FORBIDDEN_OPTIONS = {
    "array": "`launch sweep` makes arrays", "nodes": "use --nodes", "time": "use --time",
    "gpus": "use --gpus", "gpus-per-node": "use --gpus", "gpus-per-task": "use --gpus",
    "ntasks": "use --gpus or --procs", "ntasks-per-node": "use --gpus or --procs",
    "cpus-per-task": "set `cpus_per_gpu` or `cpus_per_rank` in the cluster's file",
    "signal": "set run.grace_s", "requeue": "set `requeue` in the cluster's file",
    "no-requeue": "set `requeue` in the cluster's file",
    "hold": "submit the job, then use `scontrol hold JOB`",
    **dict.fromkeys(("output", "error", "open-mode"), "logs are in the run directory: `launch logs RUN`"),
    **dict.fromkeys(("wrap", "wait", "parsable", "test-only", "export", "export-file", "get-user-env", "chdir"),
                    "leave it out: launch needs its own value"),
}


@dataclass(frozen=True)
class Request:
    """What a run asks of SLURM, besides its resources."""

    cluster: ClusterConfig
    time: str | None = None             # the time limit; None: the cluster's
    options: Mapping[str, Option] = field(default_factory=dict)  # for sbatch; override the cluster's `sbatch`
    after: Sequence[str] = ()           # job ids of an earlier run; one of them must finish first (they are one chain)
    after_run: str | None = None        # the folder of that run, absolute

    @property
    def partition(self) -> str | None:
        """The partition that the command line names."""
        given = self.options.get("partition")
        return str(given) if given else None


@dataclass(frozen=True)
class Job:
    """One submission to SLURM: a script, and how often it runs."""

    folder: str          # the submission's folder, absolute
    script: str
    links: int = 1       # the number of jobs in a chain
    elements: tuple[int, ...] | None = None  # the indices of a job array; None: not an array

    @property
    def file(self) -> str:
        """The path of the script."""
        return f"{self.folder}/job.sh"

    @property
    def command(self) -> tuple[str, ...]:
        """The sbatch command that submits one job."""
        return ("sbatch", "--parsable", "--hold", self.file)


def make_job(request: Request, resources: Resources, *, name: str, folder: str, python: str, grace_s: float,
             code: str | None = None, elements: Sequence[int] | None = None, parallel: int | None = None) -> Job:
    """Return the job of a run, or the job array of a sweep.

    Args:
        name: the job's name, unless the option `job-name` sets another.
        folder: the submission's folder, which holds submission.json and the log of each node.
        python: the Python that runs the node processes.
        grace_s: seconds that a rank gets to write a checkpoint before the time limit.
        code: a folder with launch's own packages as they were at submission.
        elements: the indices of the array, in order.
        parallel: how many elements may run at the same time; None: all.

    Raises:
        UserError: an option cannot be set, a value or the folder cannot be written into the script, or the time limit
            leaves no time before the checkpoint at its end.
    """
    from submitit.slurm.slurm import _make_sbatch_string

    cluster = request.cluster
    options = {"job-name": name, **_sbatch_options(request, resources)}
    for key, value in options.items():
        if not _one_line(str(value)):
            raise UserError(f"sbatch's option `{key}` is {str(value)!r}, which contains a line break or control character",
                            f"give sbatch.{key} another value")
    # srun (22.05) drops backslashes. It also misreads a % sign before a digit or before one of its own letters.
    if not _one_line(folder) or re.search(r"\\|%\d|%.*%[utnN]", folder):
        raise UserError(f"the run directory's path {folder!r} contains a character that srun cannot handle: a backslash, a "
                        "line break, a control character or certain uses of %",
                        "choose another folder with --runs DIR or LAUNCH_RUNS")
    time_s, lead_s = seconds(str(options["time"])), warning_s(grace_s)
    if time_s <= lead_s:
        raise UserError(f"the time limit is {time_s} s, but the last {lead_s} s are reserved for the final checkpoint "
                        f"(run.grace_s is {grace_s:g})", "give a longer --time, or a shorter run.grace_s")
    if elements:
        options["array"] = _ranges(elements) + (f"%{parallel}" if parallel else "")
    script = _make_sbatch_string(
        command=shlex.join(node_process(cluster, python, folder)),
        # submitit leaves out parameters that are None, although it annotates these three as `str` and `int`.
        job_name=None, time=None, wckey=None,  # type: ignore[arg-type]
        folder=folder.replace("%", PERCENT), nodes=resources.nodes, ntasks_per_node=1,
        signal_delay_s=lead_s, stderr_to_stdout=True, map_count=len(elements) if elements else None,
        # `signal` must be given here too: submitit takes its own from SUBMITIT_PREEMPT_SIGNAL in the environment.
        # sbatch (22.05) reads a backslash as an escape, even inside single quotes.
        additional_parameters={"signal": f"USR2@{lead_s}"} | {key: value.replace("\\", r"\\") if isinstance(value, str) else value
                               for key, value in options.items() if value is not False},
        setup=setup(cluster, code), teardown=_teardown(folder, cluster.requeue), srun_args=srun_args(cluster, resources),
    )
    links = 1 if cluster.requeue or elements else cluster.chain
    return Job(folder, script.replace(PERCENT, "%%") + "\n", links, tuple(elements) if elements else None)


def warning_s(grace_s: float) -> int:
    """Return how many seconds before the time limit SLURM must send SIGUSR2."""
    return ceil(grace_s) + AFTER_GRACE_S


def node_process(cluster: ClusterConfig, python: str, folder: str) -> list[str]:
    """Return the command that srun starts once on each node."""
    return [*cluster.prefix, python, "-P", "-u", "-m", "launch.execute.node_process", folder]


def srun_args(cluster: ClusterConfig, resources: Resources, here: bool = False) -> list[str]:
    """Return srun's options. They repeat those of sbatch: since 22.05 srun does not inherit them.

    There is no CPU binding, because the ranks of a node share its cores.

    Args:
        here: run inside an allocation that the user made: use all of its cores, and share them with the step that the
            user's shell runs in.
    """
    cores = None if here else _cpus_per_node(cluster, resources)
    return [f"--nodes={resources.nodes}", "--ntasks-per-node=1", *([f"--cpus-per-task={cores}"] if cores else []),
            *(["--overlap"] if here else []), "--cpu-bind=none", "--mpi=none", "--kill-on-bad-exit=0", f"--wait={LEFT_BEHIND_S}",
            "--export=ALL",
            *cluster.srun]


def _sbatch_options(request: Request, resources: Resources) -> dict[str, Option]:
    """Return sbatch's options by their long names."""
    cluster, given = request.cluster, {}
    for key, value in {**cluster.sbatch, **request.options}.items():
        key = key.replace("_", "-")
        if not re.fullmatch(r"[a-z][a-z-]+", key):
            raise UserError(f"{key!r} is not an option of sbatch", "write the long name: sbatch.partition=NAME, not sbatch.p")
        if decided := next((name for name in FORBIDDEN_OPTIONS if name.startswith(key)), None):  # sbatch takes abbreviations
            raise UserError(f"sbatch's option `{decided}` cannot be set", FORBIDDEN_OPTIONS[decided])
        given[key] = value
    asked: dict[str, Option | None] = {
        "partition": cluster.partition, "account": cluster.account, "qos": cluster.qos, "constraint": cluster.constraint,
        "time": slurm_time(seconds(request.time or cluster.time)),
        "cpus-per-task": _cpus_per_node(cluster, resources),
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
    if request.after or "dependency" in given:
        asked["dependency"] = dependency(request.after, given.pop("dependency", None))
    if "gres" in given and "gres" in asked:
        given["gres"] = f"{asked['gres']},{given['gres']}"
    return {key: value for key, value in {**asked, **given}.items() if value is not None}


def dependency(after: Sequence[str], own: Option | None) -> str:
    """Return the value of sbatch's option `dependency`.

    Args:
        after: job ids; one of these jobs must succeed.
        own: the user's own value.
    """
    return ",".join([*(["?".join(f"afterok:{job}" for job in after)] if after else []), *([str(own)] if own is not None else [])])


def _gpus(cluster: ClusterConfig, count: int) -> dict[str, str]:
    kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
    match cluster.gpu_request:
        case "gpus-per-node":
            return {"gpus-per-node": f"{kind}{count}"}
        case "gres":
            return {"gres": f"gpu:{kind}{count}"}
        case "none":
            return {}


def _cpus_per_node(cluster: ClusterConfig, resources: Resources) -> int | None:
    """Return the cores for one node's process and its ranks; None if the cluster's file sets no number."""
    if resources.gpus:
        return cluster.cpus_per_gpu and cluster.cpus_per_gpu * (resources.gpus // resources.nodes)
    return resources.threads * resources.ranks_per_node


def setup(cluster: ClusterConfig, code: str | None) -> list[str]:
    """Return the shell lines that come before the srun line."""
    lines = ["export SLURM_EXPORT_ENV=ALL"]  # otherwise srun would repeat sbatch's option --export
    if cluster.data:
        lines.append(f"export LAUNCH_DATA={shlex.quote(cluster.data)}")
    lines += cluster.setup
    if code:
        lines.append(f'export LAUNCH_CODE={shlex.quote(code)}"${{LAUNCH_CODE:+:$LAUNCH_CODE}}"')
        lines.append('export PYTHONPATH="$LAUNCH_CODE${PYTHONPATH:+:$PYTHONPATH}"')
    return lines


def _teardown(folder: str, requeue: bool) -> list[str]:
    """Return the shell lines that run after the last node process has ended, whatever its exit code."""
    if not requeue:
        return ['exit "$?"']
    folder = shlex.quote(folder)
    return [
        "code=$?",
        'job="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"',
        'name="$job-${SLURM_RESTART_COUNT:-0}"',
        f'set -- {folder}/{AGAIN}-"$job"-*-{UNHEARD}',
        f'if [ "$code" -eq {UNHEARD} ] && [ "$#" -ge {UNHEARD_JOBS} ] && ! [ -e {folder}/"{FLAG}-$name" ]; then',
        '    echo "job $job is not requeued again: the signal before the time limit has ended its node process while that'
        ' process was starting, $(($# + 1)) times; give the job more time with --time, or make its setup shorter"',
        # The flag is for a head that was killed, the exit code for a head that could not write the flag.
        f'elif [ "$code" -eq {REQUEUE} ] || [ "$code" -eq {UNHEARD} ] || [ -e {folder}/"{FLAG}-$name" ]; then',
        # The requeue also sends signals to this shell, and so does the time limit. Try until SLURM kills this shell.
        "    trap '' TERM CONT",
        "    pause=1 refused=0",
        "    while :; do",
        '        if said="$(scontrol show job "$job" 2>&1)"; then',
        # Do nothing if SLURM has restarted the job elsewhere: this shell may outlive its node's slurmd.
        '            case "$said" in *" Restarts=${SLURM_RESTART_COUNT:-0} "*) ;; *) break ;; esac',
        f'            touch {folder}/"{AGAIN}-$name-$code"',  # a full disk takes a name, but no text
        '            if said="$(scontrol requeue "$job" 2>&1)"; then',
        # Nodes can be excluded only when the job is back in the queue.
        f'                [ -s {folder}/"exclude-$job" ] && '
        f'scontrol update JobId="$job" ExcNodeList="$(cat {folder}/"exclude-$job")"',
        "                break",
        "            fi",
        "            refused=$((refused + 1))",
        "        fi",
        f'        if [ "$refused" -ge {REFUSALS} ]; then echo "job $job cannot be requeued: $said"; break; fi',
        '        echo "job $job cannot be requeued yet: $said; trying again in $pause s"',
        '        sleep "$pause"',
        '        [ "$pause" -ge 16 ] || pause=$((2 * pause))',
        "    done",
        f'    [ "$code" -ne {REQUEUE} ] || code={PREEMPTED}',
        "fi",
        'exit "$code"',
    ]


def _one_line(text: str) -> bool:
    """Return whether a #SBATCH line can contain the text: no line breaks, control, surrogate or private-use characters."""
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Co", "Zl", "Zp") for character in text)


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> '0-2,5'."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


