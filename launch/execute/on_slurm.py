"""Run on SLURM: submit a new run, or submit a stopped run again."""

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
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.cluster import reasons, slurm
from launch.cluster.config import load_cluster
from launch.cluster.resources import Resources, Wanted, resources_of
from launch.cluster.slurm_command import environment
from launch.execute import after, record, snapshot
from launch.execute.copies import adopt
from launch.execute.prefetch import missing, prefetch
from launch.execute.renewal import complete, renew, resources_again, say_cluster_changes, survey
from launch.execute.submission_plan import code_of, describe_code, make_submission
from launch.execute.submit import hand_over, release, submit, try_out
from launch.plan.initial_weights import warn_of_broken, with_weights
from launch.plan.job_script import Request, node_process, setup, srun_args
from launch.plan.plan import Plan
from launch.plan.show import as_json, show
from launch.plan.spec import Spec, record_changes, spec_of, with_changes
from launch.plan.submission import last_submission, next_submission
from launch.records.naming import command_name, new_run_id, short_path
from launch.records.process import alive
from launch.records.read import read_sweep
from launch.records.run import Run, read_run
from launch.records.state import ACTIVE, FINAL, state_of, true_states
from launch.supervise.signals import stop_signals
from trainers.config.schema import SearchConfig
from trainers.contract import exit_codes
from trainers.contract.clock import utc_now
from trainers.contract.errors import UserError
from trainers.contract.files import read_json, replace_text, update_json
from trainers.contract.paths import RunPaths

ENDING_S = 30.0  # for a job to leave the queue after its run has ended
# Exit codes by the run's state. Any other state gives FAILED.
EXIT_CODES = {"finished": exit_codes.FINISHED, "preempted": exit_codes.PREEMPTED, "cancelled": exit_codes.PREEMPTED}


def start(*, spec: Spec, root: Path, request: Request, wanted: Wanted, dry_run: bool, json: bool,
          show_log: Callable[[Run], None] | None, here: bool) -> int:
    """Submit a new run. Returns the exit code.

    Args:
        show_log: shows the run's log until the run has ended (`--follow`); None: do not wait for the run.
        here: run in the allocation that this command is in, and wait for the run, instead of submitting it.

    Raises:
        UserError: the user must fix something; nothing was written or submitted.
    """
    resources = resources_of(spec.config, request.cluster, wanted, partition=request.partition)
    spec = with_weights(spec, root)
    warn_of_broken([spec])
    check(spec, request, dry_run)
    run_id = new_run_id(spec.name)
    copy = None if here else snapshot.survey(code_of(spec), RunPaths(root / run_id).code)
    plan = make_submission(run_id, spec, request, resources, runs=root, cwd=Path.cwd(), copy=copy, here=here)
    if dry_run:
        print(jsonlib.dumps(as_json(plan), indent=1, ensure_ascii=False) if json else show(plan), end="\n" * json)
        return 0
    if here:
        return _run_in_allocation(plan, spec, request, resources)
    paths, ids, warnings = submit(plan, spec, request.cluster.name)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    _print_submitted(paths, ids, request, resources, json)
    return _follow(paths, show_log)


