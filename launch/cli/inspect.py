"""The commands that inspect specs, clusters and runs, and those that stop runs or manage their files."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from launch.cli.options import (
    Folder,
    average_option,
    cluster_of,
    command,
    json_option,
    load,
    only_on_slurm,
    print_json,
    raw_option,
    root_of,
    run_argument,
    runs_option,
    spec_options,
    verbose_option,
    wanted_options,
)
from launch.cluster.resources import Wanted
from launch.plan import spec as specs
from trainers.contract.errors import UserError


@command
@json_option
def tasks(json: bool) -> None:
    """List the built-in tasks."""
    rows = [{"name": name, "description": specs.description(path), "file": str(path)}
            for name, path in specs.tasks().items()]
    if json:
        return print_json(rows)
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['description']}\n{'':<{width}}  {row['file']}")


@command
@click.argument("task")
@spec_options
@click.option("--slurm", is_flag=True, help="Include the defaults of the SLURM cluster $LAUNCH_CLUSTER, or else `slurm`.")
@click.option("--cluster", "cluster_name", metavar="NAME", help="Include the defaults of this cluster.")
@json_option
@click.pass_context
def show(context: click.Context, task: str, json: bool, slurm: bool, cluster_name: str | None, **spec_args: Any) -> None:
    """Print a run's complete spec, and the source of each value."""
    spec = load(context, task, cluster=cluster_of(slurm, cluster_name), **spec_args)
    if json:
        return print_json({"name": spec.name, "values": spec.values, "origins": spec.origins})
    print(specs.show(spec))


@command
@click.argument("task", required=False)
def schema(task: str | None) -> None:
    """Print the JSON Schema of a task's spec, for editors."""
    print_json(specs.schema(task))


@command
@click.option("--detect", is_flag=True, help="Print a draft of a cluster file for the SLURM cluster of this host.")
@json_option
def clusters(detect: bool, json: bool) -> None:
    """List the known clusters. `local` is this machine."""
    from launch.cluster.detect import draft, listing

    if detect:
        return print(draft(), end="")
    rows = listing()
    if json:
        return print_json(rows)
    from launch.cluster.config import folders

    width = max(len(row["name"]) for row in rows)
    for row in rows:
        about = f"error: {row['problem']}" if row["problem"] else row["description"]
        print(f"{row['name']:<{width}}  {about}" + ("  (yours)" if row["own"] else ""))
    print(f"\nput your own cluster files in {folders()[0]}/NAME.yaml; `launch clusters --detect` prints a draft")


@command
@click.argument("task")
@spec_options
@click.option("--cluster", "cluster_name", metavar="NAME", help="Download into the data folder of this cluster.")
@click.pass_context
def prefetch(context: click.Context, task: str, cluster_name: str | None, **spec_args: Any) -> int:
    """Download the files that a task needs, before its ranks start."""
    cluster = cluster_of(False, cluster_name)
    from launch.execute.prefetch import prefetch as fetch

    return fetch(load(context, task, cluster=cluster, **spec_args), cluster)


@command
@click.argument("task")
@spec_options
@wanted_options("gpus", "procs", "nodes")
@click.option("--slurm", is_flag=True, help="Plan for the SLURM cluster $LAUNCH_CLUSTER, or else `slurm`.")
@click.option("--cluster", "cluster_name", metavar="NAME", help="Plan for this cluster.")
@click.option("--probe", is_flag=True, help="Also measure the memory of activations: run one step here, in a separate process.")
@runs_option
@json_option
@click.pass_context
def plan(context: click.Context, task: str, root: Path, wanted: Wanted, slurm: bool, cluster_name: str | None,
         probe: bool, json: bool, **spec_args: Any) -> None:
    """Print the memory that a run needs, by strategy, and what fits."""
    cluster = cluster_of(slurm, cluster_name)
    if cluster.kind != "slurm":
        only_on_slurm(nodes=wanted.nodes)
    spec = load(context, task, cluster=cluster, **spec_args)
    from launch.cluster.resources import planned_resources
    from launch.plan import memory
    from launch.plan.initial_weights import with_weights

    spec = with_weights(spec, root_of(context, root, cluster))
    estimate = memory.memory_table(spec, cluster, planned_resources(cluster, wanted), probe)
    print_json(estimate) if json else print(memory.show(estimate))


