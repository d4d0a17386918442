"""A cluster as its YAML file describes it: a file of the user, or one of cluster_configs/."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveInt

from launch.cluster.times import seconds
from trainers.config import yaml12
from trainers.config.schema import Section
from trainers.config.spec import mapping, read_text, validate
from trainers.contract.errors import UserError
from trainers.contract.home import expanded

BUILT_IN = Path(__file__).parents[2] / "cluster_configs"
SLURM_RESTARTS = 3  # default of run.max_restarts on SLURM; a spec or a cluster file overrides it


def _size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*[KMGT]?", text):
        raise ValueError("must be a size as SLURM writes it, such as 64G")
    return text


def _time(text: str) -> str:
    seconds(text)
    return text


def _path(text: str) -> str:
    return str(expanded(os.path.expandvars(text)))


def _variables(values: dict[str, str]) -> dict[str, str]:
    for name, value in values.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or "\0" in value:
            raise ValueError(f"`env` sets `{name}`, but the name of a variable has only letters, digits and `_`, and its value "
                             "no zero byte")
    return values


Size = Annotated[str, AfterValidator(_size)]
Time = Annotated[str, AfterValidator(_time)]
Place = Annotated[str, AfterValidator(_path)]


class ClusterConfig(Section):
    """A place where runs can go. For a key that is null, the cluster's own default applies."""

    name: str = Field(description="default: the name of the file")
    description: str = ""
    kind: Literal["local", "slurm"] = Field("local", description="local: this machine; slurm: a SLURM cluster")
    device: Literal["cuda", "cpu"] = Field(
        "cuda", description="on slurm, what ranks compute on; cpu: on CPUs, even if the job has GPUs")

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = Field(None, description="features that nodes must have")
    time: Time = Field("1-00:00:00", description="time limit of a job, such as 4h, 12:00:00 or 2-00:00:00")
    gpu_type: str | None = Field(None, description="type of GPU, as `sinfo -o %G` names it")
    gpu_request: Literal["gpus-per-node", "gres", "none"] = Field(
        "gpus-per-node", description="the sbatch option that asks for GPUs here; none: no option, because jobs get whole nodes")
    gpus_per_node: PositiveInt | None = Field(None, description="GPUs of a node; a run on more GPUs gets more nodes")
    gpu_memory: Size | None = Field(None, description="memory of a GPU, such as 80G; `launch plan` checks whether a run fits")
    cpus_per_node: PositiveInt | None = Field(
        None, description="CPU cores of a node; a run with more CPU ranks than fit gets more nodes")
    cpus_per_gpu: PositiveInt | None = Field(None, description="CPU cores for each rank with a GPU")
    cpus_per_rank: PositiveInt = Field(1, description="CPU cores for each rank without a GPU")
    mem_per_gpu: Size | None = Field(None, description="host memory for each GPU, such as 64G")
    mem_per_cpu: Size | None = Field(None, description="host memory for each CPU core, such as 4G")
    max_nodes: PositiveInt | None = Field(None, description="a run that needs more nodes is refused")
    sbatch: dict[str, str | int | bool] = Field(
        default_factory=dict, description="any other option of sbatch, by its long name; on the command line: `sbatch.KEY=VALUE`")
    srun: list[str] = Field(default_factory=list, description="options of srun, such as those of Pyxis")
    setup: list[str] = Field(default_factory=list, description="shell lines that a job runs first, such as `module load ...`")
    prefix: list[str] = Field(
        default_factory=list, description="words in front of the Python command, such as apptainer exec --nv IMAGE")
    python: str | None = Field(None, description="the Python to use on the nodes; null: the Python that submits the job")
    requeue: bool = Field(
        True, description="whether this cluster lets jobs be requeued; if not, a chain of dependent jobs is submitted")
    chain: PositiveInt = Field(4, description="number of jobs in such a chain")
    interface: str | None = Field(None, description="the network interface between nodes, such as ib0; null: any that works")
    internet: bool = Field(True, description="whether nodes can download; if not, data is downloaded on the host that submits")
    runs: Place | None = Field(
        None, description="the folder of all runs, on storage that all nodes share; ~ and $USER are expanded")
    data: Place | None = Field(None, description="LAUNCH_DATA, the folder for downloaded data")

    defaults: dict[str, Any] = Field(default_factory=dict, description="keys of a spec; they override the task's file")
    env: Annotated[dict[str, str], AfterValidator(_variables)] = Field(
        default_factory=dict, description="environment variables for ranks")

    @property
    def layers(self) -> list[dict[str, Any]]:
        """The cluster's layers of a spec; a later layer overrides an earlier one."""
        return [*([{"run": {"max_restarts": SLURM_RESTARTS}}] if self.kind == "slurm" else []), self.defaults]


def size_bytes(text: str) -> int:
    """Return the bytes of a size as SLURM writes it, such as 64G; a number without a unit is in MiB."""
    number, unit = (text[:-1], text[-1]) if text[-1] in "KMGT" else (text, "M")
    return int(number) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[unit]


def folders(environment: Mapping[str, str] = os.environ) -> tuple[Path, Path]:
    """Return the folders of cluster files: the user's, which takes precedence, and the built-in one."""
    # Where the home folder is not known, `~` stays: there is no such folder, and its name shows where it would be.
    home = environment.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(os.path.expanduser(home), "launch", "clusters"), BUILT_IN


def clusters() -> dict[str, Path]:
    """Return the file of each cluster, by the cluster's name."""
    files = {path.stem: path for folder in reversed(folders()) for path in folder.glob("*.yaml")}
    return dict(sorted(files.items()))


def load_cluster(name: str) -> ClusterConfig:
    """Read the file of the cluster with this name.

    Raises:
        UserError: no cluster has this name, or its file is wrong.
    """
    known = clusters()
    if name not in known:
        raise UserError(f"there is no cluster `{name}`",
                        f"use one of {', '.join(known)}, or describe your cluster in {folders()[0]}/NAME.yaml")
    return read_cluster(known[name])


def read_cluster(path: Path) -> ClusterConfig:
    """Read a cluster file.

    Raises:
        UserError: the file cannot be read, or is wrong.
    """
    document = yaml12.read(read_text(path), path.name)
    values = {"name": path.stem, **mapping(document.value, path.name)}
    return validate(ClusterConfig, values,
                    lambda key: f"{path}:{document.lines[key]}" if key in document.lines else None)
