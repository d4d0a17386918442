"""The command line: parse, call, print. No logic.

What is heavy to import (pydantic, ruamel.yaml, rich) is imported by the command that needs it, so that
`launch --help` answers in a blink.
"""

from __future__ import annotations

import difflib
import json as jsonlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

from launch import spec as specs
from launch.options import (
    ALIASES,
    cluster_of,
    cpus_option,
    json_option,
    one_kind,
    only_on_slurm,
    queue_options,
    ranks_options,
    request_of,
    root_of,
    run_argument,
    runs_option,
    sbatch_options,
    slurm_options,
    spec_options,
    verbose_option,
)
from trainers.errors import UserError

EXAMPLES = """\b
launch cifar10 data=sample train.steps=100 --procs 1
launch cifar10 --gpus 2 optim.lr=0.2 --wandb online
launch train.py --gpus 2 -- --lr 1e-3"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    asked = SimpleNamespace(verbose=False, script_args=None)
    if "--" in words:
        cut = words.index("--")
        words, asked.script_args = words[:cut], words[cut + 1:]
    try:
        code = cli.main(words or ["--help"], prog_name="launch", obj=asked, standalone_mode=False) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        return _fail(error, error.exit_code, asked.verbose)
    except click.UsageError as error:
        return _fail(_usage(error), 2, asked.verbose)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:  # `launch runs | head`: whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        hint = None if asked.verbose else "--verbose shows the traceback"
        return _fail(UserError(f"{type(error).__name__}: {error}", hint), 1, asked.verbose)


def _fail(error: UserError, code: int, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    print(UserError(" ".join(error.message.splitlines()), error.hint), file=sys.stderr)
    return code


def _usage(error: click.UsageError) -> UserError:
    """click's errors, said as all others are."""
    context = error.ctx
    path = context.command_path if context else "launch"
    hint = f"`{path} --help` shows what there is" if context else None
    match error:
        case click.NoSuchOption():
            if near := difflib.get_close_matches(error.option_name.lstrip("-"), _options(context), n=1):
                hint = f"did you mean `--{near[0]}`?"
            elif isinstance(context.command, click.Group):
                hint = f"options come after the command or task: `launch TASK {error.option_name} ...`"
            elif isinstance(context.command, Script):
                hint = f"what is the script's comes after `--`: `{path} -- {error.option_name} ...`"
            elif "--slurm" in [f"--{name}" for name in _options(context)]:
                hint += f"; an option of sbatch is set by sbatch.{error.option_name.lstrip('-')}=VALUE"
            return UserError(f"`{path}` has no option `{error.option_name}`", hint)
        case click.MissingParameter():
            return UserError(f"`{path}` needs {error.param.make_metavar(context)}", hint)
        case click.BadParameter() if error.param is not None:
            name = error.param.opts[0] if isinstance(error.param, click.Option) else error.param.make_metavar(context)
            return UserError(f"`{name}`: {error.message.rstrip('.')}", hint)
        case click.BadOptionUsage():
            return UserError(f"`{error.option_name}` needs a value" if "requires" in error.message
                             else f"`{error.option_name}` takes no value", hint)
    if context and isinstance(context.command, click.Group):
        commands = context.command.list_commands(context)
        if error.message.startswith("Missing command"):
            return UserError(f"`{path}` needs a command", f"one of {', '.join(commands)}")
        if unknown := re.match(r"No such command '(.*)'", error.message):
            near = difflib.get_close_matches(unknown[1], commands, n=1)
            return UserError(f"`{path}` has no command `{unknown[1]}`",
                             f"did you mean `{near[0]}`?" if near else f"it has {', '.join(commands)}")
    return UserError(error.message.rstrip("."), hint)


def _options(context: click.Context) -> list[str]:
    """Without their dashes, which would make all of them alike."""
    return [name[2:] for option in context.command.get_params(context) for name in option.opts if name.startswith("--")]


# Reading a spec


