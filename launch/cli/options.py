"""Options that several commands share, and the functions that read them.

Slow imports are inside the functions that need them, as in main.py.
"""

from __future__ import annotations

import difflib
import json as jsonlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launch.cluster.resources import Wanted
from launch.plan import spec as specs
from launch.plan.script_file import find_module
from trainers.contract.errors import UserError
from trainers.contract.home import expanded
from trainers.contract.text import either

if TYPE_CHECKING:
    from launch.cluster.config import ClusterConfig
    from launch.plan.grid import Seeds
    from launch.plan.job_script import Request

# Options that are short for a key of the spec.
ALIASES = {"data": "data.source", "wandb": "wandb.mode", "strategy": "train.strategy", "from": "init.source"}


@dataclass
class Globals:
    """What applies to the whole command line, whichever command runs. Commands find it as `context.obj`."""

    verbose: bool = False
    script_args: list[str] | None = None  # the words after `--`; None: the command line has no `--`
    module: str | None = None             # the word is the name of a module, as after `-m`


def _set_verbose(context: click.Context, _: click.Parameter, value: bool) -> None:
    settings = context.find_object(Globals)
    assert settings is not None  # `main` passes it to every command
    settings.verbose |= value


def verbose_option() -> click.Option:
    """The option `--verbose`, which may stand before or after the command's name."""
    return click.Option(["--verbose"], is_flag=True, expose_value=False, is_eager=True, callback=_set_verbose,
                        help="Show the traceback of an error.")


class Folder(click.Path):
    """A path whose `~` is expanded: the shell expands none after `--runs=`, and nobody expands it in a variable."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(str(expanded(value)), param, ctx)


def runs_option(command: Callable) -> Callable:
    return click.option("--runs", "root", type=Folder(path_type=Path), envvar="LAUNCH_RUNS", default="runs",
                        metavar="DIR", help="Folder of runs (default: $LAUNCH_RUNS, or ./runs).")(command)


json_option = click.option("--json", is_flag=True, help="Print JSON.")
run_argument = click.argument("word", metavar="RUN")
average_option = click.option("--average", type=click.IntRange(min=2), metavar="K",
                              help="The mean of the trained weights of K checkpoints: this one and those before it.")
raw_option = click.option("--raw", is_flag=True, help="Of a run with `train.ema`: the trained weights, not their average.")
data_option = click.option("--data", metavar="PATH", help="Short for data=PATH. data=sample needs no download.")

WANTED = {
    "gpus": "Number of GPUs over all nodes. Each GPU gets one rank.",
    "procs": "Number of CPU ranks over all nodes, instead of GPUs.",
    "nodes": "Number of nodes (default: the fewest that share the ranks evenly). Without --gpus and --procs: whole nodes.",
    "cpus": "CPU cores of each rank of a grid search (default: all).",
}


def wanted_options(*names: str) -> Callable[[Callable], Callable]:
    """Options that ask for ranks, nodes or cores. The command's function gets their values as one argument, `wanted`.

    Args:
        names: keys of WANTED.
    """
    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def command(*args: Any, **options: Any) -> Any:
            return function(*args, wanted=Wanted(**{name: options.pop(name) for name in names}), **options)

        for name in reversed(names):
            command = click.option(f"--{name}", type=click.IntRange(min=1), metavar="N", help=WANTED[name])(command)
        return command

    return decorate


def slurm_options(command: Callable) -> Callable:
    """The options of commands that may submit one run to SLURM."""
    return queue_options(
        click.option("--follow", is_flag=True, help="On SLURM: wait, and print the log until the run ends.")(command))


seeds_option = click.option("--seeds", metavar="N|S,S,...", help="Run once with each of N seeds (0 to N-1), or with these "
                            "seeds, and report the mean and deviation of each metric.")


def read_seeds(word: str, text: str, overrides: Sequence[str]) -> Seeds:
    """The seeds that `--seeds` asks for.

    Args:
        word: the task or spec file on the command line.
        text: the value of the option.
        overrides: key=value words.

    Raises:
        UserError: the text is not a number or list of seeds, `word` has no key for a seed, or an override sets the seed too.
    """
    from launch.plan import grid

    if is_script(word):
        raise UserError(f"`--seeds` sets a key of a task, and `{word}` is a script",
                        f"""give the script's own words: launch sweep {word} 'args=["--seed","0"],["--seed","1"]'""")
    _check_exists(word)
    keys = specs.seed_keys(word)
    if twice := next((given for given in overrides if given.partition("=")[0] in keys), None):
        raise UserError(f"`{twice}` and `--seeds {text}` both set the seed", "leave out one of the two")
    return grid.read_seeds(text, keys)


