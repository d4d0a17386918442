"""What became of a run, and why: the first rank that failed, what SLURM said, and what to do next."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from launch.runs import NOT_SUBMITTED, Run, node_logs, status
from trainers.errors import UserError
from trainers.events import duration
from trainers.paths import RunPaths

END_BYTES = 256 * 1024  # of a log, from its end
BEGIN_BYTES = 64 * 1024
TRACE_LINES = 15        # of a traceback, the last
LOG_LINES = 12          # of a log that has none
STILL_S = 300.0         # without a sign of life, at the least, until a run is said to be still

BEGAN = re.compile(r"^(?:training from|resuming at) step (\d+) of ", re.MULTILINE)
STEP = re.compile(r"^(?:step|eval|finished at step|preempted at step) (\d+)/\d+", re.MULTILINE)
SPEED = re.compile(r"^step \d+/\d+ .*?([\d,]+ \w+/s) .*eta (\S+)$", re.MULTILINE)
BY_SLURM = re.compile(r"^(?:srun|slurmstepd[^:]*|sbatch|.*/slurm_script): .*", re.MULTILINE)
NOISE = re.compile(r"lacks support for cpu binding|Exited with exit code|got SIGCONT|Job step aborted|Terminating StepId"
                   r"|SLURM_\w+ has been set|: going to /tmp")


class Cause(NamedTuple):
    """What a text that fits `pattern` means, and the commands that may help, each with the reason. In braces: the
    pattern's groups, by number, and what `_facts` knows; a command of which something is not known is left out."""

    pattern: str
    meaning: str
    advice: tuple[tuple[str, str], ...] = ()
    consequence: bool = False  # of another rank's end


RESUME = ("{resume}", "{onward}")
NETWORK = ("launch doctor --cluster {cluster} --job", "tries whether its nodes reach each other; `interface:` in the cluster's "
                                                      "file names the network to use")
NODES = ("launch doctor --cluster {cluster} --job", "tries it on the nodes, in a job of a minute")
ELSEWHERE = ("{resume} sbatch.exclude={node}", "if it was this node's fault: without it")
LESS = (("{new} train.micro_batch_size={smaller}{where}", "a new run of the same spec: the same batch in smaller parts"),
        ("{resume} {more}", "on twice as many ranks, each of which takes half as much of a batch"))