def resume(run: Run, *, request: Request | None, wanted: Wanted, changes: Sequence[str] = (), json: bool,
           show_log: Callable[[Run], None] | None) -> int:
    """Submit a stopped run again. Settings that are not given are those of its last submission. Returns the exit code.

    Raises:
        UserError: the run is running or in the queue, or its spec cannot be read.
    """
    paths, sweep = run.paths, run.record.get("sweep")
    adopt(run)
    # The number is read before the state: two processes that see the same state also get the same number, and only
    # one of them can make the submission's folder.
    number = next_submission(paths, sweep)
    run = run.reread()
    job = run.record.get("job") or {}
    if run.record["state"] == "finished" and (told := complete(run, changes)):
        print(told)
        return 0
    if job.get("kind") == "slurm" and not job["ids"]:
        if ids := _unrecorded_jobs(paths, job):
            update_json(paths.record, job={**job, "ids": ids})
            after.follow({paths: ids})
            release(ids)
            print(f"run {paths.id}: its submission was interrupted, but job {', '.join(ids)} is in the queue")
            return _follow(paths, show_log)
    elif job.get("kind") == "slurm" and (queued := _still_queued(run)):
        # The submission was interrupted before it released its jobs.
        if all(waiting.reason == reasons.HELD_BY_OWNER for waiting in queued.values()):
            after.follow({paths: job["ids"]})
            release(list(queued))
            print(f"run {paths.id}: job {', '.join(job['ids'])} was on hold and has been released")
            return _follow(paths, show_log)
        raise UserError(f"run {paths.id} is {state_of(run)}: job {', '.join(job['ids'])} is in SLURM's queue",
                        f"see `launch status {command_name(paths)}`, or cancel the run: `launch cancel {command_name(paths)}`")
    elif state_of(run) in ACTIVE and job.get("kind") == "local":
        raise UserError(f"run {paths.id} is running on host {job['host']}", f"`launch cancel {command_name(paths)}` stops it")
    before = last_submission(paths, sweep)
    if request is None:
        request = (Request(load_cluster(before.cluster.name), before.time, before.options) if before
                   else Request(load_cluster("slurm")))
    elif before and before.cluster.name == request.cluster.name:
        request = replace(request, time=request.time or before.time, options={**before.options, **request.options})
    request = after.as_before(request, before, begun=bool(paths.attempt_numbers()))
    spec = with_changes(spec_of(paths), changes) if changes else spec_of(paths)
    if before and not wanted:
        resources = resources_again(spec, before.resources, before.cluster, request.cluster)
    else:
        if not wanted and not isinstance(spec.config, SearchConfig):
            wanted = Wanted(gpus=1)
        resources = resources_of(spec.config, request.cluster, wanted, partition=request.partition)
    check(spec, request, dry_run=False)
    code, in_use = _code_home(paths, sweep)
    specs, copy = ([], snapshot.load(code)) if in_use else survey([spec], code)
    plan = make_submission(paths.id, spec, request, resources, runs=paths.root.parent, number=number,
                           cwd=Path(before.cwd) if before else Path.cwd(), copy=copy)
    assert plan.job is not None  # make_submission always plans one
    try_out(plan.job, resources)
    try:
        paths.submission(number).mkdir(parents=True)  # of two processes that try, one succeeds
    except FileExistsError:
        raise UserError(f"run {paths.id} has just been resumed by another process",
                        f"see `launch status {command_name(paths)}`") from None
    if changes:
        record_changes(paths, spec)
    before_submission = {key: run.record[key] for key in ("state", "job")}
    update_json(paths.record, state="submitted", updated=utc_now(),
                job=record.submitting(request.cluster.name, number))
    try:
        if before:
            say_cluster_changes(before.cluster, request.cluster)
        renew(specs, code, f"code-until-attempt-{record.next_attempt(paths) - 1}" if code == paths.code
              else f"code-until-submission-{number - 1}")
        ids = hand_over(plan.job, plan.files, paths.root)
    except BaseException:
        update_json(paths.record, **before_submission)
        shutil.rmtree(paths.submission(number), ignore_errors=True)
        raise
    update_json(paths.record, updated=utc_now(),
                job={"kind": "slurm", "cluster": request.cluster.name, "ids": ids, "submission": number})
    after.follow({paths: ids})
    release(ids)
    _print_submitted(paths, ids, request, resources, json)
    return _follow(paths, show_log)


def _still_queued(run: Run) -> dict[str, slurm.Queued]:
    """The jobs of a run that are waiting or running. A job whose run has ended may need a moment to end: wait for it."""
    ids, began = run.record["job"]["ids"], time.monotonic()
    while queued := slurm.queue(ids):
        ending = run.record["state"] in FINAL and not any(job.waiting for job in queued.values())
        if not ending or time.monotonic() - began > ENDING_S:
            break
        time.sleep(1.0)
    return queued


def _code_home(paths: RunPaths, sweep: str | None) -> tuple[Path, bool]:
    """The folder with the code of a run that has stopped, and whether other runs of its sweep are using that folder."""
    if not sweep or paths.code.exists():
        return paths.code, False
    home = RunPaths(paths.root.parent / sweep)
    others = [read_run(folder) for point in read_sweep(paths.root.parent, sweep)["points"]
              if (folder := paths.root.parent / point["run"]) != paths.root and RunPaths(folder).record.exists()]
    in_use = any(truth.jobs or truth.state in ACTIVE for _, truth in true_states(others))
    if in_use:
        print(f"run {paths.id} uses the code as it was submitted: other runs of sweep {sweep} still use it", file=sys.stderr)
    return home.code, in_use


def _unrecorded_jobs(paths: RunPaths, job: dict[str, Any]) -> list[str]:
    """The ids of queued jobs that an interrupted submission could not record.

    Raises:
        UserError: the submission is still in progress, or SLURM does not answer.
    """
    if job["host"] == socket.gethostname() and alive(job["pid"], job["started"]):
        raise UserError(f"run {paths.id} is being submitted by process {job['pid']}", "wait a moment")
    script = str(paths.submission(job["submission"]) / "job.sh")
    return sorted((queued.id for queued in slurm.queue().values() if queued.script == script), key=int)


