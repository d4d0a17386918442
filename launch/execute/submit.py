"""Submit planned jobs to SLURM, and explain why SLURM refuses a job."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf
from pathlib import Path

from launch.cluster import slurm
from launch.cluster.resources import Resources
from launch.cluster.slurm_command import LASTING, TRIES
from launch.cluster.times import seconds, slurm_time
from launch.execute import record
from launch.execute.submission_plan import take_code
from launch.plan.job_script import Job
from launch.plan.plan import Plan
from launch.plan.spec import Spec
from trainers.contract.clock import utc_now
from trainers.contract.errors import UserError, system_error
from trainers.contract.files import replace_text, update_json
from trainers.contract.paths import RunPaths


def submit(plan: Plan, spec: Spec, cluster: str) -> tuple[RunPaths, list[str], list[str]]:
    """Make the run directory and submit its job.

    Args:
        plan: as `make_submission` returns it.
        spec: with the paths of the user's original code.

    Returns:
        The run, the ids of its jobs (several for a chain), and warnings about files that were not copied with the code.

    Raises:
        UserError: SLURM refuses the job, or the code cannot be copied. No run directory is left.
    """
    assert plan.job is not None
    try_out(plan.job, plan.resources)
    paths = record.create_run(plan, job=record.submitting(cluster, 1))
    try:
        copy = take_code([spec], paths.code)
        ids = hand_over(plan.job, plan.files, paths.root)
        update_json(paths.record, job={"kind": "slurm", "cluster": cluster, "ids": ids, "submission": 1}, updated=utc_now())
        release(ids)
    except BaseException:
        withdraw([plan.job])
        shutil.rmtree(paths.root, ignore_errors=True)  # nothing has run in it
        raise
    return paths, ids, copy.warnings


def withdraw(jobs: Iterable[Job]) -> None:
    """Cancel these jobs, including a job that SLURM accepted but whose id never reached us."""
    files = {job.file for job in jobs}
    try:
        slurm.cancel(id for id, job in slurm.queue().items() if job.script in files)
    except UserError:  # SLURM does not answer; the caller is raising an error already
        pass


def release(ids: Sequence[str]) -> None:
    """Release jobs that were submitted on hold. From now on the jobs write the run's record. Raises: UserError."""
    try:
        slurm.call("scontrol", "release", ",".join(ids))
    except UserError as error:
        if not re.search("no longer pending|already finished", error.message):  # an earlier try has released the job
            raise


def hand_over(job: Job, files: Mapping[str, str], root: Path) -> list[str]:
    """Write the files that a job reads, and submit the job on hold; for a chain, each of its links.

    Args:
        files: of the plan, by their paths under `root`.

    Returns:
        The ids of the jobs, in order.

    Raises:
        UserError: SLURM refuses the job, or a file cannot be written. No job stays in the queue.
    """
    needed = {name: text for name, text in files.items() if name.startswith("submissions/")}  # an attempt writes the rest
    try:
        for name, text in {**needed, os.path.relpath(job.file, root): job.script}.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, text)
    except OSError as error:
        raise UserError(f"{root} cannot be written: {error.strerror}", system_error(error).hint) from error
    ids: list[str] = []
    try:
        for _ in range(job.links):
            # Depend on every earlier job: a cancelled job also counts as "not ok" and would start the chain.
            dependency = [f"--dependency=afternotok:{':'.join(ids)}", "--kill-on-invalid-dep=yes"] if ids else []
            ids.append(_submit_once(job, dependency, ids))
    except BaseException:
        withdraw([job])
        raise
    return ids


def _submit_once(job: Job, dependency: Sequence[str], before: Sequence[str]) -> str:
    """Submit a job, and return its id. If sbatch fails without a refusal, look in the queue before trying again.

    sbatch may fail although SLURM has accepted the job. The path of its script, which no other job has, identifies the job.

    Args:
        before: ids of jobs with the same script that are submitted already.

    Raises:
        UserError: SLURM refuses the job, or does not answer.
    """
    for tries in range(1, TRIES + 1):
        try:
            output = _sbatch(job, *job.command[:-1], *dependency, job.command[-1])
        except UserError as error:
            if LASTING.search(error.message):
                raise
            time.sleep(tries)  # SLURM may be about to accept the job
            found = [id for id, queued in slurm.queue().items() if queued.script == job.file and id not in before]
            if not found and tries < TRIES and "did not answer" not in error.message:
                continue
            if len(found) != 1:
                raise
            return found[0]
        # In a federation the name of the cluster follows the id. At some sites sbatch prints a greeting before it.
        if not (matches := re.findall(r"^(\d+)(?:;.*)?$", output, re.MULTILINE)):
            raise UserError(f"sbatch gave no job id; it said: {output.strip()}", "is `sbatch` here SLURM's own?")
        return matches[-1]
    raise AssertionError("the last try returns or raises")