# The first that fits. What another rank's end brings with it comes last.
CAUSES = (
    Cause(r"did not stop within ([\d.]+) s of (\w+)", "a step and its checkpoint took longer than run.grace_s, {0} s",
          (RESUME, ("{new} run.grace_s={grace_s}{where}", "a new run that is given longer; for all runs on a cluster: "
                                                          "`defaults: {{run: {{grace_s: ...}}}}` in its file"))),
    Cause(r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|ncclUnhandledCudaError.*out of memory",
          "the GPU's memory was full", LESS),
    Cause(r"oom[-_]kill|OUT_OF_MEMORY|Out Of Memory|OOM Killed|Exceeded (?:job|step) memory limit|Cannot allocate memory"
          r"|(?<!Of)MemoryError|can't allocate memory|not enough memory: you tried",
          "the host's memory, or the job's share of it, was full",
          (("{resume} {memory}", "with more memory a node"), *LESS)),
    Cause(r"the loss of update .* is \S+ at step|overflowed in \d+ steps in a row", "training diverged: it would again",
          (("{new} optim.lr={lower}{where}", "a new run, with a lower learning rate"),
           ("{new} optim.clip_norm=1{where}", "a new run, with gradients cut to a norm"))),
    Cause(r"No space left on device|Disk quota exceeded", "the disk, or your share of it, is full",
          (("df -h {folder}", "how full it is; old checkpoints and runs may go"), RESUME)),
    Cause(r"No module named '([^']+)'", "the Python that ran it has no module `{0}`",
          (("launch doctor --cluster {cluster}", "whether what is needed is installed"),
           ("{resume}", "once it is; a module of your own must lie in the folder or git work tree of the task"))),
    Cause(r"EADDRINUSE|[Aa]ddress already in use", "another process has taken the port",
          (("{resume}", "a new attempt takes another port"),)),
    Cause(r"needs GPU \d+; torch \S+ sees (\d+)", "torch sees {0} GPUs there: fewer than the run was given",
          (NODES, ELSEWHERE, ("nvidia-smi", "whether the driver is there and fits torch's CUDA"))),
    Cause(r"uncorrectable ECC|CUDA error: (?:unspecified launch failure|unknown error)|\bXid\b|CUDA-capable device|"
          r"CUDA driver version is insufficient|fallen off the bus", "a GPU, or its driver, is not in order",
          (ELSEWHERE, NODES, RESUME)),
    Cause(r"SIGBUS|Bus error|bus error", "shared memory (/dev/shm) was full, or a file ended while it was mapped",
          (("df -h /dev/shm", "on its node; in a container it may be small"), ELSEWHERE, RESUME)),
    Cause(r"Permission denied", "a file or folder may not be read or written",
          (("ls -ld {folder}", "who may write there"), RESUME)),
    Cause(r"couldn't chdir to `([^']+)'", "{0} is not there on its node", (NODES,)),
    Cause(r"JobLaunchFailure|signal 53\b|Slurmd could not connect IO",
          "a node could not write into the run's folder {folder}: most likely nodes cannot see it",
          (NODES, ("launch ... --runs DIR", "a folder on storage that this host and all nodes share; `runs:` in the cluster's "
                                            "file sets it for good"), ELSEWHERE)),
    Cause(r"execve\(\): (?:bad interpreter\()?([^\n]+?)\)?: (?:No such file|Permission denied)",
          "`{0}` is not there on the node, or may not be run",
          (NODES, ("{resume}", "once `python:`, `prefix:` or `setup:` in the file of cluster {cluster} is right"))),
    Cause(r"process of node ([\d, ]+) of \d+ did not come|head node's process could not be reached|has no interface `",
          "the nodes' processes did not find each other", (NETWORK, ELSEWHERE, RESUME)),
    Cause(r"SLURM ended the job before|DUE TO NODE FAILURE|Node failure on|NODE_FAIL|node (?:\S+) went down",
          "a node of its job failed", (RESUME, ("sinfo -R", "which nodes are down, and why"))),
    Cause(r"DUE TO TIME LIMIT|\bTIMEOUT\b|\bDEADLINE\b", "the job's time was over before there was a checkpoint at its end",
          (("{resume} --time {time}", "with more time; or a new run with a lower checkpoint.every"),)),
    Cause(r"DUE TO PREEMPTION|\bPREEMPTED\b", "another job took the nodes", (RESUME,)),
    Cause(r"node process on (\S+) (?:is gone|was killed)",
          "something killed launch's own process there: the kernel for want of memory, an administrator, a failing node",
          (RESUME, ("{resume} {memory}", "with more memory a node, if that was it"), ELSEWHERE)),
    Cause(r"SIGKILL", "it was killed from outside without a word: by the kernel for want of memory, or by somebody",
          (RESUME, ("{resume} {memory}", "with more memory a node, if that was it"), ELSEWHERE)),
    Cause(r"SIGSEGV|SIGILL|SIGABRT|SIGFPE", "it crashed in native code, not in Python",
          (("PYTHONFAULTHANDLER=1 {resume}", "the next crash shows where in Python it was"), ELSEWHERE)),
    Cause(r"unhandled (?:system|cuda) error|nccl(?:System|UnhandledCuda|Internal|InvalidUsage)Error",
          "NCCL could not use the network, or a GPU, between ranks",
          (NETWORK, ("NCCL_DEBUG=INFO {resume}", "its log then names the failing call"))),
    Cause(r"taken the run over", "a newer attempt has taken the run over", consequence=True),
    Cause(r"Watchdog caught collective operation timeout|collective operation timeout|Timed out waiting \d+ms",
          "a rank waited for others that did not come: one of them hung, or went another way",
          (("launch logs {run} --rank K", "what each rank said last: look for the one that differs"), NETWORK, RESUME),
          consequence=True),
    Cause(r"Connection (?:closed|reset) by peer|Broken pipe|Connection refused|remote process exited|ncclRemoteError"
          r"|recvValue failed|Socket Timeout|failed to recv", "it lost another rank, of whose end nothing is known",
          (("launch logs {run} --rank K", "what each rank said last"), RESUME), consequence=True),
)


