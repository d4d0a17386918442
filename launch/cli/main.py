"""The command line: parse, call, print. No logic.

What is heavy to import (pydantic, ruamel.yaml, rich) is imported by the command that needs it, so that
`launch --help` answers in a blink.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from types import SimpleNamespace

import click

from launch.cli.inspect import COMMANDS as INSPECTING
from launch.cli.options import (
    Script,
    no_such,
    refuse_script_args,
    verbose_option,
)
from launch.cli.run import COMMANDS as RUNNING
from launch.cli.run import task_command
from launch.plan import spec as specs
from trainers.contract import exit_codes
from trainers.contract.errors import UserError

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
        return _fail(_usage(error), exit_codes.USER_ERROR, asked.verbose)
    except (click.Abort, KeyboardInterrupt):
        return exit_codes.KILLED
    except BrokenPipeError:  # `launch runs | head`: whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.FAILED
    except Exception as error:
        hint = None if asked.verbose else "--verbose shows the traceback"
        return _fail(UserError(f"{type(error).__name__}: {error}", hint), exit_codes.FAILED, asked.verbose)


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


# Words: commands, tasks, files


class Words(click.Group):
    """`launch WORD`: a command, else a built-in task, else a file."""

    def get_command(self, ctx: click.Context, word: str) -> click.Command | None:
        if command := self.commands.get(word):
            return command
        if path := specs.tasks().get(word):
            return task_command(word, specs.description(path) + ".")
        if specs.is_spec(word) and os.path.exists(word):
            return task_command(word, "A spec of your own.")
        if os.path.exists(word):
            return task_command(word, "A script of your own; what follows `--` is for it.", Script)
        return None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str, click.Command, list[str]]:
        word, *rest = args
        command = self.get_command(ctx, word)
        if command is None:
            raise no_such(word, [*self.commands, *specs.tasks()])
        if word in self.commands and word not in ("show", "sweep"):
            refuse_script_args(ctx, word)
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


for each in (*INSPECTING, *RUNNING):
    cli.add_command(each)
