"""From a spec to a run on SLURM, and from a run that has stopped to its next job."""

from __future__ import annotations

import json as jsonlib
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.cluster import slurm
from launch.cluster.config import load_cluster
from launch.cluster.resources import Resources, Wanted, resources_of
from launch.execute import record, snapshot
from launch.execute.prefetch import missing, prefetch
from launch.execute.submission_plan import code_of, make_submission
from launch.execute.submit import hand_over, release, submit, try_out
from launch.plan.initial_weights import resolved, warn
from launch.plan.job_script import Request, node_process, setup, srun_args
from launch.plan.plan import Plan
from launch.plan.show import as_json, show
from launch.plan.spec import Spec, record_spread, spec_of, spread_anew
from launch.plan.submission import last_submission, next_submission
from launch.records.naming import named, new_run_id, shown
from launch.records.process import alive
from launch.records.run import Run, read_run
from launch.records.state import ACTIVE, state_of
from launch.supervise.signals import stop_signals
from trainers.config.schema import SearchConfig
from trainers.contract import exit_codes
from trainers.contract.clock import utc_now
from trainers.contract.errors import UserError
from trainers.contract.files import read_json, replace_text, update_json
from trainers.contract.paths import RunPaths

# By a run's state; any other state is FAILED.
EXIT_CODES = {"finished": exit_codes.FINISHED, "preempted": exit_codes.PREEMPTED, "cancelled": exit_codes.PREEMPTED}


def start(*, spec: Spec, root: Path, request: Request, wanted: Wanted, dry_run: bool, json: bool,
          show_log: Callable[[Run], None] | None, here: bool) -> int:
    """Submit a new run (`here`: run it in the allocation one stands in). Returns the exit code.

    Args:
        show_log: shows the run's log until the run has ended (`--follow`); None: do not wait for the run.

    Raises:
        UserError: something the user must mend; nothing was written or submitted.
    """
    resources = resources_of(spec.config, request.cluster, wanted)
    spec = resolved(spec, root)
    warn([spec])
    check(spec, request, dry_run)
    run_id = new_run_id(spec.name)
    copy = None if here else snapshot.survey(code_of(spec), RunPaths(root / run_id).code)
    plan = make_submission(run_id, spec, request, resources, runs=root, cwd=Path.cwd(), copy=copy, here=here)
    if dry_run:
        print(jsonlib.dumps(as_json(plan), indent=1, ensure_ascii=False) if json else show(plan), end="\n" * json)
        return 0
    if here:
        return _here(plan, request, resources)
    paths, ids, left_out = submit(plan, spec, request.cluster.name)
    for name in left_out[:5]:
        print(f"warning: not copied with the code: {name}", file=sys.stderr)
    _say(paths, ids, request, resources, json)
    return _follow(paths, show_log)


