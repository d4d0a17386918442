"""The trial job: a run of a minute on the cluster's nodes, which shows what is wrong there."""

from __future__ import annotations

import io
import json
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
from launch.plan.plan import make_plan
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
START_S = 300.0    # for the small job to start
END_S = 240.0      # and then to end
TROUBLE_S = 20.0   # of these, once it has failed, or a node has complained and no rank has begun
GONE_S = 30.0      # and then to leave the queue
JOB_TIME = "5m"
JOB_GRACE_S = 10
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


def trial_spec(cluster: ClusterConfig, *overrides: str) -> Spec:
    return script_spec(PROBE, overrides=overrides, cluster=cluster)


def trial_here(cluster: ClusterConfig, runs: Path, say: Callable[[str], object]) -> Iterator[Check]:
    gpus = visible_gpus(os.environ)
    resources = local_resources(Wanted(gpus=gpus) if gpus else Wanted(procs=2))
    spec = trial_spec(cluster, "run.max_restarts=0")
    run_id = new_run_id("doctor")

    def plan_of(number: int):
        return make_plan(run_id, spec, cluster, resources, runs=runs, python=sys.executable, cwd=Path.cwd(), attempt=number)

    say(f"{resources.ranks} rank(s) on {resources.device} try this machine")
    paths = record.create_run(plan_of(1))
    local.execute(plan_of, paths, 1, make_view(json=True, stream=io.StringIO()), restarts=0)
    yield from _found(paths, [socket.gethostname()], "")


def trial_on_slurm(cluster: ClusterConfig, runs: Path, nodes: int | None, say: Callable[[str], object]) -> Iterator[Check]:
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
        now = f"job {job} runs on {', '.join(hosts)}" if hosts else f"job {job} waits: {reasons.words(queued.reason)}"
        if now != said:
            said = now
            say(f"{now} (for {deadline - time.monotonic():.0f} s at most)")
        failed = read_run(paths.root).record["state"] == "failed" or not paths.logs(1) and _failed_starts(paths, hosts, [job])
        troubled = (troubled or time.monotonic()) if failed else None
        if troubled and time.monotonic() > troubled + TROUBLE_S:
            return hosts, "not all nodes have started launch"
        if time.monotonic() > deadline:
            return hosts, (f"job {job} did not end within {END_S:.0f} s" if hosts else
                           f"job {job} has not started within {START_S:.0f} s: {reasons.words(queued.reason)}")
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
    return {hosts[node_of_rank(rank, len(ranks), len(hosts))]: (probe, f"rank {rank}: {said}")
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