def queue_options(command: Callable) -> Callable:
    """The options that say to which cluster a command submits, and with which limits."""
    for option in (click.option("--after", metavar="RUN", help="On SLURM: start after this run has finished."),
                   click.option("--time", metavar="TIME", help="Time limit of the SLURM job: 4h, 12:00:00 or 2-00:00:00."),
                   click.option("--cluster", "cluster_name", metavar="NAME",
                                help="Run on this cluster. `launch clusters` lists the names."),
                   click.option("--slurm", is_flag=True, help="Submit to SLURM: to the cluster $LAUNCH_CLUSTER, "
                                "or else `slurm`. sbatch.KEY=VALUE sets any option of sbatch.")):
        command = option(command)
    return command


def spec_options(command: Callable) -> Callable:
    """The options and key=value arguments that make a spec. `load` reads them."""
    for option in (click.option("--config", type=click.Path(), metavar="FILE",
                                help="A YAML file of values that override the task's values."),
                   click.option("--strategy", metavar="WORD",
                                help="Short for train.strategy=WORD: ddp, fsdp, zero1, zero2 or zero3."),
                   click.option("--accelerate-config", type=click.Path(), metavar="FILE",
                                help="For scripts: a config file of accelerate's. accelerate.KEY=VALUE overrides its keys."),
                   click.option("--wandb", metavar="MODE", help="Short for wandb.mode=MODE: online, offline or off."),
                   click.option("--from", metavar="RUN|PATH", help="Short for init.source=RUN|PATH: start from these weights."),
                   data_option):
        command = option(command)
    return click.argument("overrides", nargs=-1, metavar="[key=value]...")(command)


def cluster_of(slurm: bool, name: str | None) -> ClusterConfig:
    """The cluster that `--slurm` and `--cluster` name.

    Without both: this machine. With `--slurm` only: the cluster in the variable LAUNCH_CLUSTER, or else `slurm`.

    Raises:
        UserError: the cluster does not exist, its file is wrong, or `--slurm` is given and it is not a SLURM cluster.
    """
    from launch.cluster.config import load_cluster

    cluster = load_cluster(name or (os.environ.get("LAUNCH_CLUSTER") or "slurm" if slurm else "local"))
    if slurm and cluster.kind != "slurm":
        raise UserError(f"cluster `{cluster.name}` is not a SLURM cluster", "`launch clusters` lists the known clusters")
    return cluster


def request_of(cluster: ClusterConfig, root: Path, time: str | None, after: str | None, options: dict[str, Any]) -> Request:
    """What a command asks of SLURM, besides resources.

    Args:
        root: the folder of runs.
        time: the value of `--time`.
        after: the run that `--after` names.
        options: options of sbatch, by name.

    Raises:
        UserError: `--time` is not a time, or SLURM cannot wait for the run `after`.
    """
    from launch.cluster.times import seconds
    from launch.plan.job_script import Request

    if time is not None:
        try:
            seconds(time)
        except ValueError as error:
            raise UserError(f"--time is `{time}`, which {error}") from None
    if not after:
        return Request(cluster, time, options)
    from launch.execute.after import jobs_of
    from launch.records.read import find_run

    run = find_run(root, after)
    return Request(cluster, time, options, jobs_of(run), str(run.paths.root.resolve()))