def load(context: click.Context, task: str, config: str | None, overrides: Sequence[str], cluster: Any,
         **given: str | None) -> Any:
    """The spec. Raises: UserError."""
    overrides = [*overrides, *(f"{ALIASES[name]}={text}" for name, text in given.items() if text is not None)]
    if task not in specs.tasks() and not os.path.exists(task):
        raise _no_such(task, list(specs.tasks()))
    if task in specs.tasks() or specs.is_spec(task):
        _refuse_script_args(context, task)
        return specs.load_spec(task, overrides, cluster=cluster, environment=os.environ, config_file=config)
    if config is not None:
        raise UserError(f"`--config` is for tasks; `{task}` is a script", "give its keys as key=value")
    return specs.script_spec(task, context.obj.script_args or [], overrides, cluster=cluster)


def _no_such(word: str, names: Sequence[str]) -> UserError:
    if os.sep in word or Path(word).suffix in (".py", ".yaml", ".yml"):
        return UserError(f"there is no file `{word}`", f"looked in `{Path.cwd()}`" if not os.path.isabs(word) else None)
    near = difflib.get_close_matches(word, names, n=2)
    return UserError(f"there is no command, task or file `{word}`",
                     f"did you mean {' or '.join(f'`{name}`' for name in near)}?" if near
                     else "`launch --help` lists commands and tasks")


def _refuse_script_args(context: click.Context, word: str) -> None:
    if context.obj.script_args is not None:
        raise UserError(f"what follows `--` is for a script, and `{word}` is none",
                        "write the keys of a task as key=value")


def _print_json(value: Any) -> None:
    print(jsonlib.dumps(value, indent=1, ensure_ascii=False))


# Words: commands, tasks, files


class Script(click.Command):
    """The command that a script's name is: what follows `--` is for it."""


class Words(click.Group):
    """`launch WORD`: a command, else a built-in task, else a file."""

    def get_command(self, ctx: click.Context, word: str) -> click.Command | None:
        if command := self.commands.get(word):
            return command
        if path := specs.tasks().get(word):
            return _task_command(word, specs.description(path) + ".")
        if specs.is_spec(word) and os.path.exists(word):
            return _task_command(word, "A spec of your own.")
        if os.path.exists(word):
            return _task_command(word, "A script of your own; what follows `--` is for it.", Script)
        return None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str, click.Command, list[str]]:
        word, *rest = args
        command = self.get_command(ctx, word)
        if command is None:
            raise _no_such(word, [*self.commands, *specs.tasks()])
        if word in self.commands and word not in ("show", "sweep"):
            _refuse_script_args(ctx, word)
        return word, command, rest

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if rows := [(name, specs.description(path)) for name, path in specs.tasks().items()]:
            with formatter.section("Tasks"):
                formatter.write_dl(rows)
        super().format_commands(ctx, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_commands(ctx, formatter)
        click.Command.format_options(self, ctx, formatter)


@click.group(cls=Words, params=[verbose_option()], subcommand_metavar="WORD [ARGS]...",
             help="Run WORD, a task, a spec of your own (.yaml) or a script, or do what a command says.\n\n" + EXAMPLES)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, help="Print the version.",
              callback=lambda context, _, value: value and _version(context))
def cli() -> None:
    pass


def _version(context: click.Context) -> None:
    from importlib.metadata import version

    print(version("launch-training"))
    context.exit()


def command(function: Callable) -> click.Command:
    made = cli.command()(function)
    made.params.append(verbose_option())
    return made


def _task_command(word: str, about: str, kind: type[click.Command] = click.Command) -> click.Command:
    @click.command(word, cls=kind, help=about)
    @spec_options
    @ranks_options
    @cpus_option
    @slurm_options
    @click.option("--debug", is_flag=True, help="One rank, in this process: breakpoint() works.")
    @click.option("--dry-run", is_flag=True, help="Print what would run, and do nothing.")
    @json_option
    @runs_option
    @click.pass_context
    def run(context: click.Context, root: Path, gpus: int | None, procs: int | None, cpus: int | None, debug: bool,
            dry_run: bool, json: bool, slurm: bool, cluster: str | None, nodes: int | None, time: str | None, after: str | None,
            here: bool, follow: bool, overrides: Sequence[str], **given: Any) -> int:
        one_kind(gpus, procs)
        where = cluster_of(slurm, cluster)
        overrides, options = sbatch_options(overrides)
        if debug and kind is not Script:
            overrides = specs.for_debugging(word, overrides)
        spec = load(context, word, cluster=where, overrides=overrides, **given)
        if where.kind == "slurm":
            if debug:
                raise UserError("--debug runs one rank in this process, not on SLURM", "leave out --slurm or --debug")
            from launch import on_slurm

            if here and (follow or time or after or options):
                raise UserError("--here takes the allocation as it is", "leave out --follow, --time, --after and sbatch.KEY")
            if here and json and not dry_run:
                raise UserError("--here shows what the ranks say as plain lines", "leave out --json")
            root = root_of(context, root, where)
            return on_slurm.start(spec=spec, root=root, request=request_of(where, root, time, after, options), gpus=gpus,
                                  procs=procs, cpus=cpus, nodes=nodes, dry_run=dry_run, json=json, follow=follow, here=here)
        only_on_slurm(nodes=nodes, time=time, after=after, here=here, follow=follow, **options)
        from launch.start import start

        return start(spec=spec, runs=root, gpus=gpus, procs=procs, cpus=cpus, debug=debug, dry_run=dry_run, json=json,
                     cluster=where)

    run.params.append(verbose_option())
    return run


