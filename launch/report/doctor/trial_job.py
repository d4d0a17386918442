"""The trial of `launch doctor --job`: a run of about a minute that shows what is wrong on the nodes."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.cluster import reasons, slurm
from launch.cluster.config import ClusterConfig
from launch.cluster.resources import Wanted, local_resources, node_of_rank, slurm_resources, visible_gpus
from launch.execute import local, record, snapshot
from launch.execute.submission_plan import OWN, code_of, make_submission
from launch.execute.submit import submit
from launch.plan.job_script import Request
from launch.plan.plan import Plan, make_plan
from launch.plan.spec import Spec, script_spec
from launch.records.naming import new_run_id
from launch.records.run import read_run
from launch.report.doctor.check import Check, partitions_of
from launch.report.explain import explain
from launch.supervise.terminal import make_view
from trainers.contract.errors import UserError
from trainers.contract.files import read_json
from trainers.contract.paths import RunPaths

PROBE = OWN / "trainers" / "trial.py"
START_S = 300.0    # limit for the trial job to start
END_S = 240.0      # limit for the job to end, once it has started
TROUBLE_S = 20.0   # limit for the job to end after a failure, or after an error of a node while no rank has started
GONE_S = 30.0      # limit for the job to leave the queue, once it is cancelled
JOB_TIME = "5m"
JOB_GRACE_S = 10
FIXES = {  # by the name of the probe that failed, in the order of the probes
    "folder": "all nodes must see the folder of runs, and you must be allowed to write there: use --runs DIR, or set `runs:` in "
              "the cluster's file",
    "torch": "install torch in the Python of the nodes: `python:` and `setup:` in the cluster's file choose this Python",
    "GPU": "the driver must be installed and fit torch's CUDA (see `nvidia-smi` on that node); sbatch.exclude=NODE avoids the "
           "node",
    "all-reduce": "set `interface:` in the cluster's file to the network between the nodes; NCCL_DEBUG=INFO in its `env:` makes "
                  "NCCL print more",
}
START_FIX = "correct `setup:`, `prefix:`, `python:` or `interface:` in the cluster's file: they set how nodes start launch"
COMPLAINT = re.compile(r"^(?:slurmstepd[^:]*: error: .*|.*/slurm_script: .*|error: .*|\S*Error: .*)$", re.MULTILINE)
CONSEQUENCE = re.compile(r"CANCELLED AT|did not come|could not be reached")  # a complaint that another node caused


def trial_spec(cluster: ClusterConfig, *overrides: str) -> Spec:
    """The spec of the trial's run."""
    return script_spec(PROBE, overrides=overrides, cluster=cluster)


def trial_here(cluster: ClusterConfig, runs: Path, say: Callable[[str], object]) -> Iterator[Check]:
    """Run the trial on this machine: one rank per visible GPU, or two CPU ranks."""
    gpus = visible_gpus(os.environ)
    resources = local_resources(Wanted(gpus=gpus) if gpus else Wanted(procs=2))
    spec = trial_spec(cluster, "run.max_restarts=0")
    run_id = new_run_id("doctor")

    def plan_of(number: int) -> Plan:
        return make_plan(run_id, spec, cluster, resources, runs=runs, python=sys.executable, cwd=Path.cwd(), attempt=number)

    say(f"trying {resources.ranks} rank(s) on {resources.device} of this machine")
    paths = record.create_run(plan_of(1))
    local.execute(plan_of, paths, 1, make_view(json=True, stream=io.StringIO()), restarts=0)
    yield from _results(paths, [socket.gethostname()], "")


def trial_on_slurm(cluster: ClusterConfig, runs: Path, nodes: int | None, say: Callable[[str], object]) -> Iterator[Check]:
    """Run the trial as a job, wait for the job, and say which nodes failed.

    Args:
        nodes: None: two nodes, or one if the partition has only one.
        say: called with a message while the job waits.
    """
    try:
        if nodes is None:
            largest = max((part.nodes for part in partitions_of(cluster)), default=1)
            nodes = 2 if largest > 1 and (cluster.max_nodes or 2) > 1 else 1
        gpus = nodes * (cluster.gpus_per_node or 1)
        ranks = {"gpus": gpus} if cluster.device == "cuda" else {"procs": nodes}
        resources = slurm_resources(cluster, Wanted(nodes=nodes, **ranks))
        spec = trial_spec(cluster, "run.max_restarts=0", f"run.grace_s={JOB_GRACE_S}")
        run_id = new_run_id("doctor")
        copy = snapshot.survey(code_of(spec), RunPaths(runs / run_id).code)
        request = Request(cluster.model_copy(update={"chain": 1}), time=JOB_TIME)
        plan = make_submission(run_id, spec, request, resources, runs=runs, cwd=Path.cwd(), copy=copy)
        paths, (job,), _ = submit(plan, spec, cluster.name)
        try:
            if cluster.requeue and "Requeue=0" in slurm.call("scontrol", "show", "job", job):
                yield Check("requeue", "warning", "this site does not let jobs be requeued, although they ask for it",
                            "set `requeue: false` in the cluster's file: a run is then submitted as a chain of jobs")
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
        yield from _results(paths, hosts, problem)