def sbatch_options(overrides: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Split key=value words into (the spec's overrides, the options of sbatch by name)."""
    from trainers.config import yaml12

    options: dict[str, Any] = {}
    for word in overrides:
        key, _, text = word.partition("=")
        if key.startswith("sbatch."):
            value = yaml12.argument(text)
            options[key.removeprefix("sbatch.")] = value if isinstance(value, bool) else text
    return [word for word in overrides if not word.startswith("sbatch.")], options


def root_of(context: click.Context, root: Path, cluster: ClusterConfig) -> Path:
    """The folder of runs, absolute: from the command line or LAUNCH_RUNS, else from the cluster's file, else ./runs."""
    is_default = context.get_parameter_source("root") is click.core.ParameterSource.DEFAULT
    if is_default and cluster.runs:
        root = Path(cluster.runs)
    return root.absolute()


def only_on_slurm(**options: Any) -> None:
    """Refuse options that need SLURM.

    Raises:
        UserError: one of the options has a value.
    """
    for name, value in options.items():
        if value:
            option = f"--{name}" if name in ("nodes", "time", "after", "here", "follow") else f"sbatch.{name}"
            raise UserError(f"`{option}` is for SLURM", "add --slurm, or --cluster NAME")


def load(context: click.Context, task: str, config: str | None, overrides: Sequence[str], cluster: ClusterConfig,
         accelerate_config: str | None = None, **aliases: str | None) -> specs.Spec:
    """The spec of a task, a spec file or a script.

    Args:
        task: the word on the command line: a built-in task's name or a file.
        config: the file of `--config`.
        overrides: key=value words.
        accelerate_config: the file of `--accelerate-config`.
        aliases: the values of options that are short for a key, by their names in ALIASES.

    Raises:
        UserError: the task or file does not exist, or the spec is wrong.
    """
    overrides = [*overrides, *(f"{ALIASES[name]}={text}" for name, text in aliases.items() if text is not None)]
    config = config and str(expanded(config))  # the shell expands no `~` after `--config=`
    module = context.obj.module == task or is_module(task)
    if not module:
        _check_exists(task)
    if not module and not is_script(task):
        refuse_script_args(context, task)
        if accelerate_config is not None:
            raise UserError(f"`--accelerate-config` is for scripts, and `{task}` is not a script", "use train.KEY=VALUE")
        return specs.load_spec(task, overrides, cluster=cluster, environment=os.environ, config_file=config)
    if config is not None:
        raise UserError(f"`--config` is for tasks; `{task}` is a script", "give the keys as key=value")
    return specs.script_spec(task, context.obj.script_args or [], overrides, cluster=cluster, module=module,
                             accelerate_file=accelerate_config and expanded(accelerate_config))


def _check_exists(word: str) -> None:
    if word not in specs.tasks() and not os.path.exists(word):
        raise no_such(word, list(specs.tasks()))


def is_module(word: str) -> bool:
    """Whether a word without `-m` names a module: of a package, and neither a task nor a file."""
    return ("." in word and word not in specs.tasks() and not os.path.exists(word)
            and find_module(word, Path.cwd()) is not None)


def is_script(word: str) -> bool:
    """Whether a word names a script or a module, and not a task or a spec."""
    return is_module(word) or word not in specs.tasks() and not specs.is_spec(word) and os.path.exists(word)


def no_such(word: str, names: Sequence[str]) -> UserError:
    """The error for a word that is not a command, a task or a file, with the most similar of `names` as a hint."""
    if os.sep in word or Path(word).suffix in (".py", ".yaml", ".yml"):
        return UserError(f"there is no file `{word}`", f"looked in `{Path.cwd()}`" if not os.path.isabs(word) else None)
    near = difflib.get_close_matches(word, names, n=2)
    return UserError(f"there is no command, task or file `{word}`",
                     f"did you mean {either(f'`{name}`' for name in near)}?" if near
                     else "`launch --help` lists all commands and tasks")


def refuse_script_args(context: click.Context, word: str) -> None:
    """Raise an error if the command line has a `--` although `word` is not a script.

    Raises:
        UserError: the command line has a `--`.
    """
    if context.obj.script_args is not None:
        raise UserError(f"arguments after `--` are for a script, and `{word}` is not a script",
                        "give the keys of a task as key=value")


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(jsonlib.dumps(value, indent=1, ensure_ascii=False))


class Script(click.Command):
    """The command that runs a script of the user. The words after `--` are the script's arguments."""


def command(function: Callable) -> click.Command:
    """Make a command of a function, with the option `--verbose`."""
    made = click.command()(function)
    made.params.append(verbose_option())
    return made
