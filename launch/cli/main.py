"""The `launch` command: parse the words, call a function, print errors. No logic.

Each command imports slow modules (pydantic, ruamel.yaml, rich) only when it runs, so that `launch --help` answers at once.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Sequence

import click

from launch.cli.inspect import COMMANDS as INSPECTING
from launch.cli.options import Globals, Script, is_module, no_such, refuse_script_args, verbose_option
from launch.cli.run import COMMANDS as RUNNING
from launch.cli.run import task_command
from launch.plan import spec as specs
from trainers.contract import exit_codes
from trainers.contract.errors import UserError, system_error

MODULE = "Run a module of your own, as `python -m` does. Words after `--` are its arguments."
EXAMPLES = """\b
launch cifar10 data=sample train.steps=100 --procs 1
launch cifar10 --gpus 2 optim.lr=0.2 --wandb online
launch train.py --gpus 2 -- --lr 1e-3"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, print its errors, and return the exit code.

    Args:
        argv: the words after `launch`; None: those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    settings = Globals()
    if "--" in words:
        cut = words.index("--")
        words, settings.script_args = words[:cut], words[cut + 1:]
    if words[:1] == ["-m"]:
        words = words[1:]
        settings.module = words[0] if words else ""
    try:
        _check_folder()
        if settings.module == "":
            raise UserError("`-m` needs the name of a module", "launch -m pkg.train")
        code = cli.main(words or ["--help"], prog_name="launch", obj=settings, standalone_mode=False) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        return _fail(error, error.exit_code, settings.verbose)
    except click.UsageError as error:
        return _fail(_usage(error), exit_codes.USER_ERROR, settings.verbose)
    except (click.Abort, KeyboardInterrupt):
        return exit_codes.KILLED
    except BrokenPipeError:  # the reader closed the pipe, as in `launch runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.FAILED
    except OSError as error:
        return _fail(system_error(error), exit_codes.USER_ERROR, settings.verbose)
    except Exception as error:
        hint = None if settings.verbose else "add --verbose to see the traceback"
        return _fail(UserError(f"{type(error).__name__}: {error}", hint), exit_codes.FAILED, settings.verbose)


def _check_folder() -> None:
    """Raise an error if the working folder was deleted. Every relative path, such as `./runs`, would fail without a reason."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError("the working folder no longer exists", "use `cd` to go to another folder") from error


def _fail(error: UserError, code: int, verbose: bool) -> int:
    """Print the error that is being handled, and return `code`."""
    if verbose:
        traceback.print_exc()
    print(UserError(" ".join(error.message.splitlines()), error.hint), file=sys.stderr)
    return code


def _usage(error: click.UsageError) -> UserError:
    """An error of click's in the words of this command line."""
    if isinstance(error, click.BadOptionUsage):
        what = "needs a value" if "requires" in error.message else "takes no value"
        return UserError(f"`{error.option_name}` {what}", _see_help(error.ctx) if error.ctx else None)
    context = error.ctx
    if context is None:
        return UserError(error.message.rstrip("."))
    path, hint = context.command_path, _see_help(context)
    match error:
        case click.NoSuchOption():
            if near := difflib.get_close_matches(error.option_name.lstrip("-"), _options(context), n=1):
                hint = f"did you mean `--{near[0]}`?"
            elif isinstance(context.command, click.Group):
                hint = f"give options after the command or task: `launch TASK {error.option_name} ...`"
            elif isinstance(context.command, Script):
                hint = f"give the script's own options after `--`: `{path} -- {error.option_name} ...`"
            elif "slurm" in _options(context):
                hint += f"; for an option of sbatch, use sbatch.{error.option_name.lstrip('-')}=VALUE"
            return UserError(f"`{path}` has no option `{error.option_name}`", hint)
        case click.MissingParameter() if error.param is not None:
            return UserError(f"`{path}` needs {error.param.make_metavar(context)}", hint)
        case click.BadParameter() if error.param is not None:
            name = error.param.opts[0] if isinstance(error.param, click.Option) else error.param.make_metavar(context)
            return UserError(f"`{name}`: {error.message.rstrip('.')}", hint)
    if isinstance(context.command, click.Group):
        commands = context.command.list_commands(context)
        if error.message.startswith("Missing command"):
            return UserError(f"`{path}` needs a command", f"use one of {', '.join(commands)}")
        if unknown := re.match(r"No such command '(.*)'", error.message):
            near = difflib.get_close_matches(unknown[1], commands, n=1)
            return UserError(f"`{path}` has no command `{unknown[1]}`",
                             f"did you mean `{near[0]}`?" if near else f"use one of {', '.join(commands)}")
    return UserError(error.message.rstrip("."), hint)


def _see_help(context: click.Context) -> str:
    return f"see `{context.command_path} --help`"


def _options(context: click.Context) -> list[str]:
    """The names of a command's long options, without dashes. The dashes would make all names look similar to difflib."""
    return [name[2:] for option in context.command.get_params(context) for name in option.opts if name.startswith("--")]


# Words: commands, tasks, files


class Words(click.Group):
    """The group behind `launch WORD`.

    A word is looked up as a command, then as a built-in task, a file, and a module. After `-m` it is a module.
    """

    def get_command(self, ctx: click.Context, word: str) -> click.Command | None:
        settings = ctx.find_object(Globals)
        if settings and settings.module == word:
            return task_command(word, MODULE, Script)
        if command := self.commands.get(word):
            return command
        if path := specs.tasks().get(word):
            return task_command(word, specs.description(path) + ".")
        if specs.is_spec(word) and os.path.exists(word):
            return task_command(word, "Run the task that this spec describes.")
        if os.path.exists(word):
            return task_command(word, "Run a script of your own. Words after `--` are its arguments.", Script)
        if is_module(word):
            return task_command(word, MODULE, Script)
        return None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str, click.Command, list[str]]:
        word, *rest = args
        command = self.get_command(ctx, word)
        if command is None:
            raise no_such(word, [*self.commands, *specs.tasks()])
        if command is self.commands.get(word) and word not in ("show", "sweep"):
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


def _print_version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if not value:
        return
    from importlib.metadata import version

    print(version("launch-training"))
    context.exit()


@click.group(cls=Words, params=[verbose_option()], subcommand_metavar="WORD [ARGS]...",
             help="Run WORD: a built-in task, a spec file of your own (.yaml), a Python script, a module (-m WORD), or one of "
             "the commands below.\n\n"
             + EXAMPLES)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, help="Print the version.", callback=_print_version)
def cli() -> None:
    pass


for made in (*INSPECTING, *RUNNING):
    cli.add_command(made)
