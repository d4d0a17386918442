"""What can have happened to a run, by the texts that tell of it: what each means, and the commands that may help."""

from __future__ import annotations

from typing import NamedTuple


class Cause(NamedTuple):
    """What a text that fits `pattern` means, and the commands that may help, each with the reason. In braces: the
    pattern's groups, by number, and what explain.py's `_facts` knows; a command of which something is not known is left out."""

    pattern: str
    meaning: str
    advice: tuple[tuple[str, str], ...] = ()
    consequence: bool = False  # of another rank's end


RESUME = ("{resume}", "{onward}")
MENDED = ("{resume}", "once that is mended: {onward}")
NODES = ("launch doctor --cluster {cluster} --job", "tries its nodes and their network in a job of a minute, and names those "
                                                    "that fail")
ELSEWHERE = ("{resume} sbatch.exclude={node}", "without this node, if it was the node's fault")
MEMORY = ("{resume} {memory}", "with more memory a node, if that was it")
LESS = (("{resume} {more}", "on twice as many ranks, each of which takes half as much of a batch"),
        ("{new} train.micro_batch_size={smaller}{where}", "a new run of the same spec, with its batches in smaller parts"))

# The first that fits: what another rank's end brings with it comes last.
CAUSES = (
    Cause(r"hung (?:after step|before its first step)[^\n]*its process was stopped",
          "something stopped its process (SIGSTOP, a debugger), and nothing let it go on", (RESUME, ELSEWHERE)),
    Cause(r"hung (?:after step|before its first step)[^\n]*waits for a disk",
          "a file system does not answer", (ELSEWHERE, RESUME)),
    Cause(r"hung (?:after step|before its first step)[^\n]*silent for",
          "it came no further for longer than run.hang_s; where it was, the stack says",
          (("launch logs {run} --rank K", "the logs of all ranks hold their stacks"), RESUME, ELSEWHERE,
           ("{new} run.hang_s={hang_s}{where}", "a new run that may be silent for longer, if it was only slow"))),
    Cause(r"did not stop within ([\d.]+) s of \w+", "a step and a checkpoint took longer than run.grace_s, {0} s",
          (RESUME, ("{new} run.grace_s={grace_s}{where}", "a new run that is given longer; `defaults: {{run: {{grace_s: "
                                                          "{grace_s}}}}}` in a cluster's file gives it to all"))),
    Cause(r"ran out of memory with a micro-batch of (\d+)", "the memory of the GPU, or of the CPU rank, was full with a "
          "micro-batch of {0}", (*LESS, ("{plan}{where}", "what of it would fit"))),
    Cause(r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED", "the GPU's memory was full", LESS),
    Cause(r"oom[-_]kill|state OUT_OF_MEMORY|Out Of Memory|OOM Killed|Exceeded (?:job|step) memory limit|Cannot allocate memory"
          r"|(?<!Of)MemoryError|can't allocate memory|not enough memory: you tried",
          "the host's memory, or the job's share of it, was full", (("{resume} {memory}", "with more memory a node"), *LESS)),
    Cause(r"the loss of update .* is \S+ at step|the gradient of .* is not finite|overflowed in \d+ steps in a row",
          "training diverged, and would again",
          (("{new} optim.lr={lower}{where}", "a new run with a lower learning rate"),
           ("{new} optim.clip_norm=1{where}", "a new run with a limit to its gradients' norm"))),
    Cause(r"No space left on device|Disk quota exceeded", "the disk, or your share of it, is full",
          (("df -h {folder}", "how full it is; old runs and checkpoints may go"), MENDED)),
    Cause(r"No module named '([^']+)'", "the Python that ran it has no module `{0}`",
          (("launch doctor --cluster {cluster}", "whether what launch needs is installed"),
           ("{resume}", "once it is; a module of your own must lie in the folder, or git work tree, of the task"))),
    Cause(r"EADDRINUSE|[Aa]ddress already in use", "another process had taken the port",
          (("{resume}", "a new attempt takes another port: {onward}"),)),
    Cause(r"needs GPU \d+; torch \S+ sees (\d+)", "torch sees {0} GPU(s) there, fewer than the run was given",
          (("nvidia-smi", "on that machine: whether the driver is there, and fits torch's CUDA"), NODES, ELSEWHERE, MENDED)),
    Cause(r"uncorrectable ECC|CUDA error: (?:unspecified launch failure|unknown error)|\bXid\b|CUDA-capable device"
          r"|CUDA driver version is insufficient|fallen off the bus", "a GPU, or its driver, is not in order",
          (ELSEWHERE, NODES, MENDED)),
    Cause(r"SIGBUS|[Bb]us error", "shared memory (/dev/shm) was full, or a file was cut while it was mapped",
          (("df -h /dev/shm", "on its machine; a container may have little"), ELSEWHERE, RESUME)),
    Cause(r"signal 53\b|Slurmd could not connect IO",  # 53: SLURM's own, for an output file that it could not open
          "a node could not write into {folder}: most likely it cannot see that folder",
          (NODES, ("{new}{where} --runs DIR", "a new run, in a folder that this host and all nodes share; `runs: DIR` in the "
                                              "cluster's file sets it for all"), ELSEWHERE)),
    Cause(r"execve\(\): (?:bad interpreter\()?([^\n]+?)\)?: (?:No such file|Permission denied)",
          "there is no `{0}` on the node, or it may not be run",
          (NODES, ("{resume}", "once `python:`, `prefix:` or `setup:` in the file of cluster {cluster} is right: {onward}"))),
    Cause(r"slurm_script: line \d+: ([^\n]*)", "a line of `setup:` in the file of cluster {cluster} failed: {0}", (MENDED,)),
    Cause(r"couldn't chdir to `([^']+)'", "the node cannot see {0}", (NODES, MENDED)),
    Cause(r"of \d+ did not come|head node's process could not be reached|has no interface `",
          "the nodes' processes did not find each other: `interface:` in the cluster's file names the network between them",
          (NODES, ELSEWHERE, RESUME)),
    Cause(r"DUE TO NODE FAILURE|Node failure on|state NODE_FAIL|node \S+ (?:went|is) down|SLURM ended the job before",
          "a node of its job failed", (RESUME, ("sinfo -R", "which nodes are down, and why"))),
    Cause(r"DUE TO TIME LIMIT|state (?:TIMEOUT|DEADLINE)", "the job's time was over before a checkpoint was written at its end",
          (("{resume} --time {time}", "with more time: {onward}"),)),
    Cause(r"DUE TO PREEMPTION|state PREEMPTED", "another job took its nodes", (RESUME,)),
    Cause(r"node process on (\S+) (?:is gone|was killed)",
          "something killed launch's own process there: the kernel for want of memory, somebody, or a failing node",
          (RESUME, MEMORY, ELSEWHERE)),
    Cause(r"SIGKILL", "it was killed from outside: by the kernel for want of memory, or by somebody",
          (RESUME, MEMORY, ELSEWHERE)),
    Cause(r"SIGSEGV|SIGILL|SIGABRT|SIGFPE", "it crashed in native code",
          (("PYTHONFAULTHANDLER=1 {resume}", "another crash then shows where in Python it was"), ELSEWHERE)),
    Cause(r"unhandled (?:system|cuda) error|nccl(?:System|UnhandledCuda|Internal)Error",
          "NCCL could not use a GPU, or the network between ranks",
          (NODES, ("NCCL_DEBUG=INFO {resume}", "its logs then name the call that fails"))),
    Cause(r"Permission denied", "a file or folder may not be read or written",
          (("ls -ld {folder}", "who may write there"), MENDED)),
    Cause(r"before the first attempt began", "launch did not come to start a rank: a line of `setup:` in the file of cluster "
          "{cluster} may have ended the job", (NODES, MENDED)),
    Cause(r"taken the run over", "a newer attempt had taken the run over", (RESUME,), consequence=True),
    Cause(r"collective operation timeout|Timed out waiting \d+ms|Socket Timeout",
          "a rank waited for others that did not come: one hung, or went another way",
          (("launch logs {run} --rank K", "the last words of each rank: which differs?"), NODES, RESUME), consequence=True),
    Cause(r"Connection (?:closed|reset) by peer|Broken pipe|Connection refused|remote process exited|ncclRemoteError"
          r"|recvValue failed|failed to recv", "it had lost another rank, of whose end nothing is known",
          (("launch logs {run} --rank K", "the last words of each rank"), RESUME), consequence=True),
)
# What a job that waits may need, by SLURM's reason.
WAITING = (
    (r"JobHeldUser|JobHoldMaxRequeue|.*[Hh]eld$", ("scontrol release {jobs}", "lets it start")),
    (r"Partition\w+Limit|BadConstraints|DependencyNeverSatisfied",
     ("launch cancel {run}", "it will never start as it is; `{resume}` then submits it anew, with other options")),
    (r"ReqNodeNotAvail|NodeDown", ("sinfo -R", "which nodes are down, and why")),
)
GOING = (("launch logs {run} --follow", "shows it as it goes on"), ("launch cancel {run}", "{stop}"))
