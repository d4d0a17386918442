"""(run id, spec, cluster, resources) -> Plan: everything that will be run, as plain data.

Pure: no clock, no network, no file system. What `--dry-run` shows is what runs, byte for byte.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping

from launch.cluster.config import ClusterConfig
from launch.cluster.resources import Resources
from launch.plan.initial_weights import Weights
from launch.plan.job_script import Job
from launch.plan.spec import Spec
from trainers.config import compatibility
from trainers.config.deepspeed_json import deepspeed_config
from trainers.config.schema import RunConfig, ScriptConfig, SearchConfig
from trainers.contract.paths import RunPaths

# What SLURM says of a node's process, one a node, is wrong of its ranks, which have torchrun's variables.
NODES_OWN = re.compile(r"SLURM_(PROCID|LOCALID|NODEID|GTIDS|NTASKS\w*|NPROCS|TASKS_PER_NODE|STEP_\w+)$")
# The parts of a rank's memory, by the names that trainers/config/memory.py gives them.
PARTS = ("parameters", "gradients", "optimizer", "buffers", "gathered")


@dataclass(frozen=True)
class Plan:
    """One attempt of one run."""

    run_id: str
    name: str                 # of the task or script
    folder: str               # the run directory, absolute
    attempt: int
    resources: Resources
    batch: str | None         # how the global batch, or a search's work, is split; None for a script
    command: tuple[str, ...]  # what each rank executes
    cwd: str                  # where
    env: Mapping[str, str]    # what every rank gets on top of the inherited environment
    files: Mapping[str, str]  # text by its path in the run directory, written before the first rank starts
    equivalent: str           # the same job without `launch`
    max_restarts: int
    grace_s: float
    hang_s: float | None      # how long a rank may be silent; None: for ever, as a script's
    start_s: float | None     # the same while it rests: see trainers/contract/heartbeat.py
    weights: Weights | None = None  # what its folder keeps for its beginning
    job: Job | None = None    # what SLURM gets, where it is asked for the nodes

    def inherited(self, env: Mapping[str, str]) -> dict[str, str]:
        """What ranks take over from `env`: all; ranks of a task nothing that would change what accelerate does."""
        foreign = ("ACCELERATE_", "TORCHELASTIC_") if self.batch else ()
        taken = {key: value for key, value in env.items() if not key.startswith(foreign) and not NODES_OWN.match(key)}
        if not self.batch and (ours := taken.pop("LAUNCH_CODE", None)):  # a script's `import trainers` is its own
            rest = [folder for folder in taken.get("PYTHONPATH", "").split(os.pathsep) if folder != ours]
            taken["PYTHONPATH"] = os.pathsep.join(rest)
            if not rest:
                del taken["PYTHONPATH"]
        return taken

    def rank_env(self, node: int, local_rank: int, address: str, port: int | str) -> dict[str, str]:
        """torchrun's variables for one rank."""
        here = self.resources.ranks_per_node
        return {
            "RANK": str(node * here + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.resources.ranks),
            "LOCAL_WORLD_SIZE": str(here),
            "GROUP_RANK": str(node),
            "GROUP_WORLD_SIZE": str(self.resources.nodes),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }


def make_plan(run_id: str, spec: Spec, cluster: ClusterConfig, resources: Resources, *, runs: Path, python: str,
              cwd: Path, attempt: int = 1, job: Job | None = None, files: Mapping[str, str] = {}) -> Plan:
    """The plan of attempt `attempt` of a run whose directory is `runs`/`run_id`; `files`: more of them.

    Raises:
        UserError: the batch does not divide over the ranks, or its settings do not go together.
    """
    folder = runs / run_id
    config = spec.config
    env = {**cluster.env, **_rank_environment(config, resources, folder, attempt)}
    files = {"run.yaml": spec.text, **files}
    if not isinstance(config, ScriptConfig):
        batch = _split(config, resources)
        # -P: a `trainers/` or `launch.py` in the folder one stands in shadows nothing.
        command = (python, "-P", "-m", "trainers.run", str(folder))
        program = ["-m", "trainers.run", str(folder)]
    else:
        batch = None
        command = (python, config.script, *config.args)
        program = [config.script, *config.args]
    accelerate_yaml = RunPaths(Path()).plan(attempt) / "accelerate.yaml"
    if isinstance(config, RunConfig) and config.train.strategy in compatibility.ZERO and not config.eval.only:
        settings = deepspeed_config(config, resources.ranks, config.optim.clip_norm)
        files[str(RunPaths(Path()).plan(attempt) / "deepspeed.json")] = json.dumps(settings, indent=1) + "\n"
    if resources.device == "cuda":
        files[str(accelerate_yaml)] = _accelerate_yaml(resources)
        start = ["accelerate", "launch", "--config_file", str(folder / accelerate_yaml)]
        each_node = ["--machine_rank", "NODE", "--main_process_ip", "HEAD", "--main_process_port", "PORT"]
    else:
        start = ["torchrun", "--nproc-per-node", str(resources.ranks_per_node)]
        each_node = ["--nnodes", str(resources.nodes), "--node-rank", "NODE", "--master-addr", "HEAD", "--master-port", "PORT"]
    if resources.nodes > 1:
        start += each_node
    by_hand = {k: v for k, v in env.items() if k not in ("LAUNCH_EVENTS", "LAUNCH_ATTEMPT")}
    if batch is not None:
        by_hand["PYTHONSAFEPATH"] = "1"
    return Plan(
        run_id=run_id, name=config.name, folder=str(folder), attempt=attempt, resources=resources, batch=batch,
        command=command, cwd=str(cwd), env=env, files=files,
        equivalent=shlex.join(["env", *(f"{k}={v}" for k, v in by_hand.items()), *start, *program]),
        max_restarts=config.run.max_restarts, grace_s=config.run.grace_s,
        hang_s=getattr(config.run, "hang_s", None), start_s=getattr(config.run, "start_s", None), weights=spec.weights, job=job,
    )


def _split(config: RunConfig | SearchConfig, resources: Resources) -> str:
    """Raises: UserError if it cannot be, or the config's settings do not go together."""
    ranks = resources.ranks
    if isinstance(config, SearchConfig):
        return f"pieces, each to the first of {ranks} rank(s) x {resources.threads} core(s) that is free"
    compatibility.check(config, resources.device)
    if config.eval.only:
        return f"{config.evaluation_batch(ranks)} samples a rank at a time, evaluated"
    micro, accumulation = config.train.split(ranks)
    parts = f"{micro} micro-batch x {accumulation} accumulation"
    if config.train.micro_batch_size == "auto":
        parts = f"auto micro-batch x accumulation ({parts}, or less at a time if that is what fits)"
    return f"{config.train.batch_size} = {ranks} rank(s) x {parts}"


def _rank_environment(config, resources: Resources, folder: Path, attempt: int) -> dict[str, str]:
    env = {
        "LAUNCH_RUN_DIR": str(folder),
        "LAUNCH_ATTEMPT": str(attempt),
        "LAUNCH_EVENTS": "1",
        "OMP_NUM_THREADS": str(resources.threads),
        "PYTHONUNBUFFERED": "1",
    }
    if resources.nodes == 1:
        env["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo looks for an address by the host's name, which may have none
    env["ACCELERATE_USE_CPU"] = str(resources.device == "cpu").lower()
    if resources.device == "cuda" and isinstance(config, RunConfig) and config.train.deterministic:
        env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS may sum in another order each time
    return env


def _accelerate_yaml(resources: Resources) -> str:
    values = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU" if resources.ranks > 1 else "NO",
        "num_machines": resources.nodes,
        "num_processes": resources.ranks,
        "machine_rank": 0,
        "mixed_precision": "no",  # the loop does its own
        "use_cpu": False,
        "main_training_function": "main",
        "rdzv_backend": "static",
        "same_network": True,
    }
    # JSON scalars are YAML.
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())