def try_out(job: Job, resources: Resources) -> None:
    """Check that SLURM could run this job, without submitting it. Raises: UserError."""
    with ThreadPoolExecutor() as pool:  # each command may take long: ask at the same time
        asked = pool.submit(_partitions_of, job)
        _sbatch(job, "sbatch", "--test-only", stdin=job.script)
    # SLURM (22.05) accepts a job that is too long or too large for its partition, and lets it wait for ever.
    if not (partitions := asked.result()):
        return
    time_s = seconds(_options(job)["time"])
    longest = max(partitions, key=lambda partition: partition.time_s or inf)
    if longest.time_s and time_s > longest.time_s:
        raise UserError(f"the time limit is {slurm_time(time_s)}; partition `{longest.name}` allows "
                        f"{slurm_time(longest.time_s)}", f"use --time {slurm_time(longest.time_s)} or less")
    largest = max(partitions, key=lambda partition: partition.nodes)
    if resources.nodes > largest.nodes:
        raise UserError(f"{resources.nodes} nodes are asked for; partition `{largest.name}` has {largest.nodes}",
                        f"ask for fewer: {_partition_text(largest)}")


def _sbatch(job: Job, *words: str, stdin: str | None = None) -> str:
    try:
        return slurm.call(*words, stdin=stdin, timeout_s=60)
    except UserError as error:
        for pattern, advice in REFUSALS:
            if re.search(pattern, error.message, re.IGNORECASE):
                reason = re.sub(r"^`sbatch` failed: |(allocation failure|Batch job submission failed): ", "", error.message)
                raise UserError(f"SLURM refuses this job: {reason}", advice(job)) from None
        raise


def _options(job: Job) -> dict[str, str]:
    """The options in the job's script, by their long names."""
    lines = [line[len("#SBATCH --"):] for line in job.script.splitlines() if line.startswith("#SBATCH --")]
    return {key: "".join(shlex.split(value)) for key, _, value in (line.partition("=") for line in lines)}


def _partitions_of(job: Job) -> list[slurm.Partition]:
    """The partitions in which the job may run."""
    wanted = _options(job).get("partition")
    names = wanted.split(",") if wanted else []
    return [partition for partition in slurm.partitions()
            if partition.name in names or wanted is None and partition.default]


def _partition_text(partition: slurm.Partition) -> str:
    gpus = " and ".join(f"{count} {kind or 'GPU(s)'}" for kind, count in partition.gpus.items()) or "no GPU"
    return (f"partition `{partition.name}` has {partition.nodes} node(s) of {partition.cpus} cores, "
            f"{partition.memory_mib // 1024} GiB and {gpus}")


def _known_partitions(job: Job) -> str:
    """Advice for a job whose partition does not exist."""
    names = [partition.name for partition in slurm.partitions()]
    near = difflib.get_close_matches(_options(job).get("partition", ""), names, n=1)
    return (f"did you mean sbatch.partition={near[0]}? " if near else "") + f"the partitions are {', '.join(names)}"


def _asked_and_available(job: Job) -> str:
    """Advice for a job that no node can run: the resources it asks for, and the resources of its partitions."""
    asked = _options(job)
    wanted = ", ".join(f"{key}={asked[key]}" for key in ("nodes", "gpus-per-node", "gres", "cpus-per-task", "mem",
                                                         "mem-per-cpu", "constraint", "exclude", "nodelist") if key in asked)
    return "; ".join([f"asked for: {wanted}", *map(_partition_text, _partitions_of(job))])


# Patterns of sbatch's errors, and the advice for each.
REFUSALS: tuple[tuple[str, Callable[[Job], str]], ...] = (
    (r"invalid partition", _known_partitions),
    (r"invalid account", lambda job: f"give sbatch.account=NAME, not `{_options(job).get('account', '')}`; "
                                     "`sacctmgr show assoc user=$USER` lists your accounts"),
    (r"invalid qos", lambda job: f"give sbatch.qos=NAME, not `{_options(job).get('qos', '')}`"),
    (r"generic resource|gres|node configuration|node count|more processors|memory|feature|node name", _asked_and_available),
    (r"job array", lambda job: f"{len(job.elements or ())} points are more than an array may have here "
                               "(see `scontrol show config | grep MaxArraySize`): sweep fewer points at a time"),
    (r"time limit", lambda job: f"use a --time shorter than {_options(job)['time']}; {_asked_and_available(job)}"),
    (r"unrecognized option", lambda job: "see `man sbatch` for sbatch's options"),
)