def _wait(paths: RunPaths, job: str, say: Callable[[str], object]) -> tuple[list[str], str]:
    """Wait until the job has ended or waiting longer has no use. Return (its nodes, the problem or "")."""
    last_message = ""
    hosts: list[str] = []
    troubled_since: float | None = None
    deadline = time.monotonic() + START_S
    while queued := slurm.queue([job]).get(job):
        if queued.node_list and not hosts:
            hosts, deadline = slurm.expand(queued.node_list), time.monotonic() + END_S
        message = f"job {job} runs on {', '.join(hosts)}" if hosts else f"job {job} waits: {reasons.in_words(queued.reason)}"
        if message != last_message:
            last_message = message
            say(f"{message} (for {deadline - time.monotonic():.0f} s at most)")
        failed = read_run(paths.root).record["state"] == "failed" or not paths.logs(1) and _failed_starts(paths, hosts, [job])
        troubled_since = (troubled_since or time.monotonic()) if failed else None
        if troubled_since and time.monotonic() > troubled_since + TROUBLE_S:
            return hosts, "some nodes have not started launch"
        if time.monotonic() > deadline:
            return hosts, (f"job {job} did not end within {END_S:.0f} s" if hosts else
                           f"job {job} has not started within {START_S:.0f} s: {reasons.in_words(queued.reason)}")
        time.sleep(0.5)
    return hosts or [node for ended in slurm.history([job]).values() for node in ended.nodes], ""


def _wait_gone(job: str) -> None:
    """Wait until the job has left the queue: only then are its logs complete, and can its folder be removed."""
    deadline = time.monotonic() + GONE_S
    while slurm.queue([job]) and time.monotonic() < deadline:
        time.sleep(0.2)


def _results(paths: RunPaths, hosts: Sequence[str], problem: str) -> Iterator[Check]:
    """The results of the probes. The trial's run is removed if it finished.

    Args:
        problem: why `_wait` stopped waiting, or "".
    """
    run = read_run(paths.root)
    ranks = {rank: list(_findings(log)) for rank, log in paths.logs(1).items()}
    if run.record["state"] == "finished":
        output = "; ".join(f"{finding['probe']}: {finding['said']}" for finding in ranks[0] if finding["probe"] != "folder")
        yield Check("job", "ok", f"{len(ranks)} rank(s) on {', '.join(hosts)}; rank 0: {output}")
        shutil.rmtree(paths.root, ignore_errors=True)
        return
    failed = _failed_probes(paths, hosts, ranks) if ranks else _failed_starts(paths, hosts, run.record["job"].get("ids"))
    for host, (probe, message) in failed.items():
        yield Check("job", "error", f"node {host}: {probe}: {message}", FIXES.get(probe, START_FIX))
    where, more = ", ".join(hosts) or "no node", f"`launch explain {shlex.quote(str(paths.root))}` shows more"
    if failed:
        yield Check("job", "error", f"failed on {', '.join(failed)}", more)
    else:
        yield Check("job", "error", f"on {where}: {problem or explain(run)['sentence']}", more)


def _failed_probes(paths: RunPaths, hosts: Sequence[str], ranks: Mapping[int, Sequence[Mapping[str, Any]]]
                   ) -> dict[str, tuple[str, str]]:
    """(probe, message) of the first rank that failed on each node, by node.

    If a rank failed by itself, failed all-reduces do not count: the other ranks only waited for that rank.
    """
    failed = [(rank, finding["probe"], finding["said"]) for rank, findings in ranks.items() for finding in findings
              if not finding["ok"]]
    by_itself = [(rank, probe, message) for rank, probe, message in failed if probe != "all-reduce"]
    failure = read_json(paths.attempt_record(1))["failure"] or {}
    if not by_itself and failure.get("signal"):
        rank = failure["rank"]
        by_itself = [(rank, _next_probe(ranks[rank]), failure["message"])]
    hung = [(rank, _next_probe(findings), "it did not end") for rank, findings in ranks.items() if len(findings) < len(FIXES)]
    return {hosts[node_of_rank(rank, len(ranks), len(hosts))]: (probe, f"rank {rank}: {message}")
            for rank, probe, message in reversed(by_itself or failed or hung)}


def _next_probe(findings: Sequence[Mapping[str, Any]]) -> str:
    """The probe that a rank was running, after those in its findings."""
    return list(FIXES)[min(len(findings), len(FIXES) - 1)]


def _failed_starts(paths: RunPaths, hosts: Sequence[str], jobs: Sequence[str] | None) -> dict[str, tuple[str, str]]:
    """("start" or "folder", message) of each node that has started no rank, by node. Nodes without a known reason are missing."""
    logs = {host: _log(paths, job, node) for job in jobs or () for node, host in enumerate(hosts)}
    head = next(iter(hosts), "")
    no_log = ("folder", f"it could not write to {paths.root}")
    if logs and not logs[head].exists():  # then the head node has started no other node
        return {head: no_log}
    failed = {}
    for host, log in logs.items():
        complaints = [line for line in COMPLAINT.findall(_read(log)) if not CONSEQUENCE.search(line)]
        if complaints:
            failed[host] = ("start", complaints[-1])
        elif not log.exists() and "launch failed" in _read(logs[head]):
            failed[host] = no_log
    return failed


def _log(paths: RunPaths, job: str, node: int) -> Path:
    """The log of a node process."""
    return paths.submission(1) / f"{job}_{node}_log.out"


def _read(file: Path) -> str:
    """The text of a file; "" if the file cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _findings(log: Path) -> Iterator[dict[str, Any]]:
    """The findings of trainers/trial.py in the log of a rank, as {"probe", "ok", "said"}."""
    for text in _read(log).splitlines():
        if match := re.fullmatch(r"(\S+) (ok|failed): (.*)", text):
            yield {"probe": match[1], "ok": match[2] == "ok", "said": match[3]}
