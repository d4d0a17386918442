"""Why a job waits, and why SLURM stopped or ended it, in plain words."""

from __future__ import annotations

import re
import signal

HELD_BY_OWNER = "JobHeldUser"  # also of a job that was submitted on hold
# (pattern for SLURM's reason, plain words); the first pattern that matches counts. Other reasons are shown as SLURM names them.
WORDS = (
    (r"Priority$", "jobs of higher priority come first"),
    (r"Resources$", "it waits for nodes, cores or GPUs to become free"),
    (r"DependencyNeverSatisfied", "a job that it depends on did not end as required: it cannot start as it is"),
    (r"Dependency", "it waits for another job to end"),
    (r"BeginTime", "its start time has not come (by default, SLURM delays a requeued job by two minutes)"),
    (r"Cleaning", "the nodes of its last attempt are still being cleaned up"),
    (r"JobArrayTaskLimit", "its job array already runs as many elements as it may run at once"),
    (HELD_BY_OWNER, "it was held by its owner: `scontrol release` lets it start"),
    (r"JobHeldAdmin", "it was held by an administrator"),
    (r"job requeued in held state", "it was requeued and put on hold (`scontrol requeuehold`): `scontrol release` lets it start"),
    (r"JobHoldMaxRequeue", "it is held after too many failed starts: `scontrol release` lets it start"),
    (r"launch failed requeued held", "it is held because a node could not start it: `scontrol release` lets it start"),
    (r".*\b[Hh]e?ld\b", "it is held: `scontrol release` lets it start"),
    (r"ReqNodeNotAvail|.*Nodes required for job are DOWN", "nodes that it needs are down, draining or reserved"),
    (r"PartitionDown|PartitionInactive", "its partition starts no jobs at present"),
    (r"PartitionNodeLimit", "its partition does not allow jobs with this number of nodes"),
    (r"PartitionTimeLimit", "its partition does not allow jobs with this time limit"),
    (r"NodeDown", "a node that it needs is down"),
    (r"BadConstraints", "no node has everything that it asks for: it will never start unless it is changed"),
    (r"AccountNotAllowed|InvalidAccount", "its account does not exist, or may not use this partition"),
    (r"QOSNotAllowed|InvalidQOS", "its QOS does not exist, or may not be used in this partition"),
    (r"Licenses", "it waits for a licence"),
    (r"Reservation|ReqResv", "its reservation has not started, or no longer exists"),
    (r"(QOS|Assoc)\w*(PerJob|PerNode)", "it asks for more than its account or QOS allows one job"),
    (r"QOSMin", "it asks for less than its QOS requires"),
    (r"(QOSMax\w*PerUser|AssocMax)", "you already use as much as your account or QOS allows one user"),
    (r"(QOSGrp|QOS\w*Limit|Max\w+PerAccount|AssocGrp|Association|AccountingPolicy)",
     "your account or QOS already uses as much as it may use at once"),
    (r"JobLaunchFailure", "a node could not start it: that node may not see the run's folder"),
    (r"PowerNotAvail|PowerReserved", "it waits for electric power"),
    (r"BurstBuffer", "it waits for the burst buffer"),
    (r"Prolog", "its nodes are being prepared"),
    (r"None$", "SLURM has not looked at it yet"),
)
# A held job starts only after somebody has released it.
HELD = re.compile(r"JobHeld|JobHold|.*\b[Hh]eld\b")
# A job that waits for one of these reasons does not compete for nodes yet.
NOT_ELIGIBLE = re.compile(rf"Dependency|BeginTime|{HELD.pattern}")
# What SLURM writes into a job's log when it stops the job. Without "DUE TO", a person has used scancel.
STOPPED = re.compile(r"\*\*\* (?:JOB|STEP) \S+ ON (\S+) CANCELLED AT \S+(?: DUE TO ([A-Z ]+))?")
CANCELLED = "cancelled with scancel"
REQUEUED = "requeued with scontrol"
STOP_WORDS = {"": CANCELLED, "PREEMPTION": "preempted: another job took its nodes", "JOB REQUEUE": REQUEUED,
              "TIME LIMIT": "time limit", "NODE FAILURE": "a node failed"}


def in_words(reason: str) -> str:
    """Return in plain words why a job waits."""
    for pattern, plain in WORDS:
        if re.match(pattern, reason):
            return plain
    return reason


def in_words_with_code(reason: str) -> str:
    """Return in plain words why a job waits, followed by SLURM's own word in brackets, if there is one."""
    plain = in_words(reason)
    return plain if reason in (plain, "None") else f"{plain} ({reason})"


def of_stop(log: str) -> str | None:
    """Return in plain words why SLURM has stopped a job, as the job's log tells; None if the log does not tell."""
    said = STOPPED.findall(log)
    if not said:
        return None
    cause = said[-1][1].strip()
    return STOP_WORDS.get(cause, f"stopped by SLURM: {cause.lower()}")


def of_end(reason: str, number: int | None) -> str:
    """Return in plain words why a job ended, from SLURM's reason and the signal that ended the job's script; "" if not known."""
    # SLURM calls it a launch failure too if a signal ended the script. For a real one it has numbers that are no signals.
    if reason == "JobLaunchFailure" and number in list(signal.Signals):
        return f"{signal.Signals(number).name} ended the job's script"
    words = in_words(reason)
    return words if words != reason and reason != "None" else ""