def resume(run: Run, *, request: Request | None, wanted: Wanted, spread: Sequence[str] = (), json: bool,
           show_log: Callable[[Run], None] | None) -> int:
    """Submit a run anew that has stopped. What is not given is as it was submitted last.

    Raises:
        UserError: it is at work or in the queue, or its spec cannot be read.
    """
    paths, sweep = run.paths, run.record.get("sweep")
    number = next_submission(paths, sweep)  # before the state is read: whoever else read the same gets this number too
    run = run.again()
    job = run.record.get("job") or {}
    if run.record["state"] == "finished":
        print(f"run {paths.id} is finished: nothing to resume")
        return 0
    if job.get("kind") == "slurm" and not job["ids"]:
        if found := _half_submitted(paths, job):
            update_json(paths.record, job={**job, "ids": found})
            release(found)
            print(f"run {paths.id}: its submission had broken off, but job {', '.join(found)} is in the queue")
            return _follow(paths, show_log)
    elif job.get("kind") == "slurm" and (queued := slurm.queue(job["ids"])):
        if all(each.reason == "JobHeldUser" for each in queued.values()):  # its submission broke off before it let them go
            release(list(queued))
            print(f"run {paths.id}: job {', '.join(job['ids'])} was on hold, and is let go")
            return _follow(paths, show_log)
        raise UserError(f"run {paths.id} is {state_of(run)}: job {', '.join(job['ids'])} is in SLURM's queue",
                        f"see `launch status {named(paths)}`, or `launch cancel {named(paths)}`")
    elif state_of(run) in ACTIVE and job.get("kind") == "local":
        raise UserError(f"run {paths.id} is running on host {job['host']}", f"`launch cancel {named(paths)}` stops it")
    before = last_submission(paths, sweep)
    if request is None:
        request = Request(before.cluster, before.time, before.options) if before else Request(load_cluster("slurm"))
    elif before and before.cluster.name == request.cluster.name:
        request = replace(request, time=request.time or before.time, options={**before.options, **request.options})
    spec = spread_anew(spec_of(paths), spread) if spread else spec_of(paths)
    if before and not wanted and before.cluster.name == request.cluster.name:
        resources = before.resources
    else:
        if not wanted and not isinstance(spec.config, SearchConfig):
            gpus = before.resources.gpus if before else 1
            wanted = Wanted(gpus=gpus) if gpus else Wanted(procs=before.resources.ranks)
        resources = resources_of(spec.config, request.cluster, wanted)
    check(spec, request, dry_run=False)
    copy = snapshot.load(paths.code) or sweep and snapshot.load(RunPaths(paths.root.parent / sweep).code)
    plan = make_submission(paths.id, spec, request, resources, runs=paths.root.parent, number=number,
                           cwd=Path(before.cwd) if before else Path.cwd(), copy=copy)
    try_out(plan.job, resources)
    try:
        paths.submission(number).mkdir(parents=True)  # which decides between two who try
    except FileExistsError:
        raise UserError(f"run {paths.id} has just been resumed by another process",
                        f"see `launch status {named(paths)}`") from None
    if spread:
        record_spread(paths, spec)
    was = {key: run.record[key] for key in ("state", "job")}
    update_json(paths.record, state="submitted", updated=utc_now(),
                job=record.submitting(request.cluster.name, number))
    try:
        ids = hand_over(plan.job, plan.files, paths.root)
    except BaseException:
        update_json(paths.record, **was)
        shutil.rmtree(paths.submission(number), ignore_errors=True)
        raise
    update_json(paths.record, updated=utc_now(),
                job={"kind": "slurm", "cluster": request.cluster.name, "ids": ids, "submission": number})
    release(ids)
    _say(paths, ids, request, resources, json)
    return _follow(paths, show_log)


def _half_submitted(paths: RunPaths, job: dict[str, Any]) -> list[str]:
    """The jobs of a submission that broke off before it could note them. Raises: UserError if it is under way."""
    if job["host"] == socket.gethostname() and alive(job["pid"], job["started"]):
        raise UserError(f"run {paths.id} is being submitted by process {job['pid']}", "wait a moment")
    script = str(paths.submission(job["submission"]) / "job.sh")
    return sorted((each.id for each in slurm.queue().values() if each.script == script), key=int)


def jobs_of(run: Run) -> tuple[str, ...]:
    """The jobs that must end well for this run to be finished; none if it is.

    Raises:
        UserError: it will not finish by itself.
    """
    job = run.record.get("job") or {}
    state = state_of(run)
    if state == "finished":
        return ()
    if job.get("kind") == "slurm" and (queued := slurm.queue(job["ids"])):
        return tuple(sorted(queued))
    raise UserError(f"run {run.id} is {state}: nothing to wait for",
                    f"`launch resume {run.id}` goes on with it" if job.get("kind") != "local" or state not in ACTIVE
                    else "SLURM can wait for SLURM's jobs alone")


def check(spec: Spec, request: Request, dry_run: bool) -> None:
    """What can be found out before anything is queued; fetches what the nodes cannot."""
    config = spec.config
    if hasattr(config, "check"):
        config.check()
    if not request.cluster.internet and not dry_run and missing(spec, request.cluster):
        # Said on standard error: --json owns the other.
        if prefetch(spec, request.cluster, sys.stderr):
            raise UserError("the data could not be fetched, and the nodes cannot download it (see above)",
                            "`launch prefetch` tries again")


