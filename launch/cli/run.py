"""Commands that run something: a task, a spec or a script; resume, eval, sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launch.cli.options import (
    ALIASES,
    Script,
    cluster_of,
    command,
    json_option,
    load,
    only_on_slurm,
    queue_options,
    request_of,
    root_of,
    run_argument,
    runs_option,
    sbatch_options,
    slurm_options,
    spec_options,
    verbose_option,
    wanted_options,
)
from launch.cluster.resources import Wanted
from launch.plan import spec as specs
from trainers.contract.errors import UserError

if TYPE_CHECKING:
    from launch.records.run import Run


def task_command(word: str, about: str, kind: type[click.Command] = click.Command) -> click.Command:
    @click.command(word, cls=kind, help=about)
    @spec_options
    @wanted_options("gpus", "procs", "nodes", "cpus")
    @slurm_options
    @click.option("--debug", is_flag=True, help="One rank, in this process: breakpoint() works.")
    @click.option("--dry-run", is_flag=True, help="Print what would run, and do nothing.")
    @json_option
    @runs_option
    @click.pass_context
    def run(context: click.Context, root: Path, wanted: Wanted, debug: bool, dry_run: bool, json: bool, slurm: bool,
            cluster: str | None, time: str | None, after: str | None, here: bool, follow: bool, overrides: Sequence[str],
            **given: Any) -> int:
        where = cluster_of(slurm, cluster)
        overrides, options = sbatch_options(overrides)
        if debug and kind is not Script:
            overrides = specs.for_debugging(word, overrides)
        spec = load(context, word, cluster=where, overrides=overrides, **given)
        if where.kind == "slurm":
            if debug:
                raise UserError("--debug runs one rank in this process, not on SLURM", "leave out --slurm or --debug")
            from launch.execute import on_slurm

            if here and (follow or time or after or options):
                raise UserError("--here takes the allocation as it is", "leave out --follow, --time, --after and sbatch.KEY")
            if here and json and not dry_run:
                raise UserError("--here shows what the ranks say as plain lines", "leave out --json")
            root = root_of(context, root, where)
            return on_slurm.start(spec=spec, root=root, request=request_of(where, root, time, after, options), wanted=wanted,
                                  dry_run=dry_run, json=json, show_log=show_log if follow else None, here=here)
        only_on_slurm(nodes=wanted.nodes, time=time, after=after, here=here, follow=follow, **options)
        from launch.execute.local import start

        return start(spec=spec, runs=root, wanted=wanted, debug=debug, dry_run=dry_run, json=json, cluster=where)

    run.params.append(verbose_option())
    return run


@command
@run_argument
@click.argument("overrides", nargs=-1, metavar="[sbatch.KEY=VALUE]...")
@click.option("--strategy", metavar="WORD", help="Spread its models otherwise from now on: ddp, zero1, zero2, zero3, fsdp.")
@wanted_options("gpus", "procs", "nodes", "cpus")
@slurm_options
@runs_option
@json_option
@click.option("--take-over", is_flag=True, help="Though its record says that it runs on another host.")
def resume(word: str, root: Path, wanted: Wanted, json: bool, take_over: bool, slurm: bool, cluster: str | None,
           time: str | None, after: str | None, here: bool, follow: bool, overrides: Sequence[str], strategy: str | None) -> int:
    """Continue a run from its last checkpoint, where it ran last unless told."""
    from launch.records.read import find_run

    run = find_run(root, word)
    spread, options = sbatch_options([*overrides, *([f"{ALIASES['strategy']}={strategy}"] if strategy is not None else [])])
    last = run.record.get("job") or {}
    if slurm or cluster or last.get("kind") == "slurm":
        where = cluster_of(slurm, cluster or (last.get("cluster") if not slurm else None))
        if where.kind == "slurm":
            from launch.execute import on_slurm

            if here:
                raise UserError("a run is resumed by a job of its own", "leave out --here")
            asked = slurm or cluster or time or after or options
            return on_slurm.resume(run, request=request_of(where, root, time, after, options) if asked else None,
                                   wanted=wanted, spread=spread, json=json, show_log=show_log if follow else None)
    only_on_slurm(nodes=wanted.nodes, time=time, after=after, here=here, follow=follow, **options)
    from launch.execute import local

    return local.resume(run, wanted=wanted, spread=spread, json=json, take_over=take_over)


@command
@run_argument
@click.argument("overrides", nargs=-1, metavar="[key=value]...")
@click.option("--step", "which", metavar="N|best", help="Of this checkpoint; by default of the `newest`.")
@click.option("--data", metavar="PATH", help="Short for data=PATH, or data=sample.")
@wanted_options("gpus", "procs", "nodes")
@slurm_options
@runs_option
@json_option
def eval(word: str, root: Path, which: str | None, overrides: Sequence[str], data: str | None, wanted: Wanted, json: bool,
         slurm: bool, cluster: str | None, time: str | None, after: str | None, here: bool, follow: bool) -> int:
    """Evaluate a checkpoint of a run, without training."""
    from launch.execute import evaluate
    from launch.records.read import find_run

    run = find_run(root, word)
    words, options = sbatch_options([*overrides, *([f"{ALIASES['data']}={data}"] if data is not None else [])])
    where = cluster_of(slurm, cluster)
    if where.kind == "slurm":
        if here:
            raise UserError("an evaluation on SLURM is a job of its own", "leave out --here")
        return evaluate.submit(run, which=which, overrides=words, request=request_of(where, root, time, after, options),
                               wanted=wanted, json=json, show_log=show_log if follow else None)
    only_on_slurm(nodes=wanted.nodes, time=time, after=after, here=here, follow=follow, **options)
    return evaluate.evaluate(run, which=which, overrides=words, wanted=wanted, json=json)


@command
@click.argument("task", required=False)
@spec_options
@wanted_options("gpus", "procs", "nodes", "cpus")
@queue_options
@click.option("--max-parallel", "parallel", type=click.IntRange(min=1), metavar="N", help="On SLURM, at most N runs at once.")
@click.option("--resume", "again", metavar="SWEEP", help="Go on with those of its runs that have not finished.")
@click.option("--dry-run", is_flag=True, help="Print what would run, and do nothing.")
@json_option
@runs_option
@click.pass_context
def sweep(context: click.Context, task: str | None, root: Path, wanted: Wanted, slurm: bool, cluster: str | None,
          time: str | None, after: str | None, parallel: int | None, again: str | None, dry_run: bool, json: bool,
          overrides: Sequence[str], config: str | None, **given: str | None) -> int:
    """Run a task, or a script, for each point of a grid: key=a,b,c other=x,y makes six runs.

    On SLURM they are one array; on this machine they run one after another. A value that holds a comma itself needs
    quotes, which the shell must leave: 'name="a,b"'.
    """
    from launch.execute import sweep as sweeps

    words, options = sbatch_options([*([task] if again and task else []), *overrides])
    words += [f"{ALIASES[name]}={text}" for name, text in given.items() if text is not None]
    if again:
        from launch.records.read import read_sweep

        if words or config or dry_run or context.obj.script_args is not None:
            raise UserError("--resume goes on with a sweep as it was started, and takes no task and no keys",
                            f"launch sweep --resume {again}")
        last = read_sweep(root, again)["job"]
        where = cluster_of(slurm, cluster or last.get("cluster")) if slurm or cluster or last["kind"] == "slurm" else None
        if where is None or where.kind != "slurm":
            only_on_slurm(nodes=wanted.nodes, time=time, after=after, **options)
        asked = slurm or cluster or time or after or options
        return sweeps.resume(root, again, request=request_of(where, root, time, after, options) if asked else None,
                             wanted=wanted, parallel=parallel, json=json)
    if task is None:
        raise UserError("`launch sweep` needs a task, a spec or a script", "launch sweep TASK key=a,b, or --resume SWEEP")
    where = cluster_of(slurm, cluster)
    if where.kind == "slurm":
        root = root_of(context, root, where)
    else:
        only_on_slurm(nodes=wanted.nodes, time=time, after=after, **options)
    return sweeps.start(words=words, load=lambda words: load(context, task, config, words, where), root=root.absolute(),
                        request=request_of(where, root, time, after, options), wanted=wanted, parallel=parallel,
                        dry_run=dry_run, json=json)


def show_log(run: Run) -> None:
    """Show the log of a run until the run has ended (`--follow`). Ctrl-C leaves the run alone."""
    from launch.report import logs

    logs.follow(run, follow=True, write=lambda text: print(text, end="", flush=True))


COMMANDS = (resume, eval, sweep)
