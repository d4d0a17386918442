"""A plan as text for a person, and as JSON."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.plan.plan import Plan
from trainers.contract import heartbeat
from trainers.contract.paths import RunPaths

CHOSEN_LATER = "<a free port, chosen when the attempt starts>"
INHERITED = "<a file descriptor>"
HEAD = "<the address of the first node>"


def show(plan: Plan) -> str:
    """Return the plan as text for a person: every command, environment variable and file."""
    resources = plan.resources
    several_nodes = resources.nodes > 1
    lines = [
        f"run        {plan.run_id}",
        f"directory  {plan.folder}",
        f"ranks      {resources.ranks} on {resources.device}, {resources.nodes} node(s), {resources.threads} thread(s) each",
    ]
    if plan.batch:
        lines.append(f"batch      {plan.batch}")
    if plan.weights:
        kept = f", kept in {RunPaths(Path()).init}/ until the first checkpoint" if plan.weights.step is not None else ""
        lines.append(f"weights    {plan.weights}{kept}")
    if plan.job:
        chain = f" {plan.job.links} times; each job starts only if every job before it failed" if plan.job.links > 1 else ""
        lines += ["", f"# handed to SLURM{chain}", shlex.join(plan.job.command),
                  "scontrol release ID  # after the run's record holds the job's id"]
        lines += ["", f"# file {plan.job.file}", plan.job.script.rstrip("\n")]
    lines += ["", f"# command of every rank, run in {plan.cwd}", shlex.join(plan.command), "", "# environment of every rank"]
    lines += [f"{key}={shlex.quote(value)}" for key, value in plan.env.items()]
    lines += [f"{key}=${{{key}:-{shlex.quote(value)}}}" for key, value in plan.defaults.items()]
    if plan.path:
        lines.append(f"PYTHONPATH={shlex.quote(plan.path)}${{PYTHONPATH:+:$PYTHONPATH}}")
    for env in _first_node_envs(plan):
        lines += ["", f"# environment of rank {env['RANK']}"] + [f"{k}={v}" for k, v in env.items()]
    if several_nodes:
        lines += ["", f"# and so on for the other nodes, up to rank {resources.ranks - 1}"]
    for path, text in plan.files.items():
        lines += ["", f"# file {path}", text.rstrip("\n")]
    lines += ["", f"# the same job without launch{', on each node' if several_nodes else ''}; write the files above first",
              plan.equivalent]
    return "\n".join(lines) + "\n"


def _first_node_envs(plan: Plan) -> list[dict[str, str]]:
    """Return the environments of the first node's ranks, without the variables that all ranks share."""
    address = "127.0.0.1" if plan.resources.nodes == 1 else HEAD
    beats = {heartbeat.VARIABLE: INHERITED} if plan.batch else {}
    return [{**plan.rank_env(0, local_rank, address, CHOSEN_LATER), **beats}
            for local_rank in range(plan.resources.ranks_per_node)]


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan for JSON, with torchrun's variables of the first node's ranks."""
    return {**asdict(plan), "rank_env": _first_node_envs(plan)}
