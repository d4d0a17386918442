"""Hand runs to SLURM: plan the submission, let SLURM look at it, write the run directory, submit."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from pathlib import Path

from launch.cluster import slurm
from launch.cluster.resources import Resources
from launch.cluster.times import seconds, slurm_time
from launch.execute import record, snapshot
from launch.execute.submission_plan import code_of
from launch.plan.job_script import Job
from launch.plan.plan import Plan
from launch.plan.spec import Spec
from trainers.contract.clock import utc_now
from trainers.contract.errors import UserError
from trainers.contract.files import replace_text, update_json
from trainers.contract.paths import RunPaths


def submit(plan: Plan, spec: Spec, cluster: str) -> tuple[RunPaths, list[str], tuple[str, ...]]:
    """Make the run directory and hand its job to SLURM.

    Args:
        spec: with the user's code where it is now.

    Returns:
        the run, the ids of its jobs (several for a chain), and what was left out of the copied code.

    Raises:
        UserError: SLURM would not take it: nothing was written then.
    """
    try_out(plan.job, plan.resources)
    paths = record.create_run(plan, job=record.submitting(cluster, 1))
    try:
        copy = snapshot.take(code_of(spec), paths.code)
        ids = hand_over(plan.job, plan.files, paths.root)
        update_json(paths.record, job={"kind": "slurm", "cluster": cluster, "ids": ids, "submission": 1}, updated=utc_now())
        release(ids)
    except BaseException:
        withdraw([plan.job])
        shutil.rmtree(paths.root, ignore_errors=True)  # made just now, and never run
        raise
    return paths, ids, copy.left_out


def withdraw(jobs: Iterable[Job]) -> None:
    """Cancel those of the jobs that were submitted, also one whose id was not heard."""
    files = {job.file for job in jobs}
    try:
        slurm.cancel(id for id, job in slurm.queue().items() if job.script in files)
    except UserError:  # SLURM does not answer, which is being said
        pass


def release(ids: Sequence[str]) -> None:
    """Let jobs that were submitted on hold go: from now on the run's record is theirs to write. Raises: UserError."""
    slurm.call("scontrol", "release", ",".join(ids))


def hand_over(job: Job, files: Mapping[str, str], root: Path) -> list[str]:
    """Write what a job reads, of a plan's files, under `root`, and submit it, link by link. Returns the ids; they are on
    hold. Raises: UserError."""
    own = {name: text for name, text in files.items() if name.startswith("submissions/")}  # an attempt writes the rest
    try:
        for name, text in {**own, os.path.relpath(job.file, root): job.script}.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, text)
    except OSError as error:
        raise UserError(f"{root} cannot be written: {error.strerror}", "make room there") from error
    ids: list[str] = []
    try:
        for _ in range(job.links):
            # Of all before it: that the one before was struck off would be an end that was not good.
            follows = [f"--dependency=afternotok:{':'.join(ids)}", "--kill-on-invalid-dep=yes"] if ids else []
            said = _sbatch(job, *job.command[:-1], *follows, job.command[-1])
            if not (found := re.findall(r"^(\d+)(?:;.*)?$", said, re.MULTILINE)):  # a federation's cluster comes after it
                raise UserError(f"sbatch gave no job id; it said: {said.strip()}", "is `sbatch` here SLURM's own?")
            ids.append(found[-1])  # some sites' sbatch greets first
    except BaseException:
        withdraw([job])
        raise
    return ids


def try_out(job: Job, resources: Resources) -> None:
    """Ask SLURM whether it could ever run this job, and submit nothing. Raises: UserError."""
    _sbatch(job, "sbatch", "--test-only", stdin=job.script)
    # What SLURM (22.05) takes all the same, and then lets wait for ever.
    if not (partitions := _of(job)):
        return
    time_s = seconds(_asked(job)["time"])
    longest = max(partitions, key=lambda partition: partition.time_s or inf)
    if time_s > (longest.time_s or inf):
        raise UserError(f"the time limit is {slurm_time(time_s)}; partition `{longest.name}` allows "
                        f"{slurm_time(longest.time_s)}", f"--time {slurm_time(longest.time_s)} or less")
    largest = max(partitions, key=lambda partition: partition.nodes)
    if resources.nodes > largest.nodes:
        raise UserError(f"{resources.nodes} nodes are asked for; partition `{largest.name}` has {largest.nodes}",
                        f"ask for fewer: {_has(largest)}")


def _sbatch(job: Job, *words: str, stdin: str | None = None) -> str:
    try:
        return slurm.call(*words, stdin=stdin, timeout_s=60)
    except UserError as error:
        for pattern, advice in REFUSALS:
            if re.search(pattern, error.message, re.IGNORECASE):
                said = re.sub(r"^`sbatch` failed: |(allocation failure|Batch job submission failed): ", "", error.message)
                raise UserError(f"SLURM refuses this job: {said}", advice(job)) from None
        raise


def _asked(job: Job) -> dict[str, str]:
    """The options in the job's script, by their long names."""
    lines = [line[len("#SBATCH --"):] for line in job.script.splitlines() if line.startswith("#SBATCH --")]
    return {key: "".join(shlex.split(value)) for key, _, value in (line.partition("=") for line in lines)}


def _of(job: Job) -> list[slurm.Partition]:
    """The partition that the job goes to; several if it may run in any of them."""
    wanted = _asked(job).get("partition")
    names = wanted.split(",") if wanted else []
    return [found for found in slurm.partitions() if found.name in names or wanted is None and found.default]


def _has(partition: slurm.Partition) -> str:
    gpus = " and ".join(f"{count} {kind or 'GPU(s)'}" for kind, count in partition.gpus.items()) or "no GPU"
    return (f"partition `{partition.name}` has {partition.nodes} node(s) of {partition.cpus} cores, "
            f"{partition.memory_mib // 1024} GiB and {gpus}")


def _there_are(job: Job) -> str:
    names = [partition.name for partition in slurm.partitions()]
    near = difflib.get_close_matches(_asked(job).get("partition", ""), names, n=1)
    return (f"did you mean sbatch.partition={near[0]}? " if near else "") + f"there is {', '.join(names)}"


def _fits(job: Job) -> str:
    """What was asked for, and what there is."""
    asked = _asked(job)
    wanted = ", ".join(f"{key}={asked[key]}" for key in ("nodes", "gpus-per-node", "gres", "cpus-per-task", "mem",
                                                         "mem-per-cpu", "constraint", "exclude", "nodelist") if key in asked)
    return "; ".join([f"asked for: {wanted}", *map(_has, _of(job))])


# What SLURM says, and the advice.
REFUSALS: tuple[tuple[str, Callable[[Job], str]], ...] = (
    (r"invalid partition", _there_are),
    (r"invalid account", lambda job: f"sbatch.account=NAME, not `{_asked(job).get('account', '')}`; "
                                     "`sacctmgr show assoc user=$USER` lists yours"),
    (r"invalid qos", lambda job: f"sbatch.qos=NAME, not `{_asked(job).get('qos', '')}`"),
    (r"generic resource|gres|node configuration|node count|more processors|memory|feature|node name", _fits),
    (r"job array", lambda job: f"{len(job.elements or ())} points are more than an array may have here "
                               "(`scontrol show config | grep MaxArraySize`): sweep a part of them at a time"),
    (r"time limit", lambda job: f"asked for {_asked(job)['time']}: a shorter --time; {_fits(job)}"),
    (r"unrecognized option", lambda job: "see `man sbatch` for its options"),
)
