"""The commands that start ranks: a task, a spec or a script; `resume`, `eval`, `predict` and `sweep`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launch.cli.options import (
    ALIASES,
    Folder,
    Script,
    average_option,
    cluster_of,
    command,
    data_option,
    is_script,
    json_option,
    load,
    only_on_slurm,
    queue_options,
    raw_option,
    read_seeds,
    request_of,
    root_of,
    run_argument,
    runs_option,
    sbatch_options,
    seeds_option,
    slurm_options,
    spec_options,
    verbose_option,
    wanted_options,
)
from launch.cluster.resources import Wanted
from launch.plan import spec as specs
from launch.plan.script_file import check_sweep, other_environment
from trainers.contract.errors import UserError

if TYPE_CHECKING:
    from launch.cluster.config import ClusterConfig
    from launch.records.run import Run


def task_command(word: str, about: str, kind: type[click.Command] = click.Command) -> click.Command:
    """The command that runs a task, a spec file or a script.

    Args:
        word: the task's name or the file, as on the command line.
        about: the command's help text.
        kind: `Script` if the word is a script.
    """
    @click.command(word, cls=kind, help=about)
    @spec_options
    @wanted_options("gpus", "procs", "nodes", "cpus")
    @slurm_options
    @click.option("--here", is_flag=True, help="Run in the current SLURM allocation (salloc), without a new job.")
    @click.option("--debug", is_flag=True, help="Run one rank in this process, so that breakpoint() works.")
    @seeds_option
    @click.option("--dry-run", is_flag=True, help="Print what would run, and run nothing.")
    @json_option
    @runs_option
    @click.pass_context
    def run(context: click.Context, root: Path, wanted: Wanted, debug: bool, dry_run: bool, json: bool, slurm: bool,
            cluster_name: str | None, time: str | None, after: str | None, here: bool, follow: bool, seeds: str | None,
            overrides: Sequence[str], **spec_args: Any) -> int:
        cluster = cluster_of(slurm, cluster_name)
        overrides, options = sbatch_options(overrides)
        if seeds is not None:
            if alone := next((name for name, given in (("debug", debug), ("here", here), ("follow", follow)) if given), None):
                raise UserError(f"`--{alone}` is for a single run, and `--seeds` starts several", "leave out one of the two")
            return _start_sweep(
                context, root, cluster, words=[], seeds=read_seeds(word, seeds, overrides), wanted=wanted, time=time, after=after,
                load=lambda words: load(context, word, cluster=cluster, overrides=[*overrides, *words], **spec_args),
                options=options, parallel=None, dry_run=dry_run, json=json)
        if debug and kind is not Script:
            overrides = specs.for_debugging(word, overrides)
        spec = load(context, word, cluster=cluster, overrides=overrides, **spec_args)
        if kind is Script:
            _warn_of_environment(cluster)
        if cluster.kind == "slurm":
            if debug:
                raise UserError("--debug runs one rank in this process, not on SLURM", "leave out --slurm or --debug")
            from launch.execute import on_slurm

            if here and (follow or time or after or options):
                raise UserError("--here uses the allocation as it is", "leave out --follow, --time, --after and sbatch.KEY")
            if here and json and not dry_run:
                raise UserError("--here prints the output of the ranks as plain lines", "leave out --json")
            root = root_of(context, root, cluster)
            return on_slurm.start(spec=spec, root=root, request=request_of(cluster, root, time, after, options), wanted=wanted,
                                  dry_run=dry_run, json=json, show_log=show_log if follow else None, here=here)
        only_on_slurm(nodes=wanted.nodes, time=time, after=after, here=here, follow=follow, **options)
        from launch.execute.local import start

        return start(spec=spec, runs=root, wanted=wanted, debug=debug, dry_run=dry_run, json=json, cluster=cluster)

    run.params.append(verbose_option())
    return run


@command
@run_argument
@click.argument("overrides", nargs=-1, metavar="[data=PATH] [run.KEY=VALUE] [sbatch.KEY=VALUE]...")
@click.option("--strategy", metavar="WORD", help="Use this strategy from now on: ddp, fsdp, zero1, zero2 or zero3.")
@wanted_options("gpus", "procs", "nodes", "cpus")
@slurm_options
@runs_option
@json_option
@click.option("--take-over", is_flag=True, help="Resume even if the record says that the run is running on another host.")
def resume(word: str, root: Path, wanted: Wanted, json: bool, take_over: bool, slurm: bool, cluster_name: str | None,
           time: str | None, after: str | None, follow: bool, overrides: Sequence[str], strategy: str | None) -> int:
    """Continue a run from its last checkpoint.

    By default the run continues where it last ran: on this machine, or on the same cluster with the same options. data=PATH
    tells where its data lies, if the data has moved.
    """
    from launch.records.read import find_run

    run = find_run(root, word)
    changes, options = sbatch_options([*overrides, *([f"{ALIASES['strategy']}={strategy}"] if strategy is not None else [])])
    last_job = run.record.get("job") or {}
    if slurm or cluster_name or last_job.get("kind") == "slurm":
        cluster = cluster_of(slurm, cluster_name or (last_job.get("cluster") if not slurm else None))
        if cluster.kind == "slurm":
            from launch.execute import on_slurm

            asked = slurm or cluster_name or time or after or options
            return on_slurm.resume(run, request=request_of(cluster, root, time, after, options) if asked else None,
                                   wanted=wanted, changes=changes, json=json, show_log=show_log if follow else None)
    only_on_slurm(nodes=wanted.nodes, time=time, after=after, follow=follow, **options)
    from launch.execute import local

    return local.resume(run, wanted=wanted, changes=changes, json=json, take_over=take_over)


@command
@run_argument
@click.argument("overrides", nargs=-1, metavar="[key=value]...")
@click.option("--step", "which", metavar="N|best", help="Step of the checkpoint, or `best` (default: the newest).")
@average_option
@raw_option
@data_option
@wanted_options("gpus", "procs", "nodes")
@slurm_options
@runs_option
@json_option
def eval(word: str, root: Path, which: str | None, raw: bool, average: int | None, overrides: Sequence[str],
         data: str | None, wanted: Wanted, json: bool, slurm: bool, cluster_name: str | None, time: str | None,
         after: str | None, follow: bool) -> int:
    """Evaluate a checkpoint of a run, without training."""
    from launch.execute import evaluate
    from launch.records.read import find_run

    run = find_run(root, word)
    words, options = sbatch_options([*overrides, *([f"{ALIASES['data']}={data}"] if data is not None else [])])
    cluster = cluster_of(slurm, cluster_name)
    if cluster.kind == "slurm":
        return evaluate.submit(run, which=which, init={"raw": raw, "average": average}, overrides=words, wanted=wanted,
                               request=request_of(cluster, root, time, after, options), json=json,
                               show_log=show_log if follow else None)
    only_on_slurm(nodes=wanted.nodes, time=time, after=after, follow=follow, **options)
    return evaluate.evaluate(run, which=which, init={"raw": raw, "average": average}, overrides=words, wanted=wanted, json=json)


@command
@run_argument
@click.argument("words", nargs=-1, metavar="[FILE]... [key=value]...")
@click.option("--step", "which", metavar="N|best", help="Step of the checkpoint, or `best` (default: the newest).")
@average_option
@raw_option
@click.option("--set", "which_set", type=click.Choice(["eval", "test"]),
              help="Predict the run's own evaluation set or test set, in place of lines.")
@click.option("-o", "output", type=Folder(path_type=Path, dir_okay=False), metavar="FILE",
              help="Write the rows to this file (default: standard output). The file appears whole, or not at all.")
@click.option("--format", type=click.Choice(["text", "json"]), default="text",
              help="text: a row that is text is a line (default). json: every row is JSON.")
@data_option
@wanted_options("gpus", "procs", "nodes")
@slurm_options
@runs_option
def predict(word: str, words: Sequence[str], root: Path, which: str | None, raw: bool, average: int | None,
            which_set: Any, output: Path | None, format: Any, data: str | None, wanted: Wanted, slurm: bool,
            cluster_name: str | None, time: str | None, after: str | None, follow: bool) -> int:
    """Predict a row for each line of text, from a checkpoint.

    The lines come from the files, or from standard input. The rows go to standard output in the order of the lines, everything
    else to standard error. On SLURM, the lines come from one file, and the rows go to the file of -o.
    """
    from launch.execute import predict
    from launch.records.read import find_run

    run = find_run(root, word)
    files = [word for word in words if "=" not in word or os.path.exists(word)]
    overrides = [*(word for word in words if word not in files), *([f"{ALIASES['data']}={data}"] if data is not None else [])]
    overrides, options = sbatch_options(overrides)
    question = predict.Question(files, which_set, format, output)
    init = {"raw": raw, "average": average}
    cluster = cluster_of(slurm, cluster_name)
    if cluster.kind == "slurm":
        return predict.submit(run, question, which=which, init=init, overrides=overrides, wanted=wanted,
                              request=request_of(cluster, root, time, after, options), show_log=show_log if follow else None)
    only_on_slurm(nodes=wanted.nodes, time=time, after=after, follow=follow, **options)
    return predict.predict(run, question, which=which, init=init, overrides=overrides, wanted=wanted)


@command
@click.argument("task", required=False)
@spec_options
@wanted_options("gpus", "procs", "nodes", "cpus")
@queue_options
@click.option("--max-parallel", "parallel", type=click.IntRange(min=1), metavar="N", help="On SLURM: run at most N runs at once.")
@seeds_option
@click.option("--resume", "again", metavar="SWEEP", help="Continue the runs of this sweep that have not finished.")
@click.option("--dry-run", is_flag=True, help="Print what would run, and run nothing.")
@json_option
@runs_option
@click.pass_context
def sweep(context: click.Context, task: str | None, root: Path, wanted: Wanted, slurm: bool, cluster_name: str | None,
          time: str | None, after: str | None, parallel: int | None, seeds: str | None, again: str | None, dry_run: bool,
          json: bool, overrides: Sequence[str], config: str | None, accelerate_config: str | None, **aliases: str | None) -> int:
    """Run a task or a script once for each point of a grid.

    For example, key=a,b,c other=x,y makes six runs. On SLURM the runs are one job array. On this machine they run one
    after another.

    If a value contains a comma, put it in double quotes, and the whole word in single quotes for the shell: 'name="a,b"'.
    """
    from launch.execute import sweep as sweeps

    words, options = sbatch_options([*([task] if again and task else []), *overrides])
    words += [f"{ALIASES[name]}={text}" for name, text in aliases.items() if text is not None]
    if again:
        from launch.records.read import read_sweep

        if words or config or accelerate_config or seeds or dry_run or context.obj.script_args is not None:
            raise UserError("--resume continues a sweep as it was started, and takes no task and no keys",
                            f"launch sweep --resume {again}")
        last_job = read_sweep(root, again)["job"]
        on_cluster = slurm or cluster_name or last_job["kind"] == "slurm"
        last_cluster = cluster_of(slurm, cluster_name or last_job.get("cluster")) if on_cluster else None
        if last_cluster is None or last_cluster.kind != "slurm":
            only_on_slurm(nodes=wanted.nodes, time=time, after=after, **options)
        changes = slurm or cluster_name or time or after or options
        request = request_of(last_cluster, root, time, after, options) if last_cluster and changes else None
        return sweeps.resume(root, again, request=request, wanted=wanted, parallel=parallel, json=json)
    if task is None:
        raise UserError("`launch sweep` needs a task, a spec or a script", "launch sweep TASK key=a,b, or --resume SWEEP")
    if is_script(task):
        check_sweep(task, words, context.obj.script_args or [])
    cluster = cluster_of(slurm, cluster_name)
    if is_script(task):
        _warn_of_environment(cluster)
    return _start_sweep(context, root, cluster, words=words, seeds=read_seeds(task, seeds, words) if seeds else None,
                        wanted=wanted, time=time, after=after,
                        load=lambda words: load(context, task, config, words, cluster, accelerate_config),
                        options=options, parallel=parallel, dry_run=dry_run, json=json)


def _start_sweep(context: click.Context, root: Path, cluster: ClusterConfig, *, time: str | None, after: str | None,
                 options: dict[str, Any], wanted: Wanted, **rest: Any) -> int:
    """Start a sweep on this machine or on a cluster. `rest`: further arguments of `launch.execute.sweep.start`."""
    from launch.execute import sweep as sweeps

    if cluster.kind == "slurm":
        root = root_of(context, root, cluster)
    else:
        only_on_slurm(nodes=wanted.nodes, time=time, after=after, **options)
    return sweeps.start(root=root.absolute(), request=request_of(cluster, root, time, after, options), wanted=wanted, **rest)


def _warn_of_environment(cluster: ClusterConfig) -> None:
    """Print a warning if a script will run in another environment than the active one."""
    if cluster.python is None and (warning := other_environment(os.environ)):
        print(f"warning: {warning}", file=sys.stderr)


def show_log(run: Run) -> None:
    """Print the log of a run until the run has ended (`--follow`). Ctrl-C stops the printing, not the run."""
    from launch.report import logs

    logs.follow(run, follow=True, write=lambda text: print(text, end="", flush=True))


COMMANDS = (resume, eval, predict, sweep)