# Commands


@command
@json_option
def tasks(json: bool) -> None:
    """List the built-in tasks."""
    rows = [{"name": name, "description": specs.description(path), "file": str(path)}
            for name, path in specs.tasks().items()]
    if json:
        return _print_json(rows)
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
        return _print_json({"name": spec.name, "values": spec.values, "origins": spec.origins})
    print(specs.show(spec))


@command
@click.argument("task", required=False)
def schema(task: str | None) -> None:
    """Print the JSON Schema of specs, for editors."""
    _print_json(specs.schema(task))


@command
@click.option("--detect", is_flag=True, help="Draft a file for the SLURM cluster one stands on.")
@json_option
def clusters(detect: bool, json: bool) -> None:
    """List the clusters that runs can go to."""
    from launch import detect as found

    if detect:
        return print(found.draft(), end="")
    rows = found.listing()
    if json:
        return _print_json(rows)
    from launch.cluster import folders

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
    from launch.prefetch import prefetch as fetch

    return fetch(load(context, task, cluster=where, **given), where)


@command
@click.argument("task")
@spec_options
@ranks_options
@click.option("--nodes", type=click.IntRange(min=1), metavar="N", help="Nodes; alone, whole ones.")
@click.option("--slurm", is_flag=True, help="As on SLURM.")
@click.option("--cluster", metavar="NAME", help="As on this cluster.")
@click.option("--probe", is_flag=True, help="Measure the activations too: one step on this machine, in a process of its own.")
@runs_option
@json_option
@click.pass_context
def plan(context: click.Context, task: str, root: Path, gpus: int | None, procs: int | None, nodes: int | None, slurm: bool,
         cluster: str | None, probe: bool, json: bool, **given: Any) -> None:
    """Say what memory a run needs under each strategy, and what would fit."""
    one_kind(gpus, procs)
    where = cluster_of(slurm, cluster)
    if where.kind != "slurm":
        only_on_slurm(nodes=nodes)
    spec = load(context, task, cluster=where, **given)
    from launch import fit
    from launch.resources import planned_resources
    from launch.weights import resolved

    spec = resolved(spec, root_of(context, root, where))
    found = fit.fit(spec, where, planned_resources(where, gpus, procs, nodes), probe)
    _print_json(found) if json else print(fit.show(found))


@command
@click.option("--sweep", metavar="ID", help="Those of a sweep, compared.")
@runs_option
@json_option
def runs(root: Path, json: bool, sweep: str | None) -> None:
    """List the runs."""
    from launch.runs import list_runs
    from launch.show_runs import table

    rows = list_runs(root, sweep)
    _print_json(rows) if json else print(table(rows))


@command
@run_argument
@runs_option
@json_option
def status(word: str, root: Path, json: bool) -> None:
    """Say what became of a run."""
    from launch.runs import find_run
    from launch.runs import status as status_of
    from launch.show_runs import details

    found = status_of(find_run(root, word))
    _print_json(found) if json else print(details(found))


