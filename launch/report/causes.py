"""The known causes of failures: the texts that show each cause, what it means, and the commands that may help."""

from __future__ import annotations

from typing import NamedTuple


class Cause(NamedTuple):
    """One known cause of a failure.

    `meaning` and `advice` are templates. A number in braces stands for that group of `pattern`, a name in braces for a fact
    from `_facts` in explain.py. A command is left out if one of its facts is not known.
    """

    pattern: str  # searched for in the messages, log lines and SLURM states of a failure
    meaning: str
    advice: tuple[tuple[str, str], ...] = ()  # (command, reason to run it)
    consequence: bool = False  # whether this failure only follows from the end of another rank


RESUME = ("{resume}", "{onward}")
RESUME_AFTER_FIX = ("{resume}", "after you have fixed this: {onward}")
MORE_PATIENCE = ("{resume} train.patience={patience}", "trains on with more patience: {onward}")
NODES = ("launch doctor --cluster {cluster} --job", "tests the nodes and their network in a job of about a minute, and names the "
                                                    "nodes that fail")
ELSEWHERE = ("{resume} sbatch.exclude={node}", "without this node, if the node caused the failure")
MEMORY = ("{resume} {memory}", "with more memory per node, if memory ran out")
LESS = (("{resume} {more}", "on twice as many ranks, each with half as large a share of the batch"),
        ("{new} train.micro_batch_size={smaller}{where}", "a new run of the same spec with a smaller micro-batch"))

