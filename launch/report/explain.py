"""What became of a run, and why: the first rank that failed, what SLURM said, and what to do next."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from string import Formatter
from typing import Any

from launch.cluster import reasons
from launch.records.read import node_logs, node_of, slow_words, status
from launch.records.run import Run
from launch.records.state import ACTIVE
from launch.report.causes import CAUSES, GOING, MENDED, RESUME, WAITING, Cause
from trainers.contract.clock import local_time, seconds_between, utc_at, utc_now
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths
from trainers.contract.text import duration, last_traceback

END_BYTES = 256 * 1024  # of a log, from its end
BEGIN_BYTES = 64 * 1024
TRACE_LINES = 15        # of a traceback, the last
LOG_LINES = 8           # of a log that has none
SAID_LINES = 5          # of SLURM's
STILL_S = 300.0         # without a word, until a run is said to be still

BEGAN = re.compile(r"^(?:(?:training from|resuming at) step|(?:from|resuming at) fit) (\d+) of ", re.MULTILINE)
STEP = re.compile(r"^(?:step|fit|eval|(?:finished|preempted) at (?:step|fit)) (\d+)/\d+", re.MULTILINE)
SPEED = re.compile(r"^(?:step|fit) \d+/\d+ .*?([\d,.]+ \w+/s) .*eta (\S+)$", re.MULTILINE)
BY_SLURM = re.compile(r"^(?:srun|slurmstepd[^:]*|.*/slurm_script): .*", re.MULTILINE)
NOISE = re.compile(r"lacks support for cpu binding|Exited with exit code|got SIGCONT|Job step aborted|Terminating StepId")
ENDED = {"running": "is at work", "preempted": "stopped", "lost": "was lost", "cancelled": "was cancelled"}

Found = Mapping[str, Any]  # what `launch.records.read.status` gives


def explain(run: Run) -> dict[str, Any]:
    """What became of a run, and why:

    - `id`, `state`, `step`, `total`, `note` (what there is to say of the state, or None), and all in one `sentence`
    - `cause`: None, or of the first rank that failed, or what else did: {"message", "meaning", "attempt", "rank", "node",
      "exit_code", "signal", "hint", "log" (a path), "traceback" or "log_end" (lines)}, None where there is none
    - `slurm`: {"problem" (why it could not be asked, or None), "jobs" (what it remembers of the run's that are over),
      "forgotten" (ids of others), "nodes" (of a lost attempt: those that are down, and their states), "said" (its lines
      in the job's logs), "queue" (as in `launch.records.read.status`)}
    - `attempts`: of each {"attempt", "outcome", "why", "nodes", "job", "began", "ended", "seconds", "from_step", "to_step",
      "kept" (by one that stopped or was cancelled: "checkpoint", or of a search "pieces"), "next_step" (at which the next
      one went on), "lost_steps" (that it did again), "next_s" (until it began)}; None where that is not known
    - `next`: [{"command", "why"}, ...]

    Nothing is raised because SLURM cannot be asked.
    """
    found = status(run)
    attempts = _attempts(run.paths, found)
    slurm = _slurm(run, found)
    cause = _cause(run, found, slurm)
    facts = _facts(run, found, attempts, cause)
    kind = None
    if cause and (known := _match(_text(cause, slurm))):
        kind, match = known
        cause["meaning"] = _filled(kind.meaning, facts, match)
        if cause["exit_code"] is None:  # then the hint is no rank's own, and says the same
            cause["hint"] = None
    elif cause and found["state"] in ACTIVE:  # it has not begun yet, and that is all
        cause = None
    sentence = _sentence(run, found, attempts, cause)
    return {"id": run.id, **{key: found[key] for key in ("state", "step", "total", "note")}, "sentence": sentence,
            "cause": cause, "slurm": slurm, "attempts": attempts, "next": _next(found, cause, kind, facts)}


def told(explanation: Mapping[str, Any]) -> str:
    """The same for a person."""
    cause, slurm = explanation["cause"] or {}, explanation["slurm"]
    last = cause.get("traceback") or cause.get("log_end") or []
    rows = [("cause", cause.get("meaning")), ("hint", cause.get("hint")), ("log", cause.get("log"))]
    rows += [("log", f"  {line}") for line in last]
    rows += [("slurm", slurm["problem"] and f"cannot be asked: {slurm['problem']}")]
    rows += [("slurm", _ended(job)) for job in slurm["jobs"]]
    rows += [("slurm", f"knows job {id} no more") for id in slurm["forgotten"]]
    rows += [("slurm", f"node {node} is {state}") for node, state in slurm["nodes"].items()]
    rows += [("said", line) for line in slurm["said"] if line not in last]
    rows += [(f"attempt {attempt['attempt']}", _attempt(attempt)) for attempt in explanation["attempts"]]
    for step in explanation["next"]:
        rows += [("next", step["command"]), ("", f"  {step['why']}")]
    rows = [(label, text) for label, text in rows if text and text not in explanation["sentence"]]
    shown = [(label if label not in [before for before, _ in rows[:i]] else "", text) for i, (label, text) in enumerate(rows)]
    return "\n".join([f"{explanation['id']}: {explanation['sentence']}", *([""] if rows else []),
                      *(f"{label:<12}{text}".rstrip() for label, text in shown)])


# The attempts


def _attempts(paths: RunPaths, found: Found) -> list[dict[str, Any]]:
    rows, kept = [], "checkpoint" if found["checkpoint"] is not None else "pieces" if paths.pieces.exists() else None
    for record in found["attempts"]:
        number, log = record["attempt"], paths.log(record["attempt"], 0)
        first, last = _steps(log)
        if last is not None and number == found["attempt"]:
            last = max(last, found["step"] or 0)
        going = record["outcome"] == "running"
        ended = record.get("ended") or (None if going else _changed(log))
        failure = record.get("failure")
        rows.append({
            "attempt": number, "outcome": record["outcome"], "why": _failed(failure) if failure else record.get("reason"),
            "nodes": record.get("nodes") or [], "job": record.get("job"), "began": record.get("began"), "ended": ended,
            "seconds": seconds_between(record.get("began"), ended), "from_step": first, "to_step": last,
            "kept": kept if record["outcome"] in ("preempted", "cancelled") else None,
            "next_step": None, "lost_steps": None, "next_s": None,
        })
    for row, later in zip(rows, rows[1:]):
        row |= {"next_step": later["from_step"], "next_s": seconds_between(row["ended"], later["began"])}
        if row["to_step"] is not None and later["from_step"] is not None:
            row["lost_steps"] = max(0, row["to_step"] - later["from_step"])
    return rows


def _steps(log: Path) -> tuple[int | None, int | None]:
    """Of an attempt, by the log of its rank 0: the step at which it began, and the last one that it told of."""
    began = BEGAN.search(_read(log, BEGIN_BYTES))
    first = int(began[1]) if began else None
    told = STEP.findall(_read(log, -END_BYTES))
    return first, int(told[-1]) if told else first


def _failed(failure: Mapping[str, Any]) -> str:
    """'rank 3 on node n2 was ended by SIGKILL'"""
    message, rank, node = failure.get("message") or "nobody said why", failure.get("rank"), failure.get("node")
    if rank is None:
        return message
    who = f"rank {rank}" + (f" on node {node}" if node else "")
    return who + message.removeprefix(f"rank {rank}") if message.startswith(f"rank {rank} ") else f"{who}: {message}"


def _outcome(row: Mapping[str, Any]) -> tuple[str, str]:
    """How an attempt ended, and what is to be said of that at the end of the sentence."""
    ended = ENDED.get(row["outcome"], row["outcome"])
    if row["outcome"] == "preempted" and row["kept"] == "checkpoint":
        return f"{ended} with a checkpoint", ""
    return ended, "; its finished pieces are kept" * (row["kept"] == "pieces")


def _attempt(row: Mapping[str, Any]) -> str:
    line, kept = _outcome(row)
    line += f" after {duration(row['seconds'])}" if row["seconds"] is not None else ""
    line += f" at step {row['to_step']}" if row["to_step"] is not None else ""
    line += f" (from {row['from_step']})" if row["from_step"] else ""
    line += f" on {', '.join(row['nodes'])}" if row["nodes"] else ""
    line += (f": {row['why']}" if row["why"] else "") + kept
    if row["lost_steps"] is not None:
        line += f"; the next went on at step {row['next_step']}"
        line += f", {duration(row['next_s'])} later" if row["next_s"] is not None else ""
        line += f", {row['lost_steps']} step(s) done again" if row["lost_steps"] else ", no step lost"
    return line


# What SLURM says


def _slurm(run: Run, found: Found) -> dict[str, Any]:
    said: dict[str, Any] = {"problem": None, "jobs": [], "forgotten": [], "nodes": {}, "said": [], "queue": found["queue"]}
    attempts, ids = found["attempts"], _ids(found)
    if not ids or found["state"] in ("finished", "running", "cancelled"):
        return said
    from launch.cluster import slurm

    lines = [line for line in BY_SLURM.findall(_last_words(run, found)) if not NOISE.search(line)]
    said["said"] = list(dict.fromkeys(lines))[-SAID_LINES:]
    try:
        ended = slurm.history(ids)
        said["jobs"] = [{**asdict(ended[id]), "words": reasons.words(ended[id].reason)} for id in ids if id in ended]
        said["forgotten"] = [id for id in ids if id not in ended and id not in (found["queue"] or {"ids": ()})["ids"]]
        if attempts and attempts[-1]["outcome"] == "lost":
            states = slurm.node_states(attempts[-1].get("nodes") or ())
            said["nodes"] = {node: ", ".join(filter(None, state)) for node, state in states.items()
                             if not slurm.takes_jobs(state[0])}
    except UserError as error:
        said["problem"] = error.message
    return said


def _ids(found: Found) -> list[str]:
    """The jobs of the last submission; none for a local run."""
    return (found["job"] or {}).get("ids") or []


def _last_words(run: Run, found: Found) -> str:
    """What node processes have said in the last job, SLURM's own words among it: since the last attempt began."""
    logs = [log for log in node_logs(run) if log.job in _ids(found)]
    text = "\n".join(_read(log.path, -END_BYTES) for log in logs if log.job == logs[-1].job and log.node == 0)
    return text[max((mark.start() for mark in re.finditer(r"^attempt \d+ of ", text, re.MULTILINE)), default=0):]


def _ended(job: Mapping[str, Any]) -> str:
    line = f"job {job['id']} ended as {job['state']}" + (f" on {job['node_list']}" if job["node_list"] else "")
    line += f", exit code {job['exit_code']}" if job["exit_code"] else f", signal {job['signal']}" if job["signal"] else ""
    return line + (f": {job['words']}" if job["words"] != job["reason"] and job["reason"] != "None" else "")


# The cause


def _cause(run: Run, found: Found, slurm: Mapping[str, Any]) -> dict[str, Any] | None:
    keys = ("message", "meaning", "attempt", "rank", "node", "exit_code", "signal", "hint", "log", "traceback", "log_end")
    cause: dict[str, Any] = dict.fromkeys(keys)
    if found["state"] in ("finished", "running", "cancelled"):
        return None
    number = (found["job"] or {}).get("submission")
    attempts = [attempt for attempt in found["attempts"] if attempt.get("submission", number) == number]
    if not attempts:
        waits = found["queue"]["reason"] if found["queue"] else found["state"] in ACTIVE
        return None if waits else cause | {"message": _no_attempt(slurm)} | _job_log(run, found)
    attempt = attempts[-1]
    if attempt["outcome"] not in ("failed", "lost"):
        return None
    failure = attempt.get("failure") or {"message": _silent(slurm)}
    failure = _first(run.paths, attempt, failure) or failure
    rank = failure.get("rank")
    node = failure.get("node") or node_of(attempt, rank)
    cause |= {key: failure.get(key) for key in ("rank", "exit_code", "signal", "hint")}
    cause |= {"attempt": attempt["attempt"], "node": node, "message": _failed({**failure, "node": node})}
    log = run.paths.log(attempt["attempt"], rank or 0)
    text = _read(log, -END_BYTES)
    cause["log"] = str(log) if log.exists() else None
    if trace := failure.get("traceback") or (last_traceback(text) if rank is not None else None):
        return cause | {"traceback": trace.splitlines()[-TRACE_LINES:]}
    if _ids(found) and (rank is None or not log.exists()):
        return cause | _job_log(run, found, node)
    return cause | {"log_end": text.rstrip().splitlines()[-LOG_LINES:] or ["(it is empty)"] * log.exists()}


def _first(paths: RunPaths, attempt: Mapping[str, Any], failure: Mapping[str, Any]) -> dict[str, Any] | None:
    """Another rank that failed, if the one in the record has only lost it."""
    kind = _match(f"{failure.get('message')}\n{failure.get('traceback')}\n{failure.get('signal')}")
    if failure.get("rank") is None or not kind or not kind[0].consequence:
        return None
    for rank, log in paths.logs(attempt["attempt"]).items():
        text = _read(log, -END_BYTES)
        trace = last_traceback(text)
        said = re.findall(r"^error: (.*)", text, re.MULTILINE)[-1:] or (trace or "").splitlines()[-1:]
        other = _match(said[0]) if said else None
        if rank != failure["rank"] and said and not (other and other[0].consequence):
            return {"rank": rank, "message": f"rank {rank} ended with {said[0]}", "traceback": trace}
    return None


def _no_attempt(slurm: Mapping[str, Any]) -> str:
    if queue := slurm["queue"]:
        return f"job {', '.join(queue['ids'])} runs on {', '.join(queue['nodes'])}, and no attempt has begun"
    if not slurm["jobs"]:
        return "its job ended before the first attempt began"
    job = slurm["jobs"][-1]
    return f"{_ended({**job, 'reason': 'None'})}, before the first attempt began"


def _silent(slurm: Mapping[str, Any]) -> str:
    down = [f"node {node} is down ({state})" for node, state in slurm["nodes"].items()]
    return ", ".join(down) or "its processes are gone and nobody said why"


def _job_log(run: Run, found: Found, node: str | None = None) -> dict[str, Any]:
    """The end of what a node process of the last job has said: that of `node`, or the head's."""
    logs = [log for log in node_logs(run) if log.job in _ids(found)]
    nodes = (found["attempts"] or [{}])[-1].get("nodes") or []
    logs = [log for log in logs if log.job == logs[-1].job]
    mine = [log for log in logs if node in nodes and log.node == nodes.index(node)] or logs
    if not mine:
        return {"log_end": ["there is no log: no node could write one into the run's folder"]} if _ids(found) else {}
    lines = [line for line in _read(mine[0].path, -END_BYTES).splitlines() if not NOISE.search(line)]
    return {"log": str(mine[0].path), "log_end": lines[-LOG_LINES:] or ["(it is empty)"]}


def _text(cause: Mapping[str, Any], slurm: Mapping[str, Any]) -> str:
    """All in which a known kind of failure may show."""
    states = [f"state {job['state']} signal {job['signal']}" for job in slurm["jobs"]]
    parts = [cause["message"], cause["signal"], *(cause["traceback"] or cause["log_end"] or ()), *slurm["said"], *states]
    return "\n".join(filter(None, parts))


def _match(text: str) -> tuple[Cause, re.Match[str]] | None:
    return next(((cause, match) for cause in CAUSES if (match := re.search(cause.pattern, text))), None)


# In words


def _sentence(run: Run, found: Found, attempts: Sequence[Mapping[str, Any]], cause: Mapping[str, Any] | None) -> str:
    state, note, last = found["state"], found["note"], attempts[-1] if attempts else None
    where = "" if last is None or last["to_step"] is None else f" at step {last['to_step']}"
    where += f" in attempt {last['attempt']}" if last else ""
    why = cause["message"] if cause else last["why"] if last else None
    if found["queue"] and found["queue"]["reason"]:
        if last is None:
            return _waits(run, found, last)
        ended, kept = _outcome(last)
        return f"{_waits(run, found, last)}; it {ended}{where}{f': {why}' if why else ''}{kept}"
    match state:
        case "finished":
            return state + where
        case "running":
            return _runs(run, found, last)
        case "submitted":
            queue = found["queue"]
            begun = f"job {', '.join(queue['ids'])} has started on {', '.join(queue['nodes'])}" if queue else "it is submitted"
            return note or begun + (f", but {cause['meaning']}" if cause else ", and no attempt has begun yet")
        case "cancelled":
            kept = found["checkpoint"]
            return state + where + (f", with a checkpoint of step {kept}" if kept is not None else "")
        case "preempted" if cause is None:
            told = f" ({why})" if why else ""
            return f"stopped{where}{told}; nothing goes on with it by itself" + (f": {note}" if note else "")
    if cause and cause["attempt"] is None:
        return f"{state} before its first attempt: {cause['meaning'] or why}"
    return f"{state}{where}: {why or note}"


def _waits(run: Run, found: Found, last: Mapping[str, Any] | None) -> str:

    queue, submission = found["queue"], (found["job"] or {}).get("submission")
    # SLURM forgets since when at each requeue.
    again = last and found["attempts"][-1].get("submission") == submission
    since = found["attempts"][-1].get("ended") if again else _changed(run.paths.submission(submission) / "submission.json")
    reason = reasons.told(queue["reason"])
    return ("waits in SLURM's queue" + (f" since {local_time(since)}" if since else "")
            + (f", at place {queue['position']} of {queue['of']}" if queue["position"] else "") + f": {reason}"
            + (f"; by SLURM's estimate it starts at {local_time(queue['start'])}" if queue["start"] else ""))


def _runs(run: Run, found: Found, last: Mapping[str, Any] | None) -> str:
    if last is None or last["outcome"] != "running":
        return f"attempt {last['attempt'] + 1 if last else 1} is being started"
    log = run.paths.log(last["attempt"], 0)
    speed = SPEED.findall(_read(log, -END_BYTES))
    text = f"attempt {last['attempt']} " + ("has not come to its first step" if last["to_step"] is None else
                                            f"is at step {last['to_step']} of {found['total'] or '?'}")
    text += f", {speed[-1][0]}, with {speed[-1][1]} to go" if speed else ""
    quiet_s = seconds_between(_changed(log), utc_now()) or 0
    if found["note"]:
        return f"{text}; {found['note']}"
    if found["slow"]:
        return f"{text}; slow: {'; '.join(map(slow_words, found['slow']))}"
    return text + (f"; it has said nothing for {duration(quiet_s)}: it may hang" if quiet_s > STILL_S else "; nothing is wrong")


# What to do


def _facts(run: Run, found: Found, attempts: Sequence[Mapping[str, Any]], cause: Mapping[str, Any] | None
           ) -> dict[str, str | None]:
    """What commands and reasons are made of; None where it is not known, or does not apply."""
    from launch.plan.submission import last_submission
    from launch.records.naming import named, shown
    from trainers.config import yaml12

    paths, on_slurm = run.paths, (found["job"] or {}).get("kind") == "slurm"
    try:
        spec = yaml12.read(paths.spec.read_text(encoding="utf-8"), paths.spec.name).value or {}
        submission = last_submission(paths, found.get("sweep")) if on_slurm else None
    except (OSError, ValueError, UserError):  # what is broken there is no part of this
        spec, submission = {}, None
    begun = next((attempt for attempt in reversed(found["attempts"]) if attempt.get("ranks")), None)
    ranks, kind = (begun["ranks"], "--gpus" if begun["device"] == "cuda" else "--procs") if begun else (0, "--procs")
    where = f" {kind} {ranks}" if begun else ""
    if submission:
        ranks, kind = submission.resources.ranks, "--gpus" if submission.resources.gpus else "--procs"
        where = f" {kind} {ranks} --nodes {submission.resources.nodes} --cluster {shlex.quote(submission.cluster.name)}"
    train = spec.get("train") or {}
    share = train["batch_size"] // ranks if train and ranks else 1
    given = train.get("micro_batch_size")
    micro = given or share if given != "auto" else 1  # auto has made it smaller itself
    kept = found["checkpoint"]
    again = (attempts[-1]["to_step"] or 0) - kept if attempts and kept is not None else 0
    name = shlex.quote(named(paths))
    return {
        "run": name, "resume": f"launch resume {name}", "folder": shlex.quote(shown(paths.root)), "where": where,
        "onward": "it does what is missing: finished pieces are kept" if "search" in spec else
                  "it has no checkpoint, and begins anew" if kept is None else
                  f"it goes on from its checkpoint of step {kept}" + (f" ({again} steps are done again)" if again > 0 else ""),
        "stop": "stops it: finished pieces are kept" if "search" in spec else
                "stops it, with a checkpoint if it is at work",
        "new": f"launch {shlex.quote(shown(paths.spec))}" if train or "search" in spec else None,
        "plan": f"launch plan {shlex.quote(shown(paths.spec))}" if train else None,
        "smaller": str(max(size for size in range(1, micro) if share % size == 0)) if micro > 1 else None,
        "more": f"{kind} {2 * ranks}" if share % 2 == 0 and not given else None,
        "lower": f"{spec['optim']['lr'] / 3:.2g}" if train else None,
        "grace_s": str(round(3 * spec["run"]["grace_s"])) if "run" in spec else None,
        "hang_s": f"{3 * spec['run']['hang_s']:g}" if (spec.get("run") or {}).get("hang_s") else None,
        "cluster": shlex.quote(submission.cluster.name) if submission else None,
        "node": cause["node"] if cause and on_slurm else None,
        "memory": _memory(run, found) if submission else None, "time": _longer(submission) if submission else None,
        "jobs": " ".join(_ids(found)),
    }


def _memory(run: Run, found: Found) -> str:
    """Twice what the last submission asked for."""
    homes = [run.paths, RunPaths(run.paths.root.parent / (found.get("sweep") or run.id))]
    scripts = [_read(home.submission(found["job"]["submission"]) / "job.sh", END_BYTES) for home in homes]
    asked = re.search(r"^#SBATCH --(mem|mem-per-cpu)=(\d+)([KMGT]?)$", "\n".join(scripts), re.MULTILINE)
    return f"sbatch.{asked[1]}={2 * int(asked[2])}{asked[3]}" if asked else "sbatch.mem=SIZE"


def _longer(submission: Any) -> str:
    from launch.cluster.times import seconds, slurm_time

    return slurm_time(2 * seconds(submission.time or submission.cluster.time))


def _next(found: Found, cause: Mapping[str, Any] | None, kind: Cause | None, facts: Mapping[str, str | None]
          ) -> list[dict[str, str]]:
    advice = kind.advice if kind else ()
    if found["state"] == "finished":
        return []
    if not any(" resume " in command for command in found["next"]):  # it goes on by itself, or may
        reason = (found["queue"] or {}).get("reason") or ""
        advice = [*(step for pattern, step in WAITING if re.match(pattern, reason)), *GOING]
    steps: dict[str, str] = {}
    for command, why in advice:
        if command := _filled(command, facts):
            steps.setdefault(command, _filled(why, facts))
    return [{"command": command, "why": why} for command, why in (steps or {
        facts["resume"]: _filled((MENDED if cause else RESUME)[1], facts)}).items()]


def _filled(template: str, facts: Mapping[str, str | None], match: re.Match[str] | None = None) -> str | None:
    """None if it names a fact that is not known."""
    names = [name for _, name, _, _ in Formatter().parse(template) if name and not name.isdigit()]
    if any(facts.get(name) is None for name in names):
        return None
    return template.format(*(match.groups() if match else ()), **facts)


# Files and times


def _read(file: Path, size: int) -> str:
    """The first `size` bytes of a file, or the last if it is negative; "" if there is none."""
    try:
        with open(file, "rb") as opened:
            opened.seek(max(0, opened.seek(0, os.SEEK_END) + size) if size < 0 else 0)
            return opened.read(abs(size)).decode("utf-8", "replace")
    except OSError:
        return ""


def _changed(file: Path) -> str | None:
    try:
        return utc_at(file.stat().st_mtime)
    except OSError:
        return None