@command
@run_argument
@runs_option
@json_option
def explain(word: str, root: Path, json: bool) -> None:
    """Say what became of a run, why, and what to do."""
    from launch.explain import explain as explain_run
    from launch.explain import told
    from launch.runs import find_run

    found = explain_run(find_run(root, word))
    _print_json(found) if json else print(told(found))


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

    from launch import doctor as looks

    checks = []
    for check in looks.doctor(where, root_of(context, root, where), job, nodes, lambda text: print(text, file=sys.stderr)):
        checks.append(check)
        if not json:
            print(looks.line(check), flush=True)
    if json:
        _print_json([asdict(check) for check in checks])
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
    from launch import logs as written
    from launch.runs import find_run

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
    from launch.cancel import cancel as stop
    from launch.cancel import cancel_sweep
    from launch.runs import find_run, find_sweep

    sweep = find_sweep(root, word)
    whole = sweep is not None and sweep.name == Path(word).name  # a beginning of its id may mean one of its runs
    if whole:
        rows = cancel_sweep(root, word)
    else:
        run = find_run(root, word)
        rows = [{"id": run.id, "state": stop(run)}]
    if json:
        return _print_json(rows if whole else rows[0])
    for row in rows:
        print(f"{row['id']}: {row['state']}")


@command
@run_argument
@click.argument("overrides", nargs=-1, metavar="[sbatch.KEY=VALUE]...")
@click.option("--strategy", metavar="WORD", help="Spread its models otherwise from now on: ddp, zero1, zero2, zero3, fsdp.")
@ranks_options
@cpus_option
@slurm_options
@runs_option
@json_option
@click.option("--take-over", is_flag=True, help="Though its record says that it runs on another host.")
def resume(word: str, root: Path, gpus: int | None, procs: int | None, cpus: int | None, json: bool, take_over: bool,
           slurm: bool, cluster: str | None, nodes: int | None, time: str | None, after: str | None, here: bool, follow: bool,
           overrides: Sequence[str], strategy: str | None) -> int:
    """Continue a run from its last checkpoint, where it ran last unless told."""
    one_kind(gpus, procs)
    from launch.runs import find_run

    run = find_run(root, word)
    spread, options = sbatch_options([*overrides, *([f"{ALIASES['strategy']}={strategy}"] if strategy is not None else [])])
    last = run.record.get("job") or {}
    if slurm or cluster or last.get("kind") == "slurm":
        where = cluster_of(slurm, cluster or (last.get("cluster") if not slurm else None))
        if where.kind == "slurm":
            from launch import on_slurm

            if here:
                raise UserError("a run is resumed by a job of its own", "leave out --here")
            asked = slurm or cluster or time or after or options
            return on_slurm.resume(run, request=request_of(where, root, time, after, options) if asked else None, gpus=gpus,
                                   procs=procs, cpus=cpus, nodes=nodes, spread=spread, json=json, follow=follow)
    only_on_slurm(nodes=nodes, time=time, after=after, here=here, follow=follow, **options)
    from launch import start

    return start.resume(run, gpus=gpus, procs=procs, cpus=cpus, spread=spread, json=json, take_over=take_over)


@command
@run_argument
@click.argument("overrides", nargs=-1, metavar="[key=value]...")
@click.option("--step", "which", metavar="N|best", help="Of this checkpoint; by default of the `newest`.")
@click.option("--data", metavar="PATH", help="Short for data=PATH, or data=sample.")
@ranks_options
@slurm_options
@runs_option
@json_option
def eval(word: str, root: Path, which: str | None, overrides: Sequence[str], data: str | None, gpus: int | None,
         procs: int | None, json: bool, slurm: bool, cluster: str | None, nodes: int | None, time: str | None,
         after: str | None, here: bool, follow: bool) -> int:
    """Evaluate a checkpoint of a run, without training."""
    one_kind(gpus, procs)
    from launch import evaluate
    from launch.runs import find_run

    run = find_run(root, word)
    words, options = sbatch_options([*overrides, *([f"{ALIASES['data']}={data}"] if data is not None else [])])
    where = cluster_of(slurm, cluster)
    if where.kind == "slurm":
        if here:
            raise UserError("an evaluation on SLURM is a job of its own", "leave out --here")
        return evaluate.submit(run, which=which, overrides=words, request=request_of(where, root, time, after, options),
                               gpus=gpus, procs=procs, nodes=nodes, json=json, follow=follow)
    only_on_slurm(nodes=nodes, time=time, after=after, here=here, follow=follow, **options)
    return evaluate.evaluate(run, which=which, overrides=words, gpus=gpus, procs=procs, json=json)


