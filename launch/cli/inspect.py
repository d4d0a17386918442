"""All other commands: those that look at specs, clusters and runs, and those that tidy up."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from launch.cli.options import (
    cluster_of,
    command,
    json_option,
    load,
    only_on_slurm,
    print_json,
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
@click.option("--slurm", is_flag=True, help="As on SLURM.")
@click.option("--cluster", metavar="NAME", help="As on this cluster.")
@json_option
@click.pass_context
def show(context: click.Context, task: str, json: bool, slurm: bool, cluster: str | None, **given: Any) -> None:
    """Print a run's whole spec, and where each value comes from."""
    spec = load(context, task, cluster=cluster_of(slurm, cluster), **given)
    if json:
        return print_json({"name": spec.name, "values": spec.values, "origins": spec.origins})
    print(specs.show(spec))


@command
@click.argument("task", required=False)
def schema(task: str | None) -> None:
    """Print the JSON Schema of specs, for editors."""
    print_json(specs.schema(task))


@command
@click.option("--detect", is_flag=True, help="Draft a file for the SLURM cluster one stands on.")
@json_option
def clusters(detect: bool, json: bool) -> None:
    """List the clusters that runs can go to."""
    from launch.cluster import detect as found

    if detect:
        return print(found.draft(), end="")
    rows = found.listing()
    if json:
        return print_json(rows)
    from launch.cluster.config import folders

    width = max(len(row["name"]) for row in rows)
    for row in rows:
        about = f"error: {row['problem']}" if row["problem"] else row["description"]
        print(f"{row['name']:<{width}}  {about}" + ("  (your own)" if row["own"] else ""))
    print(f"\nyour own go to {folders()[0]}/NAME.yaml; `launch clusters --detect` drafts one")


@command
@click.argument("task")
@spec_options
@click.option("--cluster", metavar="NAME", help="For this cluster: where it says that data lies.")
@click.pass_context
def prefetch(context: click.Context, task: str, cluster: str | None, **given: Any) -> int:
    """Download a task's data, and what else its ranks would download."""
    where = cluster_of(False, cluster)
    from launch.execute.prefetch import prefetch as fetch

    return fetch(load(context, task, cluster=where, **given), where)


@command
@click.argument("task")
@spec_options
@wanted_options("gpus", "procs", "nodes")
@click.option("--slurm", is_flag=True, help="As on SLURM.")
@click.option("--cluster", metavar="NAME", help="As on this cluster.")
@click.option("--probe", is_flag=True, help="Measure the activations too: one step on this machine, in a process of its own.")
@runs_option
@json_option
@click.pass_context
def plan(context: click.Context, task: str, root: Path, wanted: Wanted, slurm: bool, cluster: str | None,
         probe: bool, json: bool, **given: Any) -> None:
    """Say what memory a run needs under each strategy, and what would fit."""
    where = cluster_of(slurm, cluster)
    if where.kind != "slurm":
        only_on_slurm(nodes=wanted.nodes)
    spec = load(context, task, cluster=where, **given)
    from launch.cluster.resources import planned_resources
    from launch.plan import memory
    from launch.plan.initial_weights import resolved

    spec = resolved(spec, root_of(context, root, where))
    found = memory.memory_table(spec, where, planned_resources(where, wanted), probe)
    print_json(found) if json else print(memory.show(found))


@command
@click.option("--sweep", metavar="ID", help="Those of a sweep, compared.")
@runs_option
@json_option
def runs(root: Path, json: bool, sweep: str | None) -> None:
    """List the runs."""
    from launch.records.read import list_runs
    from launch.report.tables import table

    rows = list_runs(root, sweep)
    print_json(rows) if json else print(table(rows))


@command
@run_argument
@runs_option
@json_option
def status(word: str, root: Path, json: bool) -> None:
    """Say what became of a run."""
    from launch.records.read import find_run
    from launch.records.read import status as status_of
    from launch.report.tables import details

    found = status_of(find_run(root, word))
    print_json(found) if json else print(details(found))


@command
@run_argument
@runs_option
@json_option
def explain(word: str, root: Path, json: bool) -> None:
    """Say what became of a run, why, and what to do."""
    from launch.records.read import find_run
    from launch.report.explain import explain as explain_run
    from launch.report.explain import told

    found = explain_run(find_run(root, word))
    print_json(found) if json else print(told(found))


@command
@click.option("--cluster", metavar="NAME", help="Of this cluster; by default of this machine.")
@click.option("--slurm", is_flag=True, help="Of the SLURM cluster one stands on.")
@click.option("--job", is_flag=True, help="Try it: a job of a minute that sees its GPUs and does one all-reduce.")
@click.option("--nodes", type=click.IntRange(min=1), metavar="N", help="Nodes of that job (2, if there are as many).")
@runs_option
@json_option
@click.pass_context
def doctor(context: click.Context, root: Path, json: bool, slurm: bool, cluster: str | None, job: bool, nodes: int | None
           ) -> int:
    """Look for what would go wrong, before anything is queued."""
    where = cluster_of(slurm, cluster)
    if nodes and not job:
        raise UserError("--nodes is for --job", "add --job")
    from dataclasses import asdict

    from launch.report.doctor import checks as looks

    checks = []
    for check in looks.doctor(where, root_of(context, root, where), job, nodes, lambda text: print(text, file=sys.stderr)):
        checks.append(check)
        if not json:
            print(check.line(check), flush=True)
    if json:
        print_json([asdict(check) for check in checks])
    return int(any(check.ok == "error" for check in checks))