def check(spec: Spec, request: Request, dry_run: bool) -> None:
    """Check the spec before anything is queued, and download the data that the nodes cannot download.

    Raises:
        UserError: the spec is wrong, or the data could not be downloaded.
    """
    config = spec.config
    if hasattr(config, "check"):
        config.check()
    if not request.cluster.internet and not dry_run and missing(spec, request.cluster):
        # Standard output is for --json.
        if prefetch(spec, request.cluster, sys.stderr):
            raise UserError("the data could not be downloaded (see above), and the nodes have no internet access",
                            "try again with `launch prefetch`")


def _print_submitted(paths: RunPaths, ids: Sequence[str], request: Request, resources: Resources, json: bool) -> None:
    commands = [f"launch {word} {command_name(paths)}" for word in ("status", "logs -f", "cancel")]
    if json:
        print(jsonlib.dumps({"id": paths.id, "jobs": list(ids), "path": str(paths.root), "next": commands}))
        return
    ranks = f"{resources.gpus} GPU(s)" if resources.gpus else f"{resources.ranks} CPU rank(s)"
    jobs = f"job {ids[0]}" + (f" and {', '.join(ids[1:])} after it" if ids[1:] else "")
    print(f"run {paths.id} submitted to {request.cluster.name} as {jobs}: {ranks} on {resources.nodes} node(s)\n"
          f"folder  {short_path(paths.root)}\nnext    {commands[0]}\n        {commands[1]}\n        {commands[2]}")


def _run_in_allocation(plan: Plan, spec: Spec, request: Request, resources: Resources) -> int:
    """Run the job's node processes in the allocation that this command is in. Returns the exit code when they have ended."""
    allocation = os.environ.get("SLURM_JOB_ID")
    if not allocation:
        raise UserError("--here needs an allocation, and this shell is not in one",
                        "get one with `salloc`, or leave out --here to submit the run")
    paths = record.create_run(plan, job=record.submitting(request.cluster.name, 1))
    for name, text in plan.files.items():
        if not name.startswith("submissions/"):
            continue  # the attempt writes its own files
        (paths.root / name).parent.mkdir(parents=True, exist_ok=True)
        replace_text(paths.root / name, text)
    describe_code([spec], paths.code)
    folder = str(paths.submission(1))
    words = ["srun", "--unbuffered", *srun_args(request.cluster, resources, here=True),
             *node_process(request.cluster, plan.command[0], folder)]
    lines = [*setup(request.cluster, None), f"exec {shlex.join(words)}"]
    print(f"run {paths.id} in {short_path(paths.root)}, in allocation {allocation}", flush=True)
    with stop_signals() as stop:
        # In a new session, so that srun does not see the terminal's Ctrl-C.
        srun = subprocess.Popen(["bash", "-c", "\n".join(lines)], start_new_session=True, stdin=subprocess.DEVNULL,
                                env={**environment(), "SLURM_JOB_ID": allocation})
        asked = False
        while srun.poll() is None:
            if select.select([stop.wakeup], [], [], 1.0)[0]:
                stop.wakeup.recv(4096)
            while stop.received:
                asked = _stop(paths, srun, asked, stop.received.pop())
    state = state_of(read_run(paths.root))
    if state == "submitted":  # srun has printed the reason
        shutil.rmtree(paths.root)
        raise UserError(f"srun could not start the run in allocation {allocation} (see above)",
                        f"it needs {resources.nodes} node(s): see the allocation with `squeue --job {allocation}`")
    advice = "" if state == "finished" else f"; continue with `launch resume {command_name(paths)}`"
    print(f"run {paths.id} is {state}{advice}")
    return EXIT_CODES.get(state, exit_codes.FAILED)


def _stop(paths: RunPaths, srun: subprocess.Popen, asked: bool, number: int) -> bool:
    """Ask the job step to stop with a checkpoint, because of signal `number`. End a step that was `asked` before or has not
    started. Returns True."""
    step = read_json(paths.record)["job"]["ids"]
    try:  # the node process sees only SIGTERM
        replace_text(paths.stop_reason(max(paths.attempt_numbers(), default=0)), record.STOPPED_BY[signal.Signals(number).name])
    except OSError:
        pass
    if asked or not step:
        srun.send_signal(signal.SIGTERM)  # srun then kills the step
    else:
        slurm.cancel(step, signal="TERM")
    return True


def _follow(paths: RunPaths, show_log: Callable[[Run], None] | None) -> int:
    """Show the log until the run has ended, unless `show_log` is None. Returns the exit code."""
    if show_log is None:
        return 0
    show_log(read_run(paths.root))
    state = state_of(read_run(paths.root))
    print(f"run {paths.id} is {state}")
    return {**EXIT_CODES, "submitted": 0, "running": 0}.get(state, exit_codes.FAILED)
