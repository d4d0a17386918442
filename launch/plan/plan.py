"""(run id, spec, cluster, resources) -> Plan: everything that will run, as plain data.

Pure: no clock, no network, no file system. What `--dry-run` shows is what runs, byte for byte.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.cluster.config import ClusterConfig
from launch.cluster.resources import Resources
from launch.plan import accelerate
from launch.plan.job_script import Job
from launch.plan.spec import Spec, Weights
from trainers.config import compatibility
from trainers.config.deepspeed_json import deepspeed_config
from trainers.config.schema import RunConfig, ScriptConfig, SearchConfig
from trainers.contract.paths import RunPaths

# SLURM's task variables describe the node process. Drop them: ranks get torchrun's variables instead.
NODE_PROCESS_VARIABLES = re.compile(r"SLURM_(PROCID|LOCALID|NODEID|GTIDS|NTASKS\w*|NPROCS|TASKS_PER_NODE|STEP_\w+)$")


@dataclass(frozen=True)
class Plan:
    """One attempt of one run."""

    run_id: str
    name: str                 # the task's or script's name
    folder: str               # the run directory, absolute
    attempt: int
    resources: Resources
    batch: str | None         # how the global batch, or the work of a search, is split; None for a script
    command: tuple[str, ...]  # what each rank executes
    cwd: str                  # the folder in which each rank starts
    env: Mapping[str, str]    # variables that every rank gets in addition to the inherited environment
    files: Mapping[str, str]  # file texts by path in the run directory; written before the first rank starts
    equivalent: str           # a command that runs the same job without `launch`
    max_restarts: int
    grace_s: float
    hang_s: float | None      # seconds that a rank may be silent; None: no limit, as for scripts
    start_s: float | None     # the same limit while the rank rests: see trainers/contract/heartbeat.py
    report_s: float | None    # the same limit while a task's report runs
    weights: Weights | None = None  # the weights that the run starts from
    job: Job | None = None    # the submission to SLURM; None: the plan submits nothing
    path: str | None = None   # the folder that comes first on PYTHONPATH, if any
    defaults: Mapping[str, str] = field(default_factory=dict)  # variables that ranks get unless they inherit them

    def inherited(self, env: Mapping[str, str]) -> dict[str, str]:
        """Return the variables of `env` that ranks inherit, and the defaults of variables that `env` does not have.

        Left out are SLURM's variables for the node process, and the variables that an enclosing torchrun or an enclosing
        `launch` has set for its own ranks: with LAUNCH_DEBUG, a rank would not stop with a checkpoint. A task's ranks also
        do not get variables that would change how accelerate works. A script's ranks do not get launch's own packages on
        PYTHONPATH. A module's ranks get the module's folder there.
        """
        foreign = ("TORCHELASTIC_", "LAUNCH_DEBUG", "LAUNCH_HEARTBEAT", *(["ACCELERATE_"] if self.batch else []))
        kept = {**self.defaults, **{key: value for key, value in env.items()
                                    if not key.startswith(foreign) and not NODE_PROCESS_VARIABLES.match(key)}}
        if not self.batch:
            own = kept.pop("LAUNCH_CODE", "").split(os.pathsep)  # a script's `import trainers` means its own package
            inherited = kept.pop("PYTHONPATH", "")
            folders = [folder for folder in inherited.split(os.pathsep) if folder not in own or not folder] if inherited else []
            if folders := [*([self.path] if self.path else []), *folders]:
                kept["PYTHONPATH"] = os.pathsep.join(folders)
        return kept

    def rank_env(self, node: int, local_rank: int, address: str, port: int | str) -> dict[str, str]:
        """Return torchrun's variables for one rank."""
        ranks_per_node = self.resources.ranks_per_node
        env = {
            "RANK": str(node * ranks_per_node + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.resources.ranks),
            "LOCAL_WORLD_SIZE": str(ranks_per_node),
            "GROUP_RANK": str(node),
            "GROUP_WORLD_SIZE": str(self.resources.nodes),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }
        if self.batch is not None:
            return env
        # Scripts and their libraries (torch, Lightning, transformers) tell by the other variables that a launcher started them.
        return env | {
            "ROLE_NAME": "default",
            "ROLE_RANK": env["RANK"],
            "ROLE_WORLD_SIZE": env["WORLD_SIZE"],
            "TORCHELASTIC_RUN_ID": self.run_id,
            "TORCHELASTIC_RESTART_COUNT": str(self.attempt - 1),
            "TORCHELASTIC_MAX_RESTARTS": str(self.max_restarts),
            "TORCHELASTIC_USE_AGENT_STORE": "False",  # True: rank 0 would wait for a store that torchrun's agent opens
        }