def explain(run: Run) -> dict[str, Any]:
    """What became of a run, and why:

    - `id`, `state`, `sentence` (all of it in one), `note` (what there is to say of the state, or None)
    - `cause`: None, or the first rank that failed, or what else did: {"attempt", "rank", "node", "exit_code", "signal",
      "message", "hint", "meaning" (None if the failure is of no known kind), "traceback" and "log_end" (lists of lines),
      "log" (a path)}; all but `message` may be None
    - `slurm`: {"problem" (why it could not be asked, or None), "jobs": what it remembers of each of the run's that is
      over, "forgotten": the ids of others, "said": lines in the job's logs, "queue": as in `launch.runs.status`}
    - `attempts`: each {"attempt", "outcome", "why", "nodes", "seconds", "from_step", "to_step", "lost_steps" (of its
      steps, those that the next one did again), "again_s" (until the next one), ...}; None where it is not known
    - `next`: [{"command", "why"}, ...]
    """
    found = status(run)
    run = run.again()
    records = found["attempts"]
    attempts = _attempts(run, found)
    slurm = _asked(run, found)
    cause = _cause(run, found, slurm)
    facts = _facts(run, found, cause)
    kind = _kind(cause, slurm)
    if cause and kind:
        match, cause["meaning"] = kind[1], _filled(kind[0].meaning, facts, kind[1])
        facts["node"] = facts["node"] or _node_in(match, records)
    return {"id": run.id, "state": found["state"], "sentence": _sentence(run, found, attempts, cause), "note": found["note"],
            "step": found["step"], "total": found["total"], "cause": cause, "slurm": slurm, "attempts": attempts,
            "next": _next(found, cause, kind and kind[0], facts)}


def told(explanation: Mapping[str, Any]) -> str:
    """The same for a person."""
    cause, slurm = explanation["cause"], explanation["slurm"]
    rows: list[tuple[str, str]] = []
    if cause:
        rows += [("cause", cause["meaning"] or ""), ("hint", cause["hint"] or ""), ("log", cause["log"] or "")]
        rows += [("", line) for line in cause["traceback"] or cause["log_end"] or []]
    if slurm["problem"]:
        rows.append(("slurm", f"cannot be asked here: {slurm['problem']}"))
    for job in slurm["jobs"]:
        rows.append(("slurm", _ended(job)))
    if slurm["forgotten"]:
        rows.append(("slurm", f"knows job {', '.join(slurm['forgotten'])} no more"))
    rows += [("said", line) for line in slurm["said"]]
    for attempt in explanation["attempts"]:
        rows.append((f"attempt {attempt['attempt']}", _attempt_line(attempt)))
    for step in explanation["next"]:
        rows += [("next", step["command"]), ("", f"  {step['why']}")]
    shown = [(label if label != before else "", text) for (label, text), (before, _)
             in zip(rows, [("", ""), *rows]) if text]
    return "\n".join([f"{explanation['id']}: {explanation['sentence']}", "",
                      *(f"{label:<12}{text}".rstrip() for label, text in shown)]).rstrip()


# The attempts


