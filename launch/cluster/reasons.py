"""Why a job waits, in plain words."""

from __future__ import annotations

import re

# (pattern for SLURM's reason, plain words); the first pattern that matches counts. Other reasons are shown as SLURM names them.
WORDS = (
    (r"Priority$", "jobs of higher priority come first"),
    (r"Resources$", "it waits for nodes, cores or GPUs to become free"),
    (r"DependencyNeverSatisfied", "a job that it depends on did not end as required: it will never start"),
    (r"Dependency", "it waits for another job to end"),
    (r"BeginTime", "its start time has not come (by default, SLURM delays a requeued job by two minutes)"),
    (r"Cleaning", "the nodes of its last attempt are still being cleaned up"),
    (r"JobArrayTaskLimit", "its job array already runs as many elements as it may run at once"),
    (r"JobHeldUser", "it was held by its owner: `scontrol release` lets it start"),
    (r"JobHeldAdmin", "it was held by an administrator"),
    (r"JobHoldMaxRequeue|launch failed requeued held|RequeueExitHold|.*[Rr]equeued? (in )?held",
     "it is held after too many failed starts: `scontrol release` lets it start"),
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
# A job that waits for one of these reasons does not compete for nodes yet.
NOT_ELIGIBLE = re.compile(r"Dependency|BeginTime|JobHeld|JobHold|.*[Hh]eld$")


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
