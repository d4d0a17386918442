"""A cluster as its YAML file describes it: the user's own, or one of cluster_configs/."""

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

BUILT_IN = Path(__file__).parents[2] / "cluster_configs"
SLURM_RESTARTS = 3  # run.max_restarts on SLURM, unless a spec or the cluster says otherwise


def _size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*[KMGT]?", text):
        raise ValueError("must be a size as SLURM writes it, such as 64G")
    return text


def _time(text: str) -> str:
    seconds(text)
    return text


def _path(text: str) -> str:
    return os.path.expanduser(os.path.expandvars(text))


Size = Annotated[str, AfterValidator(_size)]
Time = Annotated[str, AfterValidator(_time)]
Place = Annotated[str, AfterValidator(_path)]


class ClusterConfig(Section):
    """Where runs go. What is null is left to the cluster's own defaults."""

    name: str = Field(description="by default the file's")
    description: str = ""
    kind: Literal["local", "slurm"] = Field("local", description="this machine, or a SLURM cluster")
    device: Literal["cuda", "cpu"] = Field(
        "cuda", description="of slurm: what ranks compute on; cpu: on CPUs, even where GPUs are allocated")

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = Field(None, description="features that nodes must have")
    time: Time = Field("1-00:00:00", description="time limit of a job: 4h, 12:00:00, 2-00:00:00")
    gpu_type: str | None = Field(None, description="as `sinfo -o %G` names it")
    gpu_request: Literal["gpus-per-node", "gres", "none"] = Field(
        "gpus-per-node", description="the sbatch option by which GPUs are asked for here; none: nodes come whole")
    gpus_per_node: PositiveInt | None = Field(None, description="more GPUs become more nodes")
    gpu_memory: Size | None = Field(None, description="a GPU's own, such as 80G: what `launch plan` fits a run into")
    cpus_per_node: PositiveInt | None = Field(None, description="more CPU ranks become more nodes")
    cpus_per_gpu: PositiveInt | None = Field(None, description="CPU cores of a rank with a GPU")
    cpus_per_rank: PositiveInt = Field(1, description="CPU cores of a rank without one")
    mem_per_gpu: Size | None = Field(None, description="host memory a GPU, such as 64G")
    mem_per_cpu: Size | None = Field(None, description="host memory a core, such as 4G")
    max_nodes: PositiveInt | None = Field(None, description="more are refused")
    sbatch: dict[str, str | int | bool] = Field(
        default_factory=dict, description="any other option of sbatch, by its long name; `sbatch.KEY=VALUE` on the command line")
    srun: list[str] = Field(default_factory=list, description="options of srun, such as those of Pyxis")
    setup: list[str] = Field(default_factory=list, description="shell lines before anything else of a job: module load ...")
    prefix: list[str] = Field(default_factory=list, description="words before Python's, such as apptainer exec --nv IMAGE")
    python: str | None = Field(None, description="the Python of the nodes; null: the one that submits")
    requeue: bool = Field(True, description="whether jobs may be requeued here; else a chain of dependent jobs is submitted")
    chain: PositiveInt = Field(4, description="jobs in such a chain")
    interface: str | None = Field(None, description="the network interface between nodes, such as ib0; null: whichever works")
    internet: bool = Field(True, description="whether nodes can download; if not, data is fetched where one submits")
    runs: Place | None = Field(None, description="where runs lie, on storage that all nodes share; ~ and $USER are expanded")
    data: Place | None = Field(None, description="LAUNCH_DATA: where downloaded data lies")

    defaults: dict[str, Any] = Field(default_factory=dict, description="keys of a spec, over those of a task's file")
    env: dict[str, str] = Field(default_factory=dict, description="variables that ranks get")

    @property
    def layers(self) -> list[dict[str, Any]]:
        """What a spec takes from the cluster, later wins."""
        return [*([{"run": {"max_restarts": SLURM_RESTARTS}}] if self.kind == "slurm" else []), self.defaults]


def size_bytes(text: str) -> int:
    """Of a size as SLURM writes it: 64G; without a unit MiB."""
    number, unit = (text[:-1], text[-1]) if text[-1] in "KMGT" else (text, "M")
    return int(number) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[unit]


def folders(environment: Mapping[str, str] = os.environ) -> tuple[Path, Path]:
    """Where cluster files lie: the user's folder, which comes first, and ours."""
    home = environment.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "launch" / "clusters", BUILT_IN


def clusters() -> dict[str, Path]:
    """The file of each cluster, by name."""
    found = {path.stem: path for folder in reversed(folders()) for path in folder.glob("*.yaml")}
    return dict(sorted(found.items()))


def load_cluster(name: str) -> ClusterConfig:
    """Raises: UserError if there is no such cluster, or its file is wrong."""
    known = clusters()
    if name not in known:
        raise UserError(f"there is no cluster `{name}`",
                        f"there is {', '.join(known)}; your own go to {folders()[0]}/NAME.yaml")
    return read_cluster(known[name])


def read_cluster(path: Path) -> ClusterConfig:
    """Raises: UserError if the file is wrong."""
    document = yaml12.read(read_text(path), path.name)
    values = {"name": path.stem, **mapping(document.value, path.name)}
    return validate(ClusterConfig, values,
                    lambda key: f"{path}:{document.lines[key]}" if key in document.lines else None)
