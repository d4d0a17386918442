"""Predict: write one row for each line of text, or for each sample of a run's evaluation set, from the weights of a run.

A prediction is a run of its own, in `evals/` of the run's folder, as an evaluation is. On this machine its folder goes when the
prediction ends, and stays only if a rank has failed: the folder then has the rank's log.
"""

from __future__ import annotations

import codecs
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from launch.cluster.config import load_cluster
from launch.cluster.resources import Wanted
from launch.execute import record
from launch.execute.evaluate import evaluation_spec, resources_like
from launch.execute.local import execute, plan_here, ranks_text
from launch.plan.initial_weights import warn_of_broken
from launch.plan.job_script import Request
from launch.plan.spec import Spec, with_values
from launch.records.naming import new_run_id, short_path
from launch.records.run import Run
from launch.supervise.rank import Failure
from launch.supervise.terminal import make_view
from trainers.config.schema import RunConfig
from trainers.contract import exit_codes
from trainers.contract.errors import UserError, system_error
from trainers.contract.paths import RunPaths

STDIN = "-"


@dataclass(frozen=True)
class Question:
    """What is predicted, and where the rows go."""

    files: Sequence[str]                  # of lines, one after the other; `-` is standard input; none: standard input
    set: Literal["eval", "test"] | None   # the run's own evaluation set or test set, in place of lines
    format: Literal["text", "json"]
    output: Path | None                   # appears whole or not at all; None: standard output

    def check(self) -> None:
        """Raise a UserError if there is no input, or too much of it, or if the output cannot be a file."""
        if self.set and self.files:
            raise UserError(f"--set {self.set} predicts the run's own data, and takes no files", "leave out --set, or the files")
        if not self.set and (not self.files or STDIN in self.files) and sys.stdin.isatty():
            raise UserError("`launch predict` reads lines from standard input, which is a terminal",
                            "launch predict RUN FILE, or launch predict RUN < FILE, or launch predict RUN --set eval")
        for file in self.files:
            if file != STDIN and not Path(file).exists():
                raise UserError(f"there is no file `{file}`", "give files of lines, or key=value")
        if self.output is None:
            return
        folder = self.output.absolute().parent
        if self.output.exists() and not self.output.is_file():
            raise UserError(f"`-o {self.output}` is not a file", "leave out -o to write to standard output")
        if not folder.is_dir():
            raise UserError(f"the folder of `-o {self.output}` does not exist", f"mkdir -p {self.output.parent}")
        if not os.access(folder, os.W_OK):
            raise UserError(f"the folder of `-o {self.output}` cannot be written", "choose another file")

    @property
    def only_file(self) -> Path | None:
        """The one file that ranks can read where it lies; None: the lines must be gathered into a file."""
        alone = len(self.files) == 1 and self.files[0] != STDIN and Path(self.files[0]).is_file()
        return Path(self.files[0]).absolute() if alone else None

    def spec(self, spec: Spec, lines: Path | None) -> Spec:
        """The spec of the prediction, from the spec of an evaluation. `lines`: the file of lines."""
        rows: dict[str, Any] = {"format": self.format, "lines": lines and str(lines), "set": self.set or "eval",
                                "output": self.output and str(self.output.resolve())}
        return replace(with_values(spec, {"eval": {**spec.values["eval"], "rows": rows}}), weights=spec.weights)