@command
@click.option("--sweep", metavar="ID", help="Compare the runs of this sweep.")
@runs_option
@json_option
def runs(root: Path, json: bool, sweep: str | None) -> None:
    """List runs, newest first."""
    from launch.records import seeds
    from launch.records.read import list_runs
    from launch.report.tables import table

    rows = list_runs(root, sweep)
    if json:
        return print_json(rows)
    print(table(rows))
    if sweep:
        print("".join(f"{line}\n" for line in seeds.lines(seeds.means(root, sweep, rows))), end="")


@command
@run_argument
@runs_option
@json_option
def status(word: str, root: Path, json: bool) -> None:
    """Show the state, progress and attempts of a run."""
    from launch.records.read import find_run
    from launch.records.read import status as status_of
    from launch.report.tables import details

    facts = status_of(find_run(root, word))
    print_json(facts) if json else print(details(facts))


@command
@run_argument
@runs_option
@json_option
def explain(word: str, root: Path, json: bool) -> None:
    """Explain what happened to a run, why, and what to do next."""
    from launch.records.read import find_run
    from launch.report.explain import explain as explain_run
    from launch.report.explain import told

    explanation = explain_run(find_run(root, word))
    print_json(explanation) if json else print(told(explanation))


@command
@click.option("--cluster", "cluster_name", metavar="NAME", help="Check this cluster (default: this machine).")
@click.option("--slurm", is_flag=True, help="Check the SLURM cluster $LAUNCH_CLUSTER, or else `slurm`.")
@click.option("--job", is_flag=True, help="Also run a trial of about a minute: each rank tests the folder of runs, torch, its "
              "GPU and one all-reduce.")
@click.option("--nodes", type=click.IntRange(min=1), metavar="N",
              help="Nodes of the trial (default: 2, or 1 if the partition has only one).")
@runs_option
@json_option
@click.pass_context
def doctor(context: click.Context, root: Path, json: bool, slurm: bool, cluster_name: str | None, job: bool,
           nodes: int | None) -> int:
    """Check this machine or a cluster for problems before you run."""
    cluster = cluster_of(slurm, cluster_name)
    if nodes and not job:
        raise UserError("--nodes is for --job", "add --job")
    from dataclasses import asdict

    from launch.report.doctor.check import line
    from launch.report.doctor.checks import doctor as examine

    checks = []
    for check in examine(cluster, root_of(context, root, cluster), job, nodes, lambda text: print(text, file=sys.stderr)):
        checks.append(check)
        if not json:
            print(line(check), flush=True)
    if json:
        print_json([asdict(check) for check in checks])
    return int(any(check.ok == "error" for check in checks))


@command
@run_argument
@click.option("-f", "--follow", is_flag=True, help="Print new lines until the run ends.")
@click.option("--rank", type=click.IntRange(min=0), metavar="K", help="Print the log of this rank (default: 0).")
@click.option("--attempt", type=click.IntRange(min=1), metavar="N", help="Print only this attempt (default: all attempts).")
@click.option("--node", type=click.IntRange(min=0), metavar="K",
              help="On SLURM: print the log of the launch process on node K instead.")
@runs_option
@json_option
def logs(word: str, root: Path, follow: bool, rank: int | None, attempt: int | None, node: int | None, json: bool) -> None:
    """Print the log of a rank."""
    from launch.records.read import find_run
    from launch.report import logs as run_logs

    run = find_run(root, word)
    if json:
        for line in run_logs.lines(run, rank=rank, attempt=attempt, node=node, follow=follow):
            print(jsonlib.dumps(line, ensure_ascii=False), flush=True)
    else:
        run_logs.follow(run, rank=rank, attempt=attempt, node=node, follow=follow, write=_write)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@command