def _attempts(run: Run, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    paths, rows = run.paths, []
    for record in found["attempts"]:
        number = record["attempt"]
        first, last = _steps(paths.log(number, 0))
        if number == found["attempt"] and last is not None and (found["job"] or {}).get("kind"):
            last = max(last, found["step"] or 0)
        ended = record.get("ended") or _changed(paths.log(number, 0))
        rows.append({
            "attempt": number, "outcome": record["outcome"], "why": _why(record), "reason": record.get("reason"),
            "nodes": record.get("nodes") or [], "job": record.get("job"), "began": record.get("began"), "ended": record.get("ended"),
            "seconds": _between(record.get("began"), ended) if record["outcome"] != "running" else None,
            "from_step": first, "to_step": last, "lost_steps": None, "again_s": None,
        })
    for row, later in zip(rows, rows[1:]):
        row["again_s"] = _between(row["ended"], later["began"])
        if row["to_step"] is not None and later["from_step"] is not None:
            row["lost_steps"] = max(0, row["to_step"] - later["from_step"])
            row["again_step"] = later["from_step"]
    return rows


def _steps(log: Path) -> tuple[int | None, int | None]:
    """Of an attempt, by the log of its rank 0: the step at which it began, and the last one it told of."""
    began = BEGAN.search(_read(log, BEGIN_BYTES))
    first = int(began[1]) if began else None
    told = STEP.findall(_read(log, -END_BYTES))
    return first, int(told[-1]) if told else first


def _why(record: Mapping[str, Any]) -> str | None:
    if failure := record.get("failure"):
        return _failed(failure)
    return record.get("reason")


def _failed(failure: Mapping[str, Any]) -> str:
    """'rank 3 on node n2 was ended by SIGKILL'"""
    message, rank, node = failure.get("message") or "", failure.get("rank"), failure.get("node")
    if rank is None:
        return message or "nobody said why"
    who = f"rank {rank}" + (f" on node {node}" if node else "")
    return who + message.removeprefix(f"rank {rank}") if message.startswith(f"rank {rank} ") else f"{who}: {message}"


def _attempt_line(attempt: Mapping[str, Any]) -> str:
    outcome = {"running": "at work", "preempted": "stopped with a checkpoint"}.get(attempt["outcome"], attempt["outcome"])
    line = outcome + (f" after {duration(attempt['seconds'])}" if attempt["seconds"] is not None else "")
    if attempt["to_step"] is not None:
        line += f" at step {attempt['to_step']}, begun at {attempt['from_step']}" if attempt["from_step"] else (
            f" at step {attempt['to_step']}")
    line += f" on {', '.join(attempt['nodes'])}" if attempt["nodes"] else ""
    line += f": {attempt['why']}" if attempt["why"] else ""
    if attempt["lost_steps"] is not None:
        line += f"; the next went on at step {attempt['again_step']}"
        line += f", {duration(attempt['again_s'])} later" if attempt["again_s"] is not None else ""
        line += f": {attempt['lost_steps']} step(s) done again" if attempt["lost_steps"] else ", nothing lost"
    return line


# What SLURM says


def _asked(run: Run, found: Mapping[str, Any]) -> dict[str, Any]:
    said: dict[str, Any] = {"problem": None, "jobs": [], "forgotten": [], "said": [], "queue": found["queue"]}
    job = found["job"] or {}
    if job.get("kind") != "slurm":
        return said
    ids = list(dict.fromkeys([*(record["job"] for record in found["attempts"] if record.get("job")), *job["ids"]]))
    if found["state"] in ("finished", "cancelled", "running") or not ids:
        return said
    from launch import slurm

    try:
        ended = slurm.history(ids)
        said["jobs"] = [{**asdict(ended[id]), "words": slurm.words(ended[id].reason)} for id in ids if id in ended]
        waiting = (found["queue"] or {"ids": []})["ids"]
        said["forgotten"] = [id for id in ids if id not in ended and id not in waiting and id in job["ids"]]
    except UserError as error:
        said["problem"] = error.message
    if found["queue"] is None or found["attempts"]:
        lines = BY_SLURM.findall(_job_text(run, found))
        said["said"] = list(dict.fromkeys(line for line in lines if not NOISE.search(line)))[-5:]
    return said


def _job_text(run: Run, found: Mapping[str, Any]) -> str:
    """What the logs of the last job's node processes hold of the last attempt, or all if there was none: SLURM's own words
    are among it."""
    ids = (found["job"] or {}).get("ids") or []
    logs = [log for log in node_logs(run) if log.job in ids]
    text = "\n".join(_read(log.path, -END_BYTES) for log in logs if log.job == logs[-1].job)
    if not found["attempts"]:
        return text
    marks = list(re.finditer(r"^attempt \d+ of ", text, re.MULTILINE))
    return text[marks[-1].start():] if marks else text


def _ended(job: Mapping[str, Any]) -> str:
    line = f"job {job['id']} ended as {job['state']}" + (f" on {job['node_list']}" if job["node_list"] else "")
    line += f", exit code {job['exit_code']}" if job["exit_code"] else f", signal {job['signal']}" if job["signal"] else ""
    known = job["reason"] not in ("None", "NonZeroExitCode", "")
    return line + (f": {job['words']}" if known else "")


# The cause


def _cause(run: Run, found: Mapping[str, Any], slurm: Mapping[str, Any]) -> dict[str, Any] | None:
    cause: dict[str, Any] = dict.fromkeys(("attempt", "rank", "node", "exit_code", "signal", "message", "hint", "meaning",
                                           "traceback", "log_end", "log"))
    if found["state"] in ("finished", "running", "cancelled") or found["note"] == NOT_SUBMITTED:
        return None
    here = [record for record in found["attempts"] if record.get("submission") == (found["job"] or {}).get("submission")]
    if not here:  # no attempt of this submission
        if found["state"] not in ("failed", "lost"):
            return None
        cause["message"] = _no_attempt(slurm)
        return cause | _job_end(run, found)
    last = here[-1]
    if last["outcome"] not in ("failed", "lost"):
        return None
    failure = last.get("failure") or {}
    failure = {**failure, **(_first(run.paths, last, failure) or {})}
    for key in ("rank", "exit_code", "signal", "hint"):
        cause[key] = failure.get(key)
    cause["attempt"], cause["message"] = last["attempt"], _failed(failure)
    cause["node"] = failure.get("node") or _node_of(last, failure.get("rank"))
    log = None if cause["rank"] is None else run.paths.log(last["attempt"], cause["rank"])
    if log is None or not log.exists():
        return cause | _job_end(run, found, cause["node"])
    text = _read(log, -END_BYTES)
    cause["log"] = str(log)
    if trace := failure.get("traceback") or _traceback(text):
        cause["traceback"] = trace.rstrip().splitlines()[-TRACE_LINES:]
    else:
        cause["log_end"] = text.rstrip().splitlines()[-LOG_LINES // 2:]
    return cause


def _first(paths: RunPaths, attempt: Mapping[str, Any], failure: Mapping[str, Any]) -> dict[str, Any] | None:
    """Another rank that failed, if the one that is recorded has only lost it."""
    kind = _match(f"{failure.get('message')}\n{failure.get('traceback')}\n{failure.get('signal')}")
    if failure.get("rank") is None or kind is None or not kind[0].consequence:
        return None
    for rank, log in paths.logs(attempt["attempt"]).items():
        text = _read(log, -END_BYTES)
        trace = _traceback(text) or next(iter(re.findall(r"^error: .*", text, re.MULTILINE)[-1:]), None)
        other = _match(trace or "")
        if trace and rank != failure["rank"] and not (other and other[0].consequence):
            return {"rank": rank, "node": _node_of(attempt, rank), "exit_code": None, "signal": None, "hint": None,
                    "traceback": trace, "message": f"rank {rank} ended first: {trace.rstrip().splitlines()[-1]}"}
    return None


def _node_of(attempt: Mapping[str, Any], rank: int | None) -> str | None:
    nodes, ranks = attempt.get("nodes") or [], attempt.get("ranks")
    return nodes[rank // (ranks // len(nodes))] if nodes and ranks and rank is not None else None


def _no_attempt(slurm: Mapping[str, Any]) -> str:
    if not slurm["jobs"]:
        return "its job ended before the first attempt, and SLURM knows it no more"
    job = slurm["jobs"][-1]
    how = f"with exit code {job['exit_code']}" if job["exit_code"] else f"as {job['state']}"
    return f"job {job['id']} ended {how} on {job['node_list'] or 'no node'} before the first attempt began"


def _job_end(run: Run, found: Mapping[str, Any], node: str | None = None) -> dict[str, Any]:
    """The end of the newest log of a node process: of the node's, if there is one."""
    ids = (found["job"] or {}).get("ids") or []
    logs = [log for log in node_logs(run) if log.job in ids]
    logs = [log for log in logs if log.job == logs[-1].job]
    nodes = (found["attempts"] or [{}])[-1].get("nodes") or []
    mine = [log for log in logs if node in nodes and log.node == nodes.index(node)] or logs
    if not mine:
        return {"log_end": ["there is no log: no node could write into the run's folder"]} if ids else {}
    lines = [line for line in _read(mine[0].path, -END_BYTES).splitlines() if not NOISE.search(line)]
    return {"log": str(mine[0].path), "log_end": lines[-LOG_LINES:] or ["(nothing)"]}


def _kind(cause: Mapping[str, Any] | None, slurm: Mapping[str, Any]) -> tuple[Cause, re.Match[str]] | None:
    if cause is None:
        return None
    parts = [cause["message"], cause["hint"] if cause["rank"] is not None else None, cause["signal"], *(cause["traceback"] or []),
             *(cause["log_end"] or []), *slurm["said"],
             *(f"{job['state']} {job['reason']} signal {job['signal']}" for job in slurm["jobs"][-1:])]
    return _match("\n".join(filter(None, parts)))


def _match(text: str) -> tuple[Cause, re.Match[str]] | None:
    return next(((cause, found) for cause in CAUSES if (found := re.search(cause.pattern, text))), None)


def _node_in(match: re.Match[str], records: Sequence[Mapping[str, Any]]) -> str | None:
    nodes = (records[-1].get("nodes") or []) if records else []
    return next((node for node in nodes if re.search(rf"\b{re.escape(node)}\b", match[0])), None)


# In words


def _sentence(run: Run, found: Mapping[str, Any], attempts: Sequence[Mapping[str, Any]], cause: Mapping[str, Any] | None) -> str:
    last = attempts[-1] if attempts else None
    state, queue, note = found["state"], found["queue"], found["note"]
    at = f" at step {last['to_step']}" if last and last["to_step"] is not None else ""
    where = f"{at} in attempt {last['attempt']}" if last else ""
    if state == "finished":
        return f"finished at step {found['step']}" + (f" in attempt {len(attempts)}" if len(attempts) > 1 else "")
    if queue and queue["reason"]:
        before = f"; attempt {last['attempt']} {last['outcome']}{at}" + (f": {last['why']}" if last["why"] else "") if last else ""
        return _waits(run, found, last) + before
    if state == "running":
        return _runs(run, found, last)
    if state == "submitted":
        return f"is submitted{f': {note}' if note else ', and has not begun'}"
    if state == "cancelled":
        kept = found["checkpoint"]
        return "was cancelled" + where + (f", with a checkpoint of step {kept}" if kept is not None else "")
    if cause and cause["attempt"] is None:
        return f"{state} before its first attempt: {cause['meaning'] or cause['message']}"
    if cause:
        return f"{state}{where}: {cause['message']}"
    if state == "preempted":
        why = f" ({last['why']})" if last and last["why"] else ""
        return f"stopped{where}{why}, and nothing goes on with it by itself" + (f": {note}" if note else "")
    return f"{state}{where}: " + (note or "its processes are gone and nobody said why")


def _waits(run: Run, found: Mapping[str, Any], last: Mapping[str, Any] | None) -> str:
    queue = found["queue"]
    text = "waits in SLURM's queue"
    if since := _waiting_since(run, found, last):
        text += f" since {_local(since)}"
    place = f", place {queue['position']} of {queue['of']}" if queue["position"] else ""
    text += f"{place}: {queue['reason_words']}"
    text += f" ({queue['reason']})" if queue["reason_words"] != queue["reason"] else ""
    return text + (f"; SLURM's estimate: {_local(queue['start'])}" if queue["start"] else "")


def _waiting_since(run: Run, found: Mapping[str, Any], last: Mapping[str, Any] | None) -> str | None:
    """The end of the attempt before, or its submission; SLURM forgets it when it requeues."""
    number = (found["job"] or {}).get("submission")
    if found["attempts"] and found["attempts"][-1].get("submission") == number:
        return last["ended"]
    return _changed(run.paths.submission(number) / "submission.json") or found["created"]


def _runs(run: Run, found: Mapping[str, Any], last: Mapping[str, Any] | None) -> str:
    if last is None:
        return "is starting"
    job = found["job"] or {}
    if found["note"]:
        return f"runs by its own record; {found['note']}"
    log = run.paths.log(last["attempt"], 0)
    speed = SPEED.findall(_read(log, -END_BYTES))
    if last["to_step"] is None:
        text = f"runs: attempt {last['attempt']} has not begun its first step"
    else:
        text = f"runs: attempt {last['attempt']} is at step {last['to_step']}" + (f" of {found['total']}" if found["total"] else "")
        text += f", {speed[-1][0]}, done in about {speed[-1][1]}" if speed else ""
    changed = _changed(log)
    quiet_s = _between(changed, datetime.now(UTC).isoformat()) if changed else 0
    if quiet_s > STILL_S and job:
        return text + f"; but it has said nothing for {duration(quiet_s)}: it may hang"
    return text + "; nothing is wrong"


# What to do


def _facts(run: Run, found: Mapping[str, Any], cause: Mapping[str, Any] | None) -> dict[str, str | None]:
    """What commands are made of; None where it is not known, or does not apply."""
    from launch.start import named, shown
    from launch.submission import last_submission
    from trainers import yaml12

    paths, job = run.paths, found["job"] or {}
    try:
        submission = last_submission(paths, found.get("sweep")) if job.get("kind") == "slurm" else None
        spec = yaml12.read(paths.spec.read_text(encoding="utf-8"), paths.spec.name).value
    except (OSError, ValueError, UserError):  # what is broken is told elsewhere
        submission, spec = None, {}
    train, ranks, kind = spec.get("train") or {}, None, "--procs"
    begun = [record for record in found["attempts"] if record.get("ranks")]
    if submission:
        ranks, kind = submission.resources.ranks, "--gpus" if submission.resources.gpus else "--procs"
    elif begun:
        ranks, kind = begun[-1]["ranks"], "--gpus" if begun[-1]["device"] == "cuda" else "--procs"
    share = train["batch_size"] // ranks if train and ranks else 0
    micro = train.get("micro_batch_size") or share
    where = f" {kind} {ranks}" if ranks else ""
    if submission:
        where += f" --nodes {submission.resources.nodes} --cluster {shlex.quote(submission.cluster.name)}"
    name = shlex.quote(named(paths))
    kept = found["checkpoint"]
    return {
        "run": name, "resume": f"launch resume {name}",
        "onward": f"goes on from the checkpoint of step {kept}" if kept is not None else "begins anew: it has no checkpoint",
        "new": f"launch {shlex.quote(shown(paths.spec))}" if train else None, "where": where,
        "smaller": str(max(size for size in range(1, micro) if share % size == 0)) if micro > 1 else None,
        "more": f"{kind} {2 * ranks}" if train and share % 2 == 0 and share and not train.get("micro_batch_size") else None,
        "lower": f"{spec['optim']['lr'] / 3:.2g}" if train and spec.get("optim") else None,
        "grace_s": str(round(3 * float(spec["run"]["grace_s"]))) if spec.get("run") else None,
        "memory": _memory(submission), "time": _longer(submission),
        "cluster": shlex.quote(submission.cluster.name) if submission else None,
        "node": cause["node"] if cause and submission else None, "folder": shlex.quote(shown(paths.root)),
    }


def _memory(submission: Any) -> str | None:
    """Twice the memory that was asked for."""
    if submission is None:
        return None
    from launch.batch import options_of

    asked = options_of(submission)
    for key in ("mem", "mem-per-cpu"):
        if found := re.fullmatch(r"(\d+)([KMGT]?)", str(asked.get(key, ""))):
            return f"sbatch.{key}={2 * int(found[1])}{found[2]}"
    return "sbatch.mem=SIZE"


def _longer(submission: Any) -> str | None:
    if submission is None:
        return None
    from launch.batch import slurm_time
    from launch.cluster import seconds

    return slurm_time(2 * seconds(submission.time or submission.cluster.time))


def _next(found: Mapping[str, Any], cause: Mapping[str, Any] | None, kind: Cause | None,
          facts: Mapping[str, str | None]) -> list[dict[str, str]]:
    going = {"running": "--follow", "submitted": "--follow"}
    state = found["state"]
    if state == "finished":
        return []
    if found["queue"] or state == "running":
        return [{"command": f"launch logs {facts['run']} {going['running']}", "why": "shows it as it goes on"},
                {"command": f"launch cancel {facts['run']}", "why": "stops it, with a checkpoint if it is at work"}]
    advice = kind.advice if kind else ()
    steps = [{"command": command, "why": _filled(why, facts)} for text, why in advice if (command := _filled(text, facts))]
    if not any(step["command"].endswith(facts["resume"]) for step in steps):
        mend = "once that is mended: " if cause else ""
        steps.append({"command": facts["resume"], "why": mend + facts["onward"]})
    return steps


def _filled(template: str, facts: Mapping[str, str | None], match: re.Match[str] | None = None) -> str | None:
    """None if a fact that it names is not known."""
    groups = match.groups() if match else ()
    names = [name for _, name, _, _ in Formatter().parse(template) if name]
    if any(facts.get(name) is None for name in names if not name.isdigit()):
        return None
    return template.format(*groups, **facts)


# Files and times


def _read(file: Path, size: int) -> str:
    """The first `size` bytes of a file, or the last if it is negative; "" if there is none."""
    try:
        with open(file, "rb") as opened:
            if size < 0:
                opened.seek(max(0, opened.seek(0, os.SEEK_END) + size))
            return opened.read(abs(size)).decode("utf-8", "replace")
    except OSError:
        return ""


def _traceback(text: str) -> str | None:
    """The last one, without what was printed after it."""
    start = text.rfind("Traceback (most recent call last)")
    if start < 0:
        return None
    lines = text[start:].splitlines()
    end = next((i for i, line in enumerate(lines[1:], 2) if line and not line.startswith(" ")), len(lines))
    return "\n".join(lines[:end])


def _changed(file: Path) -> str | None:
    try:
        return datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat(timespec="seconds")
    except OSError:
        return None


def _between(first: str | None, second: str | None) -> float | None:
    if not first or not second:
        return None
    return max(0.0, (datetime.fromisoformat(second) - datetime.fromisoformat(first)).total_seconds())


def _local(time: str) -> str:
    return datetime.fromisoformat(time).astimezone().strftime("%Y-%m-%d %H:%M:%S")
