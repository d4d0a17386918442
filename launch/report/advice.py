"""What to do next about a run: commands with the values of this run in them, for `launch explain`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import TYPE_CHECKING, Any

from launch.records.run import Run
from launch.records.state import waits_for
from launch.report.causes import GOING, MORE_PATIENCE, RESUME, RESUME_AFTER_FIX, WAITING, Cause
from trainers.config.batching import Batching
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths

if TYPE_CHECKING:
    from launch.plan.submission import Submission

Status = Mapping[str, Any]  # from `launch.records.read.status`


def facts_of(run: Run, status: Status, spec: Mapping[str, Any], attempts: Sequence[Mapping[str, Any]],
           cause: Mapping[str, Any] | None) -> dict[str, str | None]:
    """The values for the templates in causes.py, by name; None where a value is not known or does not apply."""
    from launch.plan.submission import last_submission
    from launch.records.naming import command_name, short_path

    paths, on_slurm = run.paths, (status["job"] or {}).get("kind") == "slurm"
    after = waits_for(run) if on_slurm else None
    try:
        submission = last_submission(paths, status.get("sweep")) if on_slurm else None
    except (OSError, ValueError, UserError):  # the explanation does without a broken submission
        submission = None
    started = next((attempt for attempt in reversed(status["attempts"]) if attempt.get("ranks")), None)
    ranks, option = (started["ranks"], "--gpus" if started["device"] == "cuda" else "--procs") if started else (0, "--procs")
    where = f" {option} {ranks}" if started else ""
    if submission:
        ranks, option = submission.resources.ranks, "--gpus" if submission.resources.gpus else "--procs"
        where = f" {option} {ranks} --nodes {submission.resources.nodes} --cluster {shlex.quote(submission.cluster.name)}"
    train = {} if "script" in spec else spec.get("train") or {}
    given = train.get("micro_batch_size")
    split = Batching.of(ranks, train, spec.get("eval") or {}) if train and ranks else None
    smaller = split.smaller() if split and given != "auto" else None  # `auto` tries smaller micro-batches by itself
    kept = status["checkpoint"]
    repeated = (attempts[-1]["to_step"] or 0) - kept if attempts and kept is not None else 0
    name = command_name(paths)
    return {
        "run": name, "resume": f"launch resume {name}", "folder": shlex.quote(short_path(paths.root)), "where": where,
        "onward": "it does the missing pieces; finished pieces are kept" if "search" in spec else
                  "it starts the script again from its first line; the script loads its own checkpoints, if it keeps any"
                  if "script" in spec else
                  "it has no checkpoint, and starts from the beginning" if kept is None else
                  f"it continues from its checkpoint of step {kept}"
                  + (f" ({repeated} steps are repeated)" if repeated > 0 else ""),
        "stop": "stops it; finished pieces are kept" if "search" in spec else
                "stops it: its ranks get SIGTERM, and run.grace_s to save" if "script" in spec else
                "stops it, with a checkpoint if it is running",
        "new": f"launch {shlex.quote(short_path(paths.spec))}" if train or "search" in spec else None,
        "plan": f"launch plan {shlex.quote(short_path(paths.spec))}" if train else None,
        "smaller": str(smaller) if smaller else None,
        "less_evaluated": f"{split.evaluation_key}={max(1, split.evaluation // 2)}" if split else None,
        "more": f"{option} {2 * ranks}" if split and split.fits(2 * ranks) and not given else None,
        "lower": f"{spec['optim']['lr'] / 3:.2g}" if train else None,
        "grace_s": str(round(3 * spec["run"]["grace_s"])) if "run" in spec else None,
        "hang_s": f"{3 * spec['run']['hang_s']:g}" if (spec.get("run") or {}).get("hang_s") else None,
        "report_s": f"{3 * spec['eval']['report_s']:g}" if (spec.get("eval") or {}).get("report_s") else None,
        "patience": str(2 * train["patience"]) if train.get("patience") else None,
        "cluster": shlex.quote(submission.cluster.name) if submission else None,
        "node": cause["node"] if cause and on_slurm else None,
        "memory": _more_memory(run, status) if submission else None, "time": _more_time(submission) if submission else None,
        "jobs": " ".join(job_ids(status)), "after": shlex.quote(command_name(after)) if after else None,
    }


def _more_memory(run: Run, status: Status) -> str:
    """The option that asks sbatch for twice the memory of the last submission."""
    folders = [run.paths, RunPaths(run.paths.root.parent / (status.get("sweep") or run.id))]
    files = [paths.submission(status["job"]["submission"]) / "job.sh" for paths in folders]
    scripts = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files if file.exists())
    asked = re.search(r"^#SBATCH --(mem|mem-per-cpu)=(\d+)([KMGT]?)$", scripts, re.MULTILINE)
    return f"sbatch.{asked[1]}={2 * int(asked[2])}{asked[3]}" if asked else "sbatch.mem=SIZE"


def _more_time(submission: Submission) -> str:
    """Twice the time limit of a submission."""
    from launch.cluster.times import seconds, slurm_time

    return slurm_time(2 * seconds(submission.time or submission.cluster.time))


def next_steps(status: Status, cause: Mapping[str, Any] | None, kind: Cause | None, facts: Mapping[str, str | None]
          ) -> list[dict[str, str | None]]:
    """The commands to run next, each with the reason."""
    advice = kind.advice if kind else ()
    if status["state"] == "finished":
        return _steps_of([MORE_PATIENCE], facts) if status.get("stopped_early") else []
    if not any(" resume " in command for command in status["next"]):  # the run continues by itself, or may do so
        reason = (status["queue"] or {}).get("reason") or ""
        advice = (*(step for pattern, step in WAITING if re.match(pattern, reason)), *GOING)
    return _steps_of(advice, facts) or _steps_of([RESUME_AFTER_FIX if cause else RESUME], facts)


def _steps_of(advice: Sequence[tuple[str, str]], facts: Mapping[str, str | None]) -> list[dict[str, str | None]]:
    """The commands of `advice` whose facts are all known, each once."""
    reasons_by_command: dict[str, str] = {}
    for template, why in advice:
        command, reason = filled(template, facts), filled(why, facts)
        if command and reason:
            reasons_by_command.setdefault(command, reason)
    return [{"command": command, "why": why} for command, why in reasons_by_command.items()]


def filled(template: str, facts: Mapping[str, str | None], match: re.Match[str] | None = None) -> str | None:
    """The template with the facts, and the groups of `match`, in place of its braces; None if a fact is not known."""
    names = [name for _, name, _, _ in Formatter().parse(template) if name and not name.isdigit()]
    if any(facts.get(name) is None for name in names):
        return None
    return template.format(*(match.groups() if match else ()), **facts)


def job_ids(status: Status) -> list[str]:
    """The ids of the last submission's jobs; empty for a local run."""
    return (status["job"] or {}).get("ids") or []
