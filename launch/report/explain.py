"""Explain what happened to a run: the first rank that failed, and what SLURM reports. `advice` says what to do next."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cluster import reasons
from launch.records import verdicts
from launch.records.read import node_logs, node_of, slow_words
from launch.records.read import status as status_of
from launch.records.requeue import REQUEUE, code_of_head
from launch.records.run import Run
from launch.records.state import ACTIVE, UNREACHABLE, job_folder
from launch.report import advice
from launch.report.causes import CAUSES, Cause
from trainers.contract.clock import local_time, seconds_between, utc_at, utc_now
from trainers.contract.errors import UserError
from trainers.contract.files import read_json
from trainers.contract.paths import RunPaths
from trainers.contract.text import duration, last_traceback

if TYPE_CHECKING:
    pass

END_BYTES = 256 * 1024   # read from the end of a log
BEGIN_BYTES = 64 * 1024  # read from the beginning of a log
TRACE_LINES = 15         # the last lines of a traceback that are shown
LOG_LINES = 8            # the last lines of a log that are shown if it has no traceback
LINE_CHARS = 500         # of each of them: a progress bar, or data without line ends, may print millions
SLURM_LINES = 5          # the last of SLURM's lines in a job's log that are shown
SILENT_S = 300.0         # a run without output for longer than this is reported as silent

BEGAN = re.compile(r"^(?:(?:training from|resuming at) step|(?:from|resuming at) fit) (\d+) of ", re.MULTILINE)
STEP = re.compile(r"^(?:step|fit|eval|(?:finished|preempted) at (?:step|fit)) (\d+)/\d+", re.MULTILINE)
SPEED = re.compile(r"^(?:step|fit) \d+/\d+ .*?([\d,.]+ \w+/s) .*eta (\S+)$", re.MULTILINE)
BY_SLURM = re.compile(r"^(?:srun|slurmstepd[^:]*|.*/slurm_script): .*", re.MULTILINE)
NOISE = re.compile(r"lacks support for cpu binding|Exited with exit code|got SIGCONT|Job step aborted|Terminating StepId")
ENDED = {"running": "is running", "preempted": "stopped", "lost": "was lost", "cancelled": "was cancelled"}

Status = Mapping[str, Any]  # from `launch.records.read.status`


def explain(run: Run) -> dict[str, Any]:
    """What happened to a run, and why, as a JSON object. SLURM may be unreachable: no error is raised.

    - `id`, `state`, `step`, `total`, `note` (a remark on the state, or None), and a summary in one `sentence`
    - `cause`: the first rank that failed, or the failure of the job; None if nothing has failed: {"message", "meaning",
      "attempt", "rank", "node", "exit_code", "signal", "hint", "log" (a path), "traceback" or "log_end" (lines)}; unknown
      values are None
    - `slurm`: {"problem" (why SLURM could not be asked, or None), "jobs" (the run's ended jobs that SLURM remembers),
      "forgotten" (ids of jobs that SLURM does not know any more), "nodes" (of a lost attempt: the nodes that are down, and
      their states), "said" (SLURM's lines in the job's log), "queue" (as in `launch.records.read.status`)}
    - `attempts`: for each attempt {"attempt", "outcome", "why", "nodes", "job", "began", "ended", "seconds", "from_step",
      "to_step", "kept" (what a stopped or cancelled attempt kept: "checkpoint", or "pieces" for a search), "checkpoint" (the
      step of the newest checkpoint at its end), "next_step" (where the next attempt continued), "lost_steps" (the steps that
      the next attempt repeated), "next_s" (seconds until the next attempt started)}; unknown values are None
    - `next`: [{"command", "why"}, ...]
    """
    status = status_of(run)
    spec = _spec(run.paths)
    attempts = _attempts(run.paths, status, "script" in spec)
    slurm = _slurm(run, status)
    cause = _cause(run, status, slurm)
    facts = advice.facts_of(run, status, spec, attempts, cause)
    kind = None
    if cause and (known := _match(_text(cause, slurm))):
        kind, match = known
        cause["meaning"] = advice.filled(kind.meaning, facts, match)
        if cause["exit_code"] is None:  # then the hint does not come from a rank, and only repeats the meaning
            cause["hint"] = None
    elif cause and status["state"] in ACTIVE:  # nothing failed: the first attempt has not started yet
        cause = None
    sentence = _sentence(run, status, attempts, cause, "script" in spec)
    return {"id": run.id, **{key: status[key] for key in ("state", "step", "total", "note")}, "sentence": sentence,
            "cause": cause, "slurm": slurm, "attempts": attempts, "next": advice.next_steps(status, cause, kind, facts)}


def told(explanation: Mapping[str, Any]) -> str:
    """An explanation from `explain` as text for a person."""
    cause, slurm = explanation["cause"] or {}, explanation["slurm"]
    log_lines = cause.get("traceback") or cause.get("log_end") or []
    rows = [("cause", cause.get("meaning")), ("hint", cause.get("hint")), ("log", cause.get("log"))]
    rows += [("log", f"  {line}") for line in log_lines]
    rows += [("slurm", slurm["problem"] and f"cannot be asked: {slurm['problem']}")]
    rows += [("slurm", _ended_job(job)) for job in slurm["jobs"]]
    rows += [("slurm", f"no longer knows job {id}") for id in slurm["forgotten"]]
    rows += [("slurm", f"node {node} is {state}") for node, state in slurm["nodes"].items()]
    rows += [("slurm log", line) for line in slurm["said"] if line not in log_lines]
    rows += [(f"attempt {attempt['attempt']}", _attempt(attempt)) for attempt in explanation["attempts"]]
    for step in explanation["next"]:
        rows += [("next", step["command"]), ("", f"  {step['why']}")]
    rows = [(label, text) for label, text in rows if text and text not in explanation["sentence"]]
    # Each label is shown once, in its first row.
    shown = [(label if label not in [before for before, _ in rows[:i]] else "", text) for i, (label, text) in enumerate(rows)]
    return "\n".join([f"{explanation['id']}: {explanation['sentence']}", *([""] if rows else []),
                      *(f"{label:<12}{text}".rstrip() for label, text in shown)])


# The attempts


def _attempts(paths: RunPaths, status: Status, script: bool) -> list[dict[str, Any]]:
    """The `attempts` of `explain`. The steps of a script are not known, whatever its log looks like."""
    rows, search = [], paths.pieces.exists()
    for record in status["attempts"]:
        number, log = record["attempt"], paths.log(record["attempt"], 0)
        newest = record is status["attempts"][-1]
        first, last = (None, None) if script else _steps(log)
        if last is not None and number == status["attempt"]:
            last = max(last, status["step"] or 0)
        checkpoint = record["kept"] if record.get("kept") is not None and not search else status["checkpoint"] if newest else None
        kept = None if record["outcome"] not in ("preempted", "cancelled") else "pieces" if search else (
            "checkpoint" if checkpoint is not None else None)
        running = record["outcome"] == "running"
        ended = record.get("ended") or (None if running else _changed(log))
        failure = record.get("failure")
        rows.append({
            "attempt": number, "outcome": record["outcome"], "why": _failure(failure) if failure else record.get("reason"),
            "nodes": record.get("nodes") or [], "job": record.get("job"), "began": record.get("began"), "ended": ended,
            "seconds": seconds_between(record.get("began"), ended), "from_step": first, "to_step": last,
            "kept": kept, "checkpoint": checkpoint,
            "next_step": None, "lost_steps": None, "next_s": None,
        })
    for row, later in zip(rows, rows[1:]):
        row |= {"next_step": later["from_step"], "next_s": seconds_between(row["ended"], later["began"])}
        if row["to_step"] is not None and later["from_step"] is not None:
            row["lost_steps"] = max(0, row["to_step"] - later["from_step"])
    return rows


def _steps(log: Path) -> tuple[int | None, int | None]:
    """(first step, last step) of an attempt, as the log of its rank 0 shows them; None where the log shows none."""
    began = BEGAN.search(_read(log, BEGIN_BYTES))
    first = int(began[1]) if began else None
    logged = STEP.findall(_read(log, -END_BYTES))
    return first, int(logged[-1]) if logged else first


def _failure(failure: Mapping[str, Any]) -> str:
    """A failure in words, such as 'rank 3 on node n2 was ended by SIGKILL'."""
    message, rank, node = failure.get("message") or "the reason is not known", failure.get("rank"), failure.get("node")
    if rank is None:
        return message
    who = f"rank {rank}" + (f" on node {node}" if node else "")
    return who + message.removeprefix(f"rank {rank}") if message.startswith(f"rank {rank} ") else f"{who}: {message}"


def _outcome(row: Mapping[str, Any]) -> tuple[str, str]:
    """(how an attempt ended, what the attempt kept as the last part of the sentence), in words."""
    ended = ENDED.get(row["outcome"], row["outcome"])
    if row["outcome"] == "preempted" and row["kept"] == "checkpoint":
        if row["to_step"] in (None, row["checkpoint"]):
            return f"{ended} with a checkpoint", ""
        return ended, f"; its newest checkpoint is of step {row['checkpoint']}"
    return ended, "; its finished pieces are kept" * (row["kept"] == "pieces")


def _attempt(row: Mapping[str, Any]) -> str:
    """One of the `attempts` of `explain` in words."""
    line, kept = _outcome(row)
    line += f" after {duration(row['seconds'])}" if row["seconds"] is not None else ""
    line += f" at step {row['to_step']}" if row["to_step"] is not None else ""
    line += f" (from {row['from_step']})" if row["from_step"] else ""
    line += f" on {', '.join(row['nodes'])}" if row["nodes"] else ""
    line += (f": {row['why']}" if row["why"] else "") + kept
    if row["lost_steps"] is not None:
        line += f"; the next attempt continued at step {row['next_step']}"
        line += f", {duration(row['next_s'])} later" if row["next_s"] is not None else ""
        line += f", {row['lost_steps']} step(s) repeated" if row["lost_steps"] else ", no step lost"
    return line


# What SLURM reports


def _slurm(run: Run, status: Status) -> dict[str, Any]:
    """The part `slurm` of `explain`."""
    report: dict[str, Any] = {"problem": None, "jobs": [], "forgotten": [], "nodes": {}, "said": [], "queue": status["queue"]}
    attempts, ids = status["attempts"], advice.job_ids(status)
    if not ids or status["state"] in ("finished", "running", "cancelled"):
        return report
    from launch.cluster import slurm

    lines = [line for line in BY_SLURM.findall(_last_output(run, status)) if not NOISE.search(line)]
    report["said"] = list(dict.fromkeys(lines))[-SLURM_LINES:]
    ended = verdicts.known(run, {})
    try:
        queued, seen = slurm.look(ids)
        gone = [id for id in ids if id not in queued and id not in seen]
        ended = verdicts.known(run, seen | slurm.accounted(gone) if gone else seen)
        report["forgotten"] = [id for id in gone if id not in ended]
        if attempts and attempts[-1]["outcome"] == "lost":
            states = slurm.node_states(attempts[-1].get("nodes") or ())
            report["nodes"] = {node: ", ".join(filter(None, state)) for node, state in states.items()
                               if not slurm.takes_jobs(state[0])}
    except UserError as error:
        report["problem"] = error.message
    report["jobs"] = [{**asdict(end), "words": reasons.of_end(end.reason, end.signal)} for end in ended.values()]
    return report


def _spec(paths: RunPaths) -> dict[str, Any]:
    """The run's spec, with what a resumption has changed; empty if it cannot be read."""
    from trainers.config import yaml12

    try:
        spec = yaml12.read(paths.spec.read_text(encoding="utf-8"), paths.spec.name).value or {}
        if paths.changes.exists():
            spec |= {section: {**spec.get(section, {}), **keys} for section, keys in read_json(paths.changes).items()
                     if isinstance(spec.get(section, {}), dict)}
        return spec
    except (OSError, ValueError, UserError):
        return {}


def _last_output(run: Run, status: Status) -> str:
    """The log of the head node in the last job, from the start of the last attempt. It holds SLURM's own lines too."""
    logs = [log for log in node_logs(run) if log.job in advice.job_ids(status)]
    text = "\n".join(_read(log.path, -END_BYTES) for log in logs if log.job == logs[-1].job and log.node == 0)
    return text[max((mark.start() for mark in re.finditer(r"^attempt \d+ of ", text, re.MULTILINE)), default=0):]


def _ended_job(job: Mapping[str, Any]) -> str:
    """How a job ended, in words."""
    line = f"job {job['id']} ended as {job['state']}" + (f" on {job['node_list']}" if job["node_list"] else "")
    line += f", exit code {job['exit_code']}" if job["exit_code"] else f", signal {job['signal']}" if job["signal"] else ""
    return line + (f": {job['words']}" if job["words"] else "")


# The cause


def _cause(run: Run, status: Status, slurm: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `cause` of `explain`, still without its meaning."""
    keys = ("message", "meaning", "attempt", "rank", "node", "exit_code", "signal", "hint", "log", "traceback", "log_end")
    cause: dict[str, Any] = dict.fromkeys(keys)
    if status["state"] in ("finished", "running", "cancelled"):
        return None
    submission = (status["job"] or {}).get("submission")
    attempts = [attempt for attempt in status["attempts"]
                if submission is None or attempt.get("submission", submission) == submission]
    if not attempts:
        waits = status["queue"]["reason"] if status["queue"] else status["state"] in ACTIVE
        return None if waits else cause | {"message": _no_attempt(slurm)} | _job_log(run, status)
    attempt = attempts[-1]
    if attempt["outcome"] not in ("failed", "lost"):
        return None
    failure = attempt.get("failure") or {"message": _unrecorded(run, attempt, slurm)}
    failure = _first(run.paths, attempt, failure) or failure
    rank = failure.get("rank")
    node = failure.get("node") or node_of(attempt, rank)
    cause |= {key: failure.get(key) for key in ("rank", "exit_code", "signal", "hint")}
    cause |= {"attempt": attempt["attempt"], "node": node, "message": _failure({**failure, "node": node})}
    log = run.paths.log(attempt["attempt"], rank or 0)
    text = _read(log, -END_BYTES)
    cause["log"] = str(log) if log.exists() else None
    if trace := failure.get("traceback") or (last_traceback(text) if rank is not None else None):
        return cause | {"traceback": trace.splitlines()[-TRACE_LINES:]}
    if advice.job_ids(status) and (rank is None or not log.exists()):
        return cause | _job_log(run, status, node)
    return cause | {"log_end": _last_lines(text.rstrip().splitlines()) or ["(the log is empty)"] * log.exists()}


def _first(paths: RunPaths, attempt: Mapping[str, Any], failure: Mapping[str, Any]) -> dict[str, Any] | None:
    """The failure of another rank, if the recorded rank failed only because it lost that rank; else None."""
    kind = _match(f"{failure.get('message')}\n{failure.get('traceback')}\n{failure.get('signal')}")
    if failure.get("rank") is None or not kind or not kind[0].consequence:
        return None
    for rank, log in paths.logs(attempt["attempt"]).items():
        text = _read(log, -END_BYTES)
        trace = last_traceback(text)
        last_error = re.findall(r"^error: (.*)", text, re.MULTILINE)[-1:] or (trace or "").splitlines()[-1:]
        other = _match(last_error[0]) if last_error else None
        if rank != failure["rank"] and last_error and not (other and other[0].consequence):
            return {"rank": rank, "message": f"rank {rank} ended with {last_error[0]}", "traceback": trace}
    return None


def _no_attempt(slurm: Mapping[str, Any]) -> str:
    """The message for a job without an attempt. causes.py has a pattern for it."""
    if queue := slurm["queue"]:
        return f"job {', '.join(queue['ids'])} runs on {', '.join(queue['nodes'])}, and no attempt has started"
    if not slurm["jobs"]:
        return "its job ended before the first attempt started"
    job = slurm["jobs"][-1]
    return f"{_ended_job({**job, 'words': ''})}, before the first attempt started"


def _unrecorded(run: Run, attempt: Mapping[str, Any], slurm: Mapping[str, Any]) -> str:
    """The message for an attempt that ended without a record of its failure."""
    if origin := run.record.get("copy_of"):
        return f"the folder was copied from run {origin} while this attempt ran there"
    if down := [f"node {node} is down ({state})" for node, state in slurm["nodes"].items()]:
        return ", ".join(down)
    nodes = attempt.get("nodes") or []
    code = attempt.get("job") and code_of_head(job_folder(run, attempt), attempt["job"], attempt.get("restart", 0))
    if code:  # the words are those of `record_lost_attempts`, which will record them
        return ("it stopped at the time limit, but its record could not be written" if code == str(REQUEUE) else
                f"the node process on {nodes[0] if nodes else attempt['host']} was killed")
    said = reasons.of_stop("\n".join(slurm["said"]))
    if said and said != reasons.REQUEUED:
        return said
    ended = next((job["words"] for job in reversed(slurm["jobs"]) if job["words"]), None)
    return ended or "its processes are gone, and the reason is not known"


def _job_log(run: Run, status: Status, node: str | None = None) -> dict[str, Any]:
    """The end of a node process's log in the last job, as {"log", "log_end"}: the log of `node`, or else of the head node."""
    logs = [log for log in node_logs(run) if log.job in advice.job_ids(status)]
    nodes = (status["attempts"] or [{}])[-1].get("nodes") or []
    logs = [log for log in logs if log.job == logs[-1].job]
    chosen = [log for log in logs if node in nodes and log.node == nodes.index(node)] or logs
    if not chosen:
        return {"log_end": ["there is no log: no node could write to the run's folder"]} if advice.job_ids(status) else {}
    lines = [line for line in _read(chosen[0].path, -END_BYTES).splitlines() if not NOISE.search(line)]
    return {"log": str(chosen[0].path), "log_end": _last_lines(lines) or ["(the log is empty)"]}


def _text(cause: Mapping[str, Any], slurm: Mapping[str, Any]) -> str:
    """All texts that may show a known cause, in lines."""
    states = [f"state {job['state']} signal {job['signal']}" for job in slurm["jobs"]]
    parts = [cause["message"], cause["signal"], *(cause["traceback"] or cause["log_end"] or ()), *slurm["said"], *states]
    return "\n".join(filter(None, parts))


def _match(text: str) -> tuple[Cause, re.Match[str]] | None:
    """The first known cause that the text shows, and the match of its pattern."""
    return next(((cause, match) for cause in CAUSES if (match := re.search(cause.pattern, text))), None)


# The sentence


def _sentence(run: Run, status: Status, attempts: Sequence[Mapping[str, Any]], cause: Mapping[str, Any] | None, script: bool
              ) -> str:
    """The state of the run and the reason for it, in one sentence."""
    state, note, last = status["state"], status["note"], attempts[-1] if attempts else None
    where = "" if last is None or last["to_step"] is None else f" at step {last['to_step']}"
    where += f" in attempt {last['attempt']}" if last else ""
    why = cause["message"] if cause else last["why"] if last else None
    if status["queue"] and status["queue"]["reason"]:
        if last is None:
            return _waits(run, status)
        ended, kept = _outcome(last)
        return f"{_waits(run, status)}; it {ended}{where}{f': {why}' if why else ''}{kept}"
    match state:
        case "finished":
            early = run.record.get("stopped_early")
            return state + where + (f": it stopped early, because {early}" if early else "")
        case "running":
            return _runs(run, status, last, script)
        case "submitted":
            queue = status["queue"]
            job = f"job {', '.join(queue['ids'])} has started on {', '.join(queue['nodes'])}" if queue else "it is submitted"
            return note or job + (f", but {cause['meaning']}" if cause else ", and no attempt has started yet")
        case "cancelled":
            kept = status["checkpoint"]
            return state + where + (f", with a checkpoint of step {kept}" if kept is not None else "")
        case "preempted" if cause is None:
            stopped = f"stopped{where}{f' ({why})' if why else ''}"
            if status["queue"]:  # the job of the attempt that has ended is still there
                return f"{stopped}; {note}"
            if note and note.startswith(UNREACHABLE):
                return f"{stopped}; whether it continues is not known: {note}"
            return f"{stopped}; it does not continue by itself" + (f": {note}" if note else "")
    if cause and cause["attempt"] is None:
        return f"{state} before its first attempt: {cause['meaning'] or why}"
    return f"{state}{where}: {why or note}"


def _waits(run: Run, status: Status) -> str:
    """Why and since when a run waits in SLURM's queue, in words."""
    queue, submission = status["queue"], status["job"]["submission"]
    # SLURM forgets the start of the wait at each requeue: a requeued job has waited since the end of its last attempt.
    last = status["attempts"][-1] if status["attempts"] else {}
    requeued = last and last.get("submission") == submission
    since = last.get("ended") if requeued else _changed(run.paths.submission(submission) / "submission.json")
    reason = status["note"] or reasons.in_words_with_code(queue["reason"])
    start = None if reasons.HELD.match(queue["reason"]) else queue["start"]
    return ("waits in SLURM's queue" + (f" since {local_time(since)}" if since else "")
            + (f", at place {queue['position']} of {queue['of']}" if queue["position"] else "") + f": {reason}"
            + (f"; SLURM expects it to start at {local_time(start)}" if start else ""))


def _runs(run: Run, status: Status, last: Mapping[str, Any] | None, script: bool) -> str:
    """How far a running run is, and whether it is slow or silent, in words.

    Args:
        last: the last of the `attempts` of `explain`.
    """
    if last is None or last["outcome"] != "running":
        number = 1 if last is None else last["attempt"] + (last["outcome"] != "unreadable")
        queue = status["queue"]
        since = queue["start"] if queue else status.get("updated")
        where = f" on {', '.join(queue['nodes'])}" if queue else ""
        return f"attempt {number} is being started{where}, since {local_time(since)}" + (
            f"; {status['note']}" if status["note"] else "")
    log = run.paths.log(last["attempt"], 0)
    speed = SPEED.findall(_read(log, -END_BYTES))
    if script:
        text = f"attempt {last['attempt']} runs the script"
    else:
        text = f"attempt {last['attempt']} " + ("has not reached its first step" if last["to_step"] is None else
                                                f"is at step {last['to_step']} of {status['total'] or '?'}")
        text += f", {speed[-1][0]}, with {speed[-1][1]} to go" if speed else ""
    silent_s = seconds_between(_changed(log), utc_now()) or 0
    if status["note"]:
        return f"{text}; {status['note']}"
    if status["slow"]:
        return f"{text}; slow: {'; '.join(map(slow_words, status['slow']))}"
    return text + (f"; no output for {duration(silent_s)}: it may hang" if silent_s > SILENT_S else "; nothing is wrong")


# Files and times


def _last_lines(lines: list[str]) -> list[str]:
    """Return the last lines of a log, each cut to a length that a person can read."""
    return [line if len(line) <= LINE_CHARS else f"{line[:LINE_CHARS]}... ({len(line):,} characters)"
            for line in lines[-LOG_LINES:]]


def _read(file: Path, size: int) -> str:
    """The first `size` bytes of a file, or the last if `size` is negative; "" if the file cannot be read."""
    try:
        with open(file, "rb") as opened:
            opened.seek(max(0, opened.seek(0, os.SEEK_END) + size) if size < 0 else 0)
            return opened.read(abs(size)).decode("utf-8", "replace")
    except OSError:
        return ""


def _changed(file: Path) -> str | None:
    """When the file was last changed, in UTC; None if the file does not exist."""
    try:
        return utc_at(file.stat().st_mtime)
    except OSError:
        return None