@run_argument
@runs_option
@json_option
def cancel(word: str, root: Path, json: bool) -> None:
    """Stop a run or a whole sweep. Finished work is kept."""
    from launch.records.cancel import cancel as stop
    from launch.records.cancel import cancel_sweep
    from launch.records.read import find_run, find_sweep

    sweep = find_sweep(root, word)
    # Only a sweep's full id means the sweep: the beginning of its id may also name one of its runs.
    whole_sweep = sweep is not None and sweep.name == Path(word).name

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if whole_sweep:
        rows = cancel_sweep(root, word, say=say)
    else:
        run = find_run(root, word)
        rows = [{"id": run.id, "state": stop(run, say=say)}]
    if json:
        return print_json(rows if whole_sweep else rows[0])
    for row in rows:
        print(f"{row['id']}: {row['state']}")


@command
@run_argument
@runs_option
def sync(word: str, root: Path) -> int:
    """Upload the offline W&B data of a run."""
    from launch.records.read import find_run
    from launch.records.sync import sync as upload

    return upload(find_run(root, word))


@command
@run_argument
@click.option("--step", "which", metavar="N|best", help="Step of the checkpoint, or `best`: the best by checkpoint.metric "
              "(default: the newest complete checkpoint).")
@click.option("--to", type=click.Choice(["safetensors", "huggingface"]), default="safetensors",
              help="safetensors (default): one file per model. huggingface: a folder that from_pretrained loads.")
@click.option("-o", "--output", type=Folder(path_type=Path), metavar="PATH",
              help="A folder, or a .safetensors file if the run has one model (default: export/step_N in the run's folder).")
@average_option
@raw_option
@runs_option
@json_option
def export(word: str, root: Path, which: str | None, to: str, output: Path | None, raw: bool, average: int | None,
           json: bool) -> None:
    """Write the models of a checkpoint to files for other programs."""
    from launch.records import export as exports
    from launch.records.read import find_run

    result = exports.export(find_run(root, word), which=which, to=to, output=output, raw=raw, average=average or 1)
    print_json(result) if json else exports.say(result)


@click.group(params=[verbose_option()], no_args_is_help=False)
def checkpoint() -> None:
    """List, verify or prune the checkpoints of a run."""


def checkpoint_command(function: Callable) -> click.Command:
    made = checkpoint.command(function.__name__.removesuffix("_checkpoints"))(function)
    made.params.append(verbose_option())
    return made


@checkpoint_command
@run_argument
@runs_option
@json_option
def list_checkpoints(word: str, root: Path, json: bool) -> None:
    """List the checkpoints of a run. Reads only their manifests."""
    from launch.records.checkpoints import listing, settings
    from launch.records.read import find_run
    from launch.report.checkpoints import table

    paths = find_run(root, word).paths
    rows = listing(paths)
    print_json(rows) if json else print(table(rows, settings(paths).best_by))


@checkpoint_command
@run_argument
@click.option("--step", type=click.IntRange(min=0), metavar="N", help="Verify only the checkpoint of this step.")
@runs_option
@json_option
def verify_checkpoints(word: str, root: Path, step: int | None, json: bool) -> int:
    """Read and hash every file. The exit code is 1 if a file differs from its manifest."""
    from launch.records.checkpoints import verify
    from launch.records.read import find_run
    from trainers.contract.text import size

    rows = verify(find_run(root, word).paths, step)
    if json:
        print_json(rows)
    else:
        for row in rows:
            print(f"step_{row['step']}: " + (row["problem"] or f"ok, {size(row['bytes'])}"))
    return int(any(row["problem"] for row in rows))


@checkpoint_command
@run_argument
@click.option("--keep-last", type=click.IntRange(min=1), metavar="N", help="Use N instead of the run's checkpoint.keep_last.")
@click.option("--dry-run", is_flag=True, help="Print what would be deleted, and delete nothing.")
@runs_option
@json_option
def prune_checkpoints(word: str, root: Path, keep_last: int | None, dry_run: bool, json: bool) -> None:
    """Delete the checkpoints that the run does not need to keep.

    The run keeps what its checkpoint.keep_last, keep_best and keep_every ask for. The newest complete checkpoint is
    never deleted.
    """
    from launch.records.checkpoints import prune
    from launch.records.read import find_run
    from launch.report.checkpoints import pruned

    result = prune(find_run(root, word), keep_last, dry_run)
    print_json(result) if json else print(pruned(result))


COMMANDS = (tasks, show, schema, clusters, prefetch, plan, runs, status, explain, doctor, logs, cancel, sync, export, checkpoint)