@command
@run_argument
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends.")
@click.option("--rank", type=click.IntRange(min=0), metavar="K", help="Of this rank (0).")
@click.option("--attempt", type=click.IntRange(min=1), metavar="N", help="Of this attempt alone.")
@click.option("--node", type=click.IntRange(min=0), metavar="K", help="On SLURM: of the process on node K instead.")
@runs_option
@json_option
def logs(word: str, root: Path, follow: bool, rank: int | None, attempt: int | None, node: int | None, json: bool) -> None:
    """Print what a rank has printed."""
    from launch.records.read import find_run
    from launch.report import logs as written

    run = find_run(root, word)
    if json:
        for line in written.lines(run, rank=rank, attempt=attempt, node=node, follow=follow):
            print(jsonlib.dumps(line, ensure_ascii=False), flush=True)
    else:
        written.follow(run, rank=rank, attempt=attempt, node=node, follow=follow, write=_write)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@command
@run_argument
@runs_option
@json_option
def cancel(word: str, root: Path, json: bool) -> None:
    """Stop a run, which keeps what it has done, or a whole sweep."""
    from launch.records.cancel import cancel as stop
    from launch.records.cancel import cancel_sweep
    from launch.records.read import find_run, find_sweep

    sweep = find_sweep(root, word)
    whole = sweep is not None and sweep.name == Path(word).name  # a beginning of its id may mean one of its runs
    if whole:
        rows = cancel_sweep(root, word)
    else:
        run = find_run(root, word)
        rows = [{"id": run.id, "state": stop(run)}]
    if json:
        return print_json(rows if whole else rows[0])
    for row in rows:
        print(f"{row['id']}: {row['state']}")


@command
@run_argument
@runs_option
def sync(word: str, root: Path) -> int:
    """Upload a run's offline W&B data."""
    from launch.records.read import find_run
    from launch.records.sync import sync as upload

    return upload(find_run(root, word))


@command
@run_argument
@click.option("--step", "which", metavar="N|best", help="Of this checkpoint, or of the best by checkpoint.metric; by "
              "default of the newest whole one.")
@click.option("--to", type=click.Choice(["safetensors", "huggingface"]), default="safetensors",
              help="A file a model, or a folder that from_pretrained loads.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="PATH",
              help="A folder, or one model's very file (.safetensors); by default the run's export/step_<n>/.")
@runs_option
@json_option
def export(word: str, root: Path, which: str | None, to: str, output: Path | None, json: bool) -> None:
    """Write a checkpoint's models to files for others."""
    from launch.records import export as exports
    from launch.records.read import find_run

    found = exports.export(find_run(root, word), which=which, to=to, output=output)
    print_json(found) if json else exports.say(found)


@click.group(params=[verbose_option()], no_args_is_help=False)
def checkpoint() -> None:
    """List, verify or prune a run's checkpoints."""


def checkpoint_command(function: Callable) -> click.Command:
    made = checkpoint.command(function.__name__.removesuffix("_checkpoints"))(function)
    made.params.append(verbose_option())
    return made


@checkpoint_command
@run_argument
@runs_option
@json_option
def list_checkpoints(word: str, root: Path, json: bool) -> None:
    """List the checkpoints there are, by their manifests."""
    from launch.records.checkpoints import listing
    from launch.records.read import find_run
    from launch.report.checkpoints import table

    rows = listing(find_run(root, word).paths)
    print_json(rows) if json else print(table(rows))


@checkpoint_command
@run_argument
@click.option("--step", type=click.IntRange(min=0), metavar="N", help="Of this checkpoint alone.")
@runs_option
@json_option
def verify_checkpoints(word: str, root: Path, step: int | None, json: bool) -> int:
    """Read and hash every file; the exit code is 1 if one is not as it was written."""
    from launch.records.checkpoints import verify
    from launch.records.read import find_run
    from trainers.contract.text import size

    rows = verify(find_run(root, word).paths, step)
    if json:
        print_json(rows)
    else:
        for row in rows:
            print(f"step_{row['step']}: " + (row["problem"] or f"whole, {size(row['bytes'])}"))
    return int(any(row["problem"] for row in rows))


@checkpoint_command
@run_argument
@click.option("--keep-last", type=click.IntRange(min=1), metavar="N", help="Instead of the run's own checkpoint.keep_last.")
@click.option("--dry-run", is_flag=True, help="Say what would be deleted, and do nothing.")
@runs_option
@json_option
def prune_checkpoints(word: str, root: Path, keep_last: int | None, dry_run: bool, json: bool) -> None:
    """Delete what checkpoint.keep_last, keep_best and keep_every do not keep; never the last whole one."""
    from launch.records.checkpoints import prune
    from launch.records.read import find_run
    from launch.report.checkpoints import pruned

    found = prune(find_run(root, word), keep_last, dry_run)
    print_json(found) if json else print(pruned(found))


COMMANDS = (tasks, show, schema, clusters, prefetch, plan, runs, status, explain, doctor, logs, cancel, sync, export, checkpoint)