# The first cause whose pattern matches is taken. Consequences of another rank's end come last.
CAUSES = (
    Cause(r"hung (?:after step|before its first step)[^\n]*its process was stopped",
          "its process was stopped (by SIGSTOP or a debugger) and not continued", (RESUME, ELSEWHERE)),
    Cause(r"hung (?:after step|before its first step)[^\n]*waits for a disk",
          "a file system does not answer", (ELSEWHERE, RESUME)),
    Cause(r"hung (?:after step|before its first step)[^\n]*in its report: silent for",
          "the task's `report` took longer than eval.report_s; its stack shows where it was",
          (("launch logs {run} --rank K", "shows the stack of rank K; the log of every rank has one"), RESUME,
           ("{resume} eval.report_s={report_s}", "with a longer limit, if the report was only slow: {onward}"))),
    Cause(r"hung (?:after step|before its first step)[^\n]*silent for",
          "it made no progress for longer than run.hang_s; its stack shows where it was",
          (("launch logs {run} --rank K", "shows the stack of rank K; the log of every rank has one"), RESUME, ELSEWHERE,
           ("{resume} run.hang_s={hang_s}", "with a longer limit, if the rank was only slow: {onward}"))),
    Cause(r"did not stop within ([\d.]+) s of \w+", "a step and a checkpoint took longer than run.grace_s ({0} s)",
          (("{resume} run.grace_s={grace_s}", "with a longer limit: {onward}"), RESUME)),
    Cause(r"ran out of memory with a micro-batch of (\d+)", "the memory of the GPU, or of the CPU rank, was too small for a "
          "micro-batch of {0}", (*LESS, ("{plan}{where}", "shows what fits in memory"))),
    Cause(r"ran out of memory in an evaluation, (\d+ \w+) at a time", "the memory of the GPU, or of the CPU rank, was too "
          "small to evaluate {0} at a time", (("{resume} {less_evaluated}", "in smaller batches: {onward}"),)),
    Cause(r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|unable to find an engine to execute",
          "the GPU's memory was full", LESS),
    Cause(r"oom[-_]kill|state OUT_OF_MEMORY|Out Of Memory|OOM Killed|Exceeded (?:job|step) memory limit|Cannot allocate memory"
          r"|(?<!Of)MemoryError|can't allocate memory|not enough memory: you tried",
          "the host's memory, or the job's share of it, was full", (("{resume} {memory}", "with more memory per node"), *LESS)),
    Cause(r"the loss of update .* is \S+ at step|the gradient of .* is not finite|overflowed in \d+ steps in a row",
          "training diverged, and would diverge again",
          (("{new} optim.lr={lower}{where}", "a new run with a lower learning rate"),
           ("{new} optim.clip_norm=1{where}", "a new run with gradient clipping"))),
    Cause(r"No space left on device|Disk quota exceeded", "the disk is full, or your quota is used up",
          (("df -h {folder}", "shows how full the disk is; you can delete old runs and checkpoints"), RESUME_AFTER_FIX)),
    Cause(r"No module named '([^']+)'", "the Python that ran it has no module `{0}`",
          (("launch doctor --cluster {cluster}", "checks that the packages that launch needs are installed"),
           ("{resume}", "after you have installed it; a module of yours must be in the folder, or git work tree, of the task"))),
    Cause(r"EADDRINUSE|[Aa]ddress already in use", "another process was using the port",
          (("{resume}", "a new attempt uses another port: {onward}"),)),
    Cause(r"needs GPU \d+; torch \S+ sees (\d+)", "torch sees {0} GPU(s) on that machine, fewer than the run was given",
          (("nvidia-smi", "on that machine: shows whether the driver is installed, and fits torch's CUDA"), NODES, ELSEWHERE,
           RESUME_AFTER_FIX)),
    Cause(r"uncorrectable ECC|CUDA error: (?:unspecified launch failure|unknown error)|\bXid\b|CUDA-capable device"
          r"|CUDA driver version is insufficient|fallen off the bus", "a GPU or its driver does not work properly",
          (ELSEWHERE, NODES, RESUME_AFTER_FIX)),
    Cause(r"SIGBUS|[Bb]us error", "shared memory (/dev/shm) was full, or a memory-mapped file was truncated",
          (("df -h /dev/shm", "on that machine: shows how full it is; a container may have little"), ELSEWHERE, RESUME)),
    Cause(r"signal 53\b|Slurmd could not connect IO",  # 53: SLURM's own number, for an output file that SLURM could not open
          "a node could not write to {folder}: the node probably cannot see that folder",
          (NODES, ("{new}{where} --runs DIR", "a new run in a folder that this host and all nodes share; `runs: DIR` in the "
                                              "cluster's file sets it for all runs"), ELSEWHERE)),
    Cause(r"execve\(\): (?:bad interpreter\()?([^\n]+?)\)?: (?:No such file|Permission denied)",
          "`{0}` does not exist on the node, or cannot be executed there",
          (NODES, ("{resume}", "after you have corrected `python:`, `prefix:` or `setup:` in the file of cluster {cluster}: "
                               "{onward}"))),
    Cause(r"slurm_script: line \d+: ([^\n]*)", "a line of `setup:` in the file of cluster {cluster} failed: {0}",
          (RESUME_AFTER_FIX,)),
    Cause(r"couldn't chdir to `([^']+)'", "the node cannot see {0}", (NODES, RESUME_AFTER_FIX)),
    Cause(r"of \d+ did not come|head node's process could not be reached|has no interface `",
          "the nodes could not connect to each other; `interface:` in the cluster's file names the network between them",
          (NODES, ELSEWHERE, RESUME)),
    Cause(r"DUE TO NODE FAILURE|Node failure on|state NODE_FAIL|node \S+ (?:went|is) down|SLURM ended the job before",
          "a node of its job failed", (RESUME, ("sinfo -R", "shows which nodes are down, and why"))),
    Cause(r"DUE TO TIME LIMIT|state (?:TIMEOUT|DEADLINE)", "the job reached its time limit before it wrote a last checkpoint",
          (("{resume} --time {time}", "with more time: {onward}"),)),
    Cause(r"DUE TO PREEMPTION|state PREEMPTED", "another job took its nodes", (RESUME,)),
    Cause(r"node process on (\S+(?:, \S+)*) gave no sign of life",
          "launch's own process on that node was stopped (by SIGSTOP or a debugger), or its host does not answer",
          (RESUME, ELSEWHERE)),
    Cause(r"(\d+) attempts in a row ended at the time limit", "the time limit is too short for this run: it starts again and "
          "again and gets no further",
          (("{resume} --time {time}", "with more time: {onward}"),
           ("{resume} run.grace_s={grace_s}", "with more time for the last checkpoint, if that took too long"))),
    Cause(r"node process on (\S+(?:, \S+)*) (?:is gone|are gone|was killed)",
          "something killed launch's own process on that node: the kernel when memory ran out, a person, or a failing node",
          (RESUME, MEMORY, ELSEWHERE)),
    Cause(r"SIGKILL", "it was killed from outside: by the kernel when memory ran out, or by a person",
          (RESUME, MEMORY, ELSEWHERE)),
    Cause(r"SIGSEGV|SIGILL|SIGABRT|SIGFPE", "it crashed in native code",
          (("PYTHONFAULTHANDLER=1 {resume}", "if it crashes again, the log then shows where in Python"), ELSEWHERE)),
    Cause(r"unhandled (?:system|cuda) error|nccl(?:System|UnhandledCuda|Internal)Error",
          "NCCL could not use a GPU, or the network between ranks",
          (NODES, ("NCCL_DEBUG=INFO {resume}", "the logs then name the call that fails"))),
    Cause(r"Permission denied", "you have no permission to read or write a file or folder",
          (("ls -ld {folder}", "shows who may write there"), RESUME_AFTER_FIX)),
    Cause(r"before the first attempt started", "launch did not start any rank; a line of `setup:` in the file of cluster "
          "{cluster} may have ended the job", (NODES, RESUME_AFTER_FIX)),
    Cause(r"taken the run over", "a newer attempt had taken over the run", (RESUME,), consequence=True),
    Cause(r"collective operation timeout|Timed out waiting \d+ms|Socket Timeout",
          "a rank waited for other ranks that did not arrive: one of them hung, or took another path through the code",
          (("launch logs {run} --rank K", "compare the ends of all ranks' logs: which rank differs?"), NODES, RESUME),
          consequence=True),
    Cause(r"Connection (?:closed|reset) by peer|Broken pipe|Connection refused|remote process exited|ncclRemoteError"
          r"|recvValue failed|failed to recv", "it lost the connection to another rank, and why that rank ended is not known",
          (("launch logs {run} --rank K", "shows the end of each rank's log"), RESUME), consequence=True),
)
# What may help a job that waits, by SLURM's reason for the wait.
WAITING = (
    (r"JobHeldUser|JobHoldMaxRequeue|.*\b[Hh]eld\b", ("scontrol release {jobs}", "lets the job start")),
    (r"DependencyNeverSatisfied", ("launch resume {after}", "continues the run for which this one waits; this one then follows")),
    (r"Partition\w+Limit|BadConstraints|DependencyNeverSatisfied",
     ("launch cancel {run}", "this job cannot start as it is; then `{resume}` submits it again, with other options")),
    (r"ReqNodeNotAvail|NodeDown", ("sinfo -R", "shows which nodes are down, and why")),
)
# For a run that continues by itself.
GOING = (("launch logs {run} --follow", "shows the log as it grows"), ("launch cancel {run}", "{stop}"))
