"""A plan for a person, and as JSON."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path

from launch.plan.plan import Plan
from trainers.contract import heartbeat
from trainers.contract.paths import RunPaths

CHOSEN_LATER = "<a free port, chosen when the attempt begins>"
INHERITED = "<a file descriptor>"
HEAD = "<the address by which the nodes reach the first of them>"


def show(plan: Plan) -> str:
    """The plan for a person: every command, environment variable and file."""
    r = plan.resources
    lines = [
        f"run        {plan.run_id}",
        f"directory  {plan.folder}",
        f"ranks      {r.ranks} on {r.device}, {r.nodes} node(s), {r.threads} thread(s) each",
    ]
    if plan.batch:
        lines.append(f"batch      {plan.batch}")
    if plan.weights:
        kept = f", kept in {RunPaths(Path()).init}/ until it has its own" if plan.weights.step is not None else ""
        lines.append(f"weights    {plan.weights}{kept}")
    if plan.job:
        lines += ["", "# handed to SLURM" + (f", {plan.job.links} times, each to begin if the one before ends badly"
                                            if plan.job.links > 1 else ""), shlex.join(plan.job.command)]
        lines += ["scontrol release ID  # once the run's record holds the job's id"]
        lines += ["", f"# file {plan.job.file}", plan.job.script.rstrip("\n")]
    lines += ["", f"# each rank, in {plan.cwd}", shlex.join(plan.command), "", "# environment of every rank"]
    lines += [f"{key}={shlex.quote(value)}" for key, value in plan.env.items()]
    for env in _rank_envs(plan):
        lines += ["", f"# environment of rank {env['RANK']}"] + [f"{k}={v}" for k, v in env.items()]
    if r.nodes > 1:
        lines += ["", f"# and so on, to rank {r.ranks - 1} of {r.nodes} nodes"]
    for path, text in plan.files.items():
        lines += ["", f"# file {path}", text.rstrip("\n")]
    lines += ["", "# the same by hand" + (", on each node" if r.nodes > 1 else "") + ", once these files are there",
              plan.equivalent]
    return "\n".join(lines) + "\n"


def _rank_envs(plan: Plan) -> list[dict[str, str]]:
    """Of the first node's ranks."""
    address = "127.0.0.1" if plan.resources.nodes == 1 else HEAD
    beats = {heartbeat.VARIABLE: INHERITED} if plan.batch else {}
    return [{**plan.rank_env(0, local_rank, address, CHOSEN_LATER), **beats}
            for local_rank in range(plan.resources.ranks_per_node)]


def as_json(plan: Plan) -> dict:
    return {**asdict(plan), "rank_env": _rank_envs(plan)}
