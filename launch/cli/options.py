"""Options that several commands have, declared once, and how they are read.

What is heavy to import is imported by the readers, as in cli.py.
"""

from __future__ import annotations

import difflib
import json as jsonlib
import os
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

from launch.cluster.resources import Wanted
from launch.plan import spec as specs
from trainers.contract.errors import UserError
from trainers.contract.text import either

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


WANTED = {
    "gpus": "GPUs, one rank on each.",
    "procs": "CPU ranks, instead of GPUs.",
    "nodes": "Nodes; alone, whole ones. By default as few as hold the ranks evenly.",
    "cpus": "Cores of a rank of a search (all there are).",
}


def wanted_options(*names: str) -> Callable[[Callable], Callable]:
    """Options by which a command asks for ranks, nodes or cores; its function gets them as one value, `wanted`."""
    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def command(*args: Any, **given: Any) -> Any:
            return function(*args, wanted=Wanted(**{name: given.pop(name) for name in names}), **given)

        for name in reversed(names):
            command = click.option(f"--{name}", type=click.IntRange(min=1), metavar="N", help=WANTED[name])(command)
        return command

    return decorate


def slurm_options(command: Callable) -> Callable:
    """Where and how on a cluster."""
    for option in (click.option("--follow", is_flag=True, help="Stay, and show the log."),
                   click.option("--here", is_flag=True, help="In the allocation one stands in (salloc).")):
        command = option(command)
    return queue_options(command)


def queue_options(command: Callable) -> Callable:
    for option in (click.option("--after", metavar="RUN", help="Begin once that run has finished."),
                   click.option("--time", metavar="TIME", help="Time limit of the job: 4h, 12:00:00, 2-00:00:00."),
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
    from launch.cluster.config import load_cluster

    cluster = load_cluster(name or (os.environ.get("LAUNCH_CLUSTER") or "slurm" if slurm else "local"))
    if slurm and cluster.kind != "slurm":
        raise UserError(f"cluster `{cluster.name}` is no SLURM cluster", "`launch clusters` lists those there are")
    return cluster


def request_of(cluster: Any, root: Path, time: str | None, after: str | None, options: dict[str, Any]) -> Any:
    """What is asked of SLURM. Raises: UserError."""
    from launch.cluster.times import seconds
    from launch.plan.job_script import Request

    if time is not None:
        try:
            seconds(time)
        except ValueError as error:
            raise UserError(f"--time is `{time}`, which {error}") from None
    waits_for = ()
    if after:
        from launch.execute.on_slurm import jobs_of
        from launch.records.read import find_run

        waits_for = jobs_of(find_run(root, after))
    return Request(cluster, time, options, waits_for)


def sbatch_options(overrides: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """(the spec's overrides, sbatch's options)"""
    from trainers.config import yaml12

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



def load(context: click.Context, task: str, config: str | None, overrides: Sequence[str], cluster: Any,
         **given: str | None) -> Any:
    """The spec. Raises: UserError."""
    overrides = [*overrides, *(f"{ALIASES[name]}={text}" for name, text in given.items() if text is not None)]
    if task not in specs.tasks() and not os.path.exists(task):
        raise no_such(task, list(specs.tasks()))
    if task in specs.tasks() or specs.is_spec(task):
        refuse_script_args(context, task)
        return specs.load_spec(task, overrides, cluster=cluster, environment=os.environ, config_file=config)
    if config is not None:
        raise UserError(f"`--config` is for tasks; `{task}` is a script", "give its keys as key=value")
    return specs.script_spec(task, context.obj.script_args or [], overrides, cluster=cluster)


def no_such(word: str, names: Sequence[str]) -> UserError:
    if os.sep in word or Path(word).suffix in (".py", ".yaml", ".yml"):
        return UserError(f"there is no file `{word}`", f"looked in `{Path.cwd()}`" if not os.path.isabs(word) else None)
    near = difflib.get_close_matches(word, names, n=2)
    return UserError(f"there is no command, task or file `{word}`",
                     f"did you mean {either(f'`{name}`' for name in near)}?" if near
                     else "`launch --help` lists commands and tasks")


def refuse_script_args(context: click.Context, word: str) -> None:
    if context.obj.script_args is not None:
        raise UserError(f"what follows `--` is for a script, and `{word}` is none",
                        "write the keys of a task as key=value")


def print_json(value: Any) -> None:
    print(jsonlib.dumps(value, indent=1, ensure_ascii=False))


class Script(click.Command):
    """The command that a script's name is: what follows `--` is for it."""


def command(function: Callable) -> click.Command:
    made = click.command()(function)
    made.params.append(verbose_option())
    return made