def _say(paths: RunPaths, ids: Sequence[str], request: Request, resources: Resources, json: bool) -> None:
    nexts = [f"launch {word} {named(paths)}" for word in ("status", "logs -f", "cancel")]
    if json:
        print(jsonlib.dumps({"id": paths.id, "jobs": list(ids), "path": str(paths.root), "next": nexts}))
        return
    ranks = f"{resources.gpus} GPU(s)" if resources.gpus else f"{resources.ranks} CPU rank(s)"
    jobs = f"job {ids[0]}" + (f" and {', '.join(ids[1:])} after it" if ids[1:] else "")
    print(f"run {paths.id} submitted to {request.cluster.name} as {jobs}: {ranks} on {resources.nodes} node(s)\n"
          f"folder  {shown(paths.root)}\nnext    {nexts[0]}\n        {nexts[1]}\n        {nexts[2]}")


def _here(plan: Plan, request: Request, resources: Resources) -> int:
    """Run the job's node processes in the allocation one stands in, and stay until they end."""
    allocation = os.environ.get("SLURM_JOB_ID")
    if not allocation:
        raise UserError("--here runs in the allocation one stands in, and this is none",
                        "`salloc` gives one; without --here the run is submitted")
    paths = record.create_run(plan, job=record.submitting(request.cluster.name, 1))
    for name, text in plan.files.items():
        if not name.startswith("submissions/"):
            continue  # an attempt's files come with the attempt
        (paths.root / name).parent.mkdir(parents=True, exist_ok=True)
        replace_text(paths.root / name, text)
    folder = str(paths.submission(1))
    words = ["srun", "--unbuffered", *srun_args(request.cluster, resources, here=True),
             *node_process(request.cluster, plan.command[0], folder)]
    lines = [*setup(request.cluster, None), f"exec {shlex.join(words)}"]
    print(f"run {paths.id} in {shown(paths.root)}, in allocation {allocation}", flush=True)
    with stop_signals() as stop:
        # A session of its own: srun would take the terminal's Ctrl-C for itself.
        srun = subprocess.Popen(["bash", "-c", "\n".join(lines)], start_new_session=True, stdin=subprocess.DEVNULL,
                                env={**slurm.environment(), "SLURM_JOB_ID": allocation})
        asked = False
        while srun.poll() is None:
            if select.select([stop.wakeup], [], [], 1.0)[0]:
                stop.wakeup.recv(4096)
            while stop.received:
                stop.received.pop()
                asked = _stop(paths, srun, asked)
    state = state_of(read_run(paths.root))
    if state == "submitted":  # srun has said why, just above
        shutil.rmtree(paths.root)
        raise UserError(f"srun could not start the run in allocation {allocation} (see above)",
                        f"it needs {resources.nodes} node(s): `squeue --job {allocation}` shows what there is")
    print(f"run {paths.id} is {state}" + ("" if state == "finished" else f"; go on with `launch resume {named(paths)}`"))
    return EXIT_CODES.get(state, exit_codes.FAILED)


def _stop(paths: RunPaths, srun: subprocess.Popen, asked: bool) -> bool:
    """Ask the step to stop with a checkpoint. If it was asked before, or has not begun, end it: SIGTERM makes srun kill it."""
    step = read_json(paths.record)["job"]["ids"]
    if asked or not step:
        srun.send_signal(signal.SIGTERM)
    else:
        slurm.cancel(step, signal="TERM")
    return True


def _follow(paths: RunPaths, show_log: Callable[[Run], None] | None) -> int:
    """Show the log until the run has ended, if that is asked for. Returns the exit code."""
    if show_log is None:
        return 0
    show_log(read_run(paths.root))
    state = state_of(read_run(paths.root))
    print(f"run {paths.id} is {state}")
    return {**EXIT_CODES, "submitted": 0, "running": 0}.get(state, exit_codes.FAILED)