def make_plan(run_id: str, spec: Spec, cluster: ClusterConfig, resources: Resources, *, runs: Path, python: str,
              cwd: Path, attempt: int = 1, job: Job | None = None, files: Mapping[str, str] = {}) -> Plan:
    """Return the plan of one attempt of a run.

    Args:
        runs: the folder that holds the run directory, `runs/run_id`.
        python: the Python that runs the ranks.
        cwd: the folder in which the ranks start.
        job: the submission to SLURM, if there is one.
        files: more file texts to write, by path in the run directory.

    Raises:
        UserError: the batch cannot be divided among the ranks, or some settings cannot be combined.
    """
    folder = runs / run_id
    config = spec.config
    env = {**cluster.env, **_rank_environment(config, resources, folder, attempt)}
    files = {"run.yaml": spec.text, **files}
    batch: str | None
    command: tuple[str, ...]
    if not isinstance(config, ScriptConfig):
        batch = _batch_split(config, resources)
        # -P: a `trainers/` or `launch.py` in the working folder must not hide launch's own.
        command = (python, "-P", "-m", "trainers.run", str(folder))
        program = ["-m", "trainers.run", str(folder)]
    else:
        batch = None
        # A module's folder comes first on sys.path, as `python -m` puts it there. -P: and not the folder in which ranks start,
        # because on SLURM the module's folder is a copy.
        start_python = ("-P", "-u", "-m", config.module) if config.module else ("-u", config.script)
        command = (python, *start_python, *config.args)
        program = [*(["-m", config.module] if config.module else [config.script]), *config.args]
        accelerate.check_device(config, resources)
        if config.deepspeed is not None:
            name = RunPaths(Path()).plan(attempt) / "deepspeed.json"
            files[str(name)] = json.dumps(config.deepspeed, indent=1) + "\n"
            env[accelerate.DEEPSPEED_FILE] = str(folder / name)
    accelerate_yaml = RunPaths(Path()).plan(attempt) / "accelerate.yaml"
    if isinstance(config, RunConfig) and config.train.strategy in compatibility.ZERO and not config.eval.only:
        settings = deepspeed_config(config, resources.ranks, config.optim.clip_norm)
        files[str(RunPaths(Path()).plan(attempt) / "deepspeed.json")] = json.dumps(settings, indent=1) + "\n"
    if resources.device == "cuda":
        # The training loop of a task does autocast itself, and shards its models itself.
        values: dict[str, Any] = {"distributed_type": "MULTI_GPU", "mixed_precision": "no"}
        if isinstance(config, ScriptConfig):
            values = accelerate.settings(config)
        if isinstance(config, ScriptConfig) and config.deepspeed is not None:
            values["deepspeed_config"] = {**values["deepspeed_config"], "deepspeed_config_file": env[accelerate.DEEPSPEED_FILE]}
        files[str(accelerate_yaml)] = accelerate.config_file(values, resources.ranks, resources.nodes)
        start = ["accelerate", "launch", "--config_file", str(folder / accelerate_yaml)]
        each_node = ["--machine_rank", "NODE", "--main_process_ip", "HEAD", "--main_process_port", "PORT"]
    else:
        start = ["torchrun", "--nproc-per-node", str(resources.ranks_per_node)]
        each_node = ["--nnodes", str(resources.nodes), "--node-rank", "NODE", "--master-addr", "HEAD", "--master-port", "PORT"]
    if resources.nodes > 1:
        start += each_node
    by_hand = {k: v for k, v in env.items() if k not in ("LAUNCH_EVENTS", "LAUNCH_ATTEMPT")}
    if not isinstance(config, ScriptConfig):
        by_hand["PYTHONSAFEPATH"] = "1"
    elif config.path and config.path != str(cwd):
        by_hand["PYTHONPATH"] = config.path
    return Plan(
        run_id=run_id, name=config.name, folder=str(folder), attempt=attempt, resources=resources, batch=batch,
        command=command, cwd=str(cwd), env=env, files=files,
        equivalent=shlex.join(["env", *(f"{k}={v}" for k, v in by_hand.items()), *start, *program]),
        max_restarts=config.run.max_restarts, grace_s=config.run.grace_s,
        hang_s=getattr(config.run, "hang_s", None), start_s=getattr(config.run, "start_s", None),
        report_s=config.eval.report_s if isinstance(config, RunConfig) else None, weights=spec.weights, job=job,
        path=config.path if isinstance(config, ScriptConfig) else None,
        defaults={"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"} if batch is None else {},  # torchrun's default differs from torch's
    )


def _batch_split(config: RunConfig | SearchConfig, resources: Resources) -> str:
    """Return how the work is split among the ranks, for a person.

    Raises:
        UserError: the batch cannot be divided among the ranks, or some settings cannot be combined.
    """
    ranks = resources.ranks
    if isinstance(config, SearchConfig):
        return f"pieces; each of {ranks} rank(s) x {resources.threads} core(s) takes the next piece when it is free"
    compatibility.check(config, resources.device)
    split = config.batching(ranks)
    if config.eval.only:
        return f"evaluation of {split.evaluation} {split.evaluation_unit} per rank at a time"
    return split.described(auto=config.train.micro_batch_size == "auto")


def _rank_environment(config: RunConfig | SearchConfig | ScriptConfig, resources: Resources, folder: Path, attempt: int
                      ) -> dict[str, str]:
    """Return the variables that all ranks share."""
    env = {
        "LAUNCH_RUN_DIR": str(folder),
        "LAUNCH_ATTEMPT": str(attempt),
        "OMP_NUM_THREADS": str(resources.threads),
    }
    if not isinstance(config, ScriptConfig):
        env |= {"LAUNCH_EVENTS": "1", "PYTHONUNBUFFERED": "1"}
    if isinstance(config, ScriptConfig):
        env |= config.accelerate_env
    if resources.nodes == 1:
        env["GLOO_SOCKET_IFNAME"] = "lo"  # otherwise gloo looks up the host's name, which may have no address
    if resources.device == "cpu" or not isinstance(config, ScriptConfig):
        env["ACCELERATE_USE_CPU"] = str(resources.device == "cpu").lower()
    if resources.device == "cuda" and isinstance(config, RunConfig) and config.train.deterministic:
        env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # otherwise cuBLAS may sum in a different order each time
    return env