@command
@run_argument
@runs_option
def sync(word: str, root: Path) -> int:
    """Upload a run's offline W&B data."""
    from launch.runs import find_run
    from launch.sync import sync as upload

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
    from launch import export as exports
    from launch.runs import find_run

    found = exports.export(find_run(root, word), which=which, to=to, output=output)
    _print_json(found) if json else exports.say(found)


@cli.group(params=[verbose_option()], no_args_is_help=False)
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
    from launch import checkpoints
    from launch.runs import find_run

    rows = checkpoints.listing(find_run(root, word).paths)
    _print_json(rows) if json else print(checkpoints.table(rows))


@checkpoint_command
@run_argument
@click.option("--step", type=click.IntRange(min=0), metavar="N", help="Of this checkpoint alone.")
@runs_option
@json_option
def verify_checkpoints(word: str, root: Path, step: int | None, json: bool) -> int:
    """Read and hash every file; the exit code is 1 if one is not as it was written."""
    from launch import checkpoints
    from launch.runs import find_run
    from trainers.events import size

    rows = checkpoints.verify(find_run(root, word).paths, step)
    if json:
        _print_json(rows)
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
    from launch import checkpoints
    from launch.runs import find_run

    found = checkpoints.prune(find_run(root, word), keep_last, dry_run)
    _print_json(found) if json else print(checkpoints.pruned(found))


@command
@click.argument("task", required=False)
@spec_options
@ranks_options
@cpus_option
@queue_options
@click.option("--max-parallel", "parallel", type=click.IntRange(min=1), metavar="N", help="On SLURM, at most N runs at once.")
@click.option("--resume", "again", metavar="SWEEP", help="Go on with those of its runs that have not finished.")
@click.option("--dry-run", is_flag=True, help="Print what would run, and do nothing.")
@json_option
@runs_option
@click.pass_context
def sweep(context: click.Context, task: str | None, root: Path, gpus: int | None, procs: int | None, cpus: int | None,
          nodes: int | None, slurm: bool, cluster: str | None, time: str | None, after: str | None, parallel: int | None,
          again: str | None, dry_run: bool, json: bool, overrides: Sequence[str], config: str | None,
          **given: str | None) -> int:
    """Run a task, or a script, for each point of a grid: key=a,b,c other=x,y makes six runs.

    On SLURM they are one array; on this machine they run one after another. A value that holds a comma itself needs
    quotes, which the shell must leave: 'name="a,b"'.
    """
    one_kind(gpus, procs)
    from launch import sweep as sweeps

    words, options = sbatch_options([*([task] if again and task else []), *overrides])
    words += [f"{ALIASES[name]}={text}" for name, text in given.items() if text is not None]
    if again:
        from launch.runs import read_sweep

        if words or config or dry_run or context.obj.script_args is not None:
            raise UserError("--resume goes on with a sweep as it was started, and takes no task and no keys",
                            f"launch sweep --resume {again}")
        last = read_sweep(root, again)["job"]
        where = cluster_of(slurm, cluster or last.get("cluster")) if slurm or cluster or last["kind"] == "slurm" else None
        if where is None or where.kind != "slurm":
            only_on_slurm(nodes=nodes, time=time, after=after, **options)
        asked = slurm or cluster or time or after or options
        return sweeps.resume(root, again, request=request_of(where, root, time, after, options) if asked else None, gpus=gpus,
                             procs=procs, cpus=cpus, nodes=nodes, parallel=parallel, json=json)
    if task is None:
        raise UserError("`launch sweep` needs a task, a spec or a script", "launch sweep TASK key=a,b, or --resume SWEEP")
    where = cluster_of(slurm, cluster)
    if where.kind == "slurm":
        root = root_of(context, root, where)
    else:
        only_on_slurm(nodes=nodes, time=time, after=after, **options)
    return sweeps.start(words=words, load=lambda words: load(context, task, config, words, where), root=root.absolute(),
                        request=request_of(where, root, time, after, options), gpus=gpus, procs=procs, cpus=cpus,
                        nodes=nodes, parallel=parallel, dry_run=dry_run, json=json)
