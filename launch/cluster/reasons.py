"""Why a job waits, in plain words."""

from __future__ import annotations

import re

# A pending reason in plain words; the first that fits. What is missing here is shown as SLURM says it.
WORDS = (
    (r"Priority$", "jobs of higher priority come first"),
    (r"Resources$", "it waits for nodes, cores or GPUs to become free"),
    (r"DependencyNeverSatisfied", "a job that it depends on did not end as it must: it will never start"),
    (r"Dependency", "it waits for another job to end"),
    (r"BeginTime", "its start time has not come (SLURM lets a requeued job wait, two minutes by default)"),
    (r"Cleaning", "the nodes of its last attempt are still being cleaned up"),
    (r"JobArrayTaskLimit", "as many elements of its array run as may run at once"),
    (r"JobHeldUser", "it was held by its owner: `scontrol release` lets it go"),
    (r"JobHeldAdmin", "it was held by an administrator"),
    (r"JobHoldMaxRequeue|launch failed requeued held|RequeueExitHold|.*[Rr]equeued? (in )?held",
     "it is held after too many failed starts: `scontrol release` lets it go"),
    (r"ReqNodeNotAvail|.*Nodes required for job are DOWN", "nodes that it needs are down, draining or reserved"),
    (r"PartitionDown|PartitionInactive", "its partition takes no jobs at present"),
    (r"PartitionNodeLimit", "its partition allows no job of so many nodes"),
    (r"PartitionTimeLimit", "its partition allows no job of this length"),
    (r"NodeDown", "a node that it needs is down"),
    (r"BadConstraints", "no node has all that it asks for: it will never start as it is"),
    (r"AccountNotAllowed|InvalidAccount", "its account may not use this partition, or is none"),
    (r"QOSNotAllowed|InvalidQOS", "its QOS may not be used in this partition, or is none"),
    (r"Licenses", "it waits for a licence"),
    (r"Reservation|ReqResv", "its reservation has not begun, or is gone"),
    (r"(QOS|Assoc)\w*(PerJob|PerNode)", "it asks for more than a job of its account or QOS may have"),
    (r"QOSMin", "it asks for less than its QOS demands"),
    (r"(QOSMax\w*PerUser|AssocMax)", "you use as much at once as your account or QOS allows a user"),
    (r"(QOSGrp|QOS\w*Limit|Max\w+PerAccount|AssocGrp|Association|AccountingPolicy)",
     "your account or QOS uses as much as it may at once"),
    (r"JobLaunchFailure", "a node could not start it: it may not see the run's folder"),
    (r"PowerNotAvail|PowerReserved", "it waits for electric power"),
    (r"BurstBuffer", "it waits for the burst buffer"),
    (r"Prolog", "its nodes are being prepared"),
    (r"None$", "SLURM has not looked at it yet"),
)
NOT_ELIGIBLE = re.compile(r"Dependency|BeginTime|JobHeld|JobHold|.*[Hh]eld$")  # does not compete for nodes yet


def words(reason: str) -> str:
    """A pending reason in plain words."""
    for pattern, plain in WORDS:
        if re.match(pattern, reason):
            return plain
    return reason


def told(reason: str) -> str:
    """A pending reason in plain words, with SLURM's own word behind, if it has one."""
    plain = words(reason)
    return plain if reason in (plain, "None") else f"{plain} ({reason})"
