"""Options that several commands have, declared once, and how they are read.

What is heavy to import is imported by the readers, as in cli.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

from trainers.errors import UserError

ALIASES = {"data": "data.source", "wandb": "wandb.mode", "strategy": "train.strategy", "from": "init.source"}


def _set_verbose(context: click.Context, _: click.Parameter, value: bool) -> None:
    context.find_object(SimpleNamespace).verbose |= value


def verbose_option() -> click.Option:
    return click.Option(["--verbose"], is_flag=True, expose_value=False, is_eager=True, callback=_set_verbose,
                        help="Show the traceback of an error.")


def runs_option(command: Callable) -> Callable:
    return click.option("--runs", "root", type=click.Path(path_type=Path), envvar="LAUNCH_RUNS", default="runs",
                        metavar="DIR", help="Where runs lie (LAUNCH_RUNS; ./runs).")(command)


json_option = click.option("--json", is_flag=True, help="Print JSON.")
run_argument = click.argument("word", metavar="RUN")


def ranks_options(command: Callable) -> Callable:
    gpus = click.option("--gpus", type=click.IntRange(min=1), metavar="N", help="GPUs, one rank on each.")
    procs = click.option("--procs", type=click.IntRange(min=1), metavar="N", help="CPU ranks, instead of GPUs.")
    return gpus(procs(command))


def cpus_option(command: Callable) -> Callable:
    return click.option("--cpus", type=click.IntRange(min=1), metavar="N",
                        help="Cores of a rank of a search (all there are).")(command)


def slurm_options(command: Callable) -> Callable:
    """Where and how on a cluster."""
    for option in (click.option("--follow", is_flag=True, help="Stay, and show the log."),
                   click.option("--here", is_flag=True, help="In the allocation one stands in (salloc).")):
        command = option(command)
    return queue_options(command)


def queue_options(command: Callable) -> Callable:
    for option in (click.option("--after", metavar="RUN", help="Begin once that run has finished."),
                   click.option("--time", metavar="TIME", help="Time limit of the job: 4h, 12:00:00, 2-00:00:00."),
                   click.option("--nodes", type=click.IntRange(min=1), metavar="N",
                                help="Nodes; alone, whole ones. By default as few as hold the ranks evenly."),
                   click.option("--cluster", metavar="NAME", help="The cluster (LAUNCH_CLUSTER; slurm): see `launch clusters`."),
                   click.option("--slurm", is_flag=True, help="Submit to SLURM. sbatch.KEY=VALUE sets any option of sbatch.")):
        command = option(command)
    return command


def spec_options(command: Callable) -> Callable:
    """The spec's parts that are given by options; `load` in cli.py reads them."""
    for option in (click.option("--config", type=click.Path(), metavar="FILE", help="A spec over the task's own."),
                   click.option("--strategy", metavar="WORD", help="Short for train.strategy=WORD."),
                   click.option("--wandb", metavar="MODE", help="Short for wandb.mode=MODE: online, offline, off."),
                   click.option("--from", metavar="RUN|PATH", help="Short for init.source=RUN|PATH: start from these weights."),
                   click.option("--data", metavar="PATH", help="Short for data=PATH, or data=sample.")):
        command = option(command)
    return click.argument("overrides", nargs=-1, metavar="[key=value]...")(command)


def cluster_of(slurm: bool, name: str | None) -> Any:
    """Raises: UserError."""
    from launch.cluster import load_cluster

    cluster = load_cluster(name or (os.environ.get("LAUNCH_CLUSTER") or "slurm" if slurm else "local"))
    if slurm and cluster.kind != "slurm":
        raise UserError(f"cluster `{cluster.name}` is no SLURM cluster", "`launch clusters` lists those there are")
    return cluster


def request_of(cluster: Any, root: Path, time: str | None, after: str | None, options: dict[str, Any]) -> Any:
    """What is asked of SLURM. Raises: UserError."""
    from launch.batch import Request
    from launch.cluster import seconds

    if time is not None:
        try:
            seconds(time)
        except ValueError as error:
            raise UserError(f"--time is `{time}`, which {error}") from None
    waits_for = ()
    if after:
        from launch.on_slurm import jobs_of
        from launch.runs import find_run

        waits_for = jobs_of(find_run(root, after))
    return Request(cluster, time, options, waits_for)


def sbatch_options(overrides: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """(the spec's overrides, sbatch's options)"""
    from trainers import yaml12

    options = {}
    for word in overrides:
        key, _, text = word.partition("=")
        if key.startswith("sbatch."):
            value = yaml12.argument(text)
            options[key.removeprefix("sbatch.")] = value if isinstance(value, bool) else text
    return [word for word in overrides if not word.startswith("sbatch.")], options


def root_of(context: click.Context, root: Path, cluster: Any) -> Path:
    """Where runs lie: what was given, else what the cluster's file says."""
    by_default = context.get_parameter_source("root") is click.core.ParameterSource.DEFAULT
    if by_default and cluster.runs:
        root = Path(cluster.runs)
    return root.absolute()


def only_on_slurm(**given: Any) -> None:
    for name, value in given.items():
        if value:
            said = f"--{name}" if name in ("nodes", "time", "after", "here", "follow") else f"sbatch.{name}"
            raise UserError(f"`{said}` is for SLURM", "add --slurm, or --cluster NAME")


def one_kind(gpus: int | None, procs: int | None) -> None:
    if gpus is not None and procs is not None:
        raise UserError("both `--gpus` and `--procs` are given", "GPU ranks or CPU ranks: keep one")