def predict(run: Run, question: Question, *, which: str | None, init: Mapping[str, Any] = {}, overrides: Sequence[str],
            wanted: Wanted) -> int:
    """Predict on this machine. Returns the exit code. Standard output gets rows, or nothing.

    Args:
        which, init, wanted: as in an evaluation.

    Raises:
        UserError: the user must fix something; nothing was written.
    """
    question.check()
    spec = evaluation_spec(run, which, overrides, init)
    warn_of_broken([spec])
    assert spec.weights
    run_id, root = new_run_id(spec.name), run.paths.evaluations.absolute()
    paths = RunPaths(root / run_id)
    lines = None if question.set else question.only_file or paths.lines
    resources, cwd = resources_like(run, spec, wanted)
    if lines is not None:  # the lines may hold relative paths
        cwd = Path.cwd()
    spec = question.spec(spec, lines)
    assert isinstance(spec.config, RunConfig)  # only a run with steps has checkpoints
    spec.config.check()
    plan_of = partial(plan_here, run_id, spec, load_cluster("local"), resources, root, cwd)
    plan = plan_of(1)
    kept = False
    try:
        record.create_run(plan)
        if lines is not None and _gather(question.files, lines, copy=lines == paths.lines) == 0:
            _write_nothing(question.output)
            return exit_codes.FINISHED
        view = make_view(json=False, stream=sys.stderr)
        try:
            view.notice(f"predicting with {spec.weights}: {ranks_text(resources)}")
            outcome, code = execute(plan_of, paths, 1, view, plan.max_restarts)
        finally:
            view.close()
        if outcome.failure:
            kept = code == exit_codes.FAILED
            _print_failure(outcome.failure, paths, kept)
            return code
        if outcome.kind != "finished":
            print("stopped: no rows were written", file=sys.stderr)
            return exit_codes.KILLED
        if question.output is None:
            sys.stdout.flush()
            with open(paths.rows, "rb") as rows:
                shutil.copyfileobj(rows, sys.stdout.buffer)
            sys.stdout.flush()
        return exit_codes.FINISHED
    finally:
        if not kept:
            shutil.rmtree(paths.root, ignore_errors=True)
            with suppress(OSError):  # other evaluations are there
                root.rmdir()


def submit(run: Run, question: Question, *, which: str | None, init: Mapping[str, Any] = {}, overrides: Sequence[str],
           request: Request, wanted: Wanted, show_log: Callable[[Run], None] | None) -> int:
    """Submit the prediction to SLURM. Its folder stays, as that of an evaluation. Returns the exit code.

    Raises:
        UserError: the user must fix something; nothing was written or submitted.
    """
    from launch.execute import on_slurm

    question.check()
    if question.output is None:
        raise UserError("a prediction on SLURM ends after this command, so its rows need a file", "add -o FILE")
    lines = None if question.set else question.only_file
    if lines is None and not question.set:
        raise UserError("a prediction on SLURM reads its lines when its job starts, so they must lie in one file",
                        "launch predict RUN FILE -o ROWS --slurm")
    spec = question.spec(evaluation_spec(run, which, overrides, init), lines)
    if lines is not None and _gather(question.files, lines, copy=False) == 0:
        _write_nothing(question.output)
        return exit_codes.FINISHED
    return on_slurm.start(spec=spec, root=run.paths.evaluations.absolute(), request=request, wanted=wanted, dry_run=False,
                          json=False, show_log=show_log, here=False)


def _gather(files: Sequence[str], target: Path, copy: bool) -> int:
    """Check that the input is UTF-8, and return the number of its lines.

    Args:
        target: if `copy` is true, the file that gets the lines of all files. A file that does not end with a line end gets one.

    Raises:
        UserError: a file cannot be read, or a line is not valid UTF-8.
    """
    count = 0
    try:
        with open(target, "wb") if copy else nullcontext() as written:
            for name in files or [STDIN]:
                with nullcontext(sys.stdin.buffer) if name == STDIN else open(name, "rb") as file:
                    count += _copy_lines(file, name, written)
    except OSError as error:
        raise system_error(error) from error
    return count


def _copy_lines(file: IO[bytes], name: str, target: IO[bytes] | None) -> int:
    number = 0
    for number, line in enumerate(file, 1):  # only `\n` ends a line of bytes
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            where = "standard input" if name == STDIN else f"`{name}`"
            raise UserError(f"line {number:,} of {where} is not valid UTF-8",
                            "convert the text, for example: iconv -f GB18030 -t UTF-8") from None
        if target is not None:
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            target.write(line if line.endswith(b"\n") else line + b"\n")
    return number


def _write_nothing(output: Path | None) -> None:
    """Write the rows of an empty input."""
    if output is not None:
        try:
            output.write_bytes(b"")
        except OSError as error:
            raise system_error(error) from error


def _print_failure(failure: Failure, paths: RunPaths, kept: bool) -> None:
    """Tell the user why the prediction failed. `kept`: whether its folder stays, with the logs."""
    if failure.traceback and failure.rank != 0:  # the output of rank 0 is on the terminal already
        print(failure.traceback, file=sys.stderr)
    hint = failure.hint
    if not hint and kept and failure.rank is not None:
        hint = f"its log is {short_path(paths.log(paths.attempt_numbers()[-1], failure.rank))}"
    print(UserError(failure.message, hint), file=sys.stderr)
