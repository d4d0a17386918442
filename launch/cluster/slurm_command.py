"""Run one of SLURM's commands: in a clean environment, with patience, and with an error that says what went wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from trainers.contract.errors import UserError

# Variables that SLURM's commands read, or that an enclosing job, torchrun, accelerate or a run has set. A job must not
# inherit them.
DROPPED = re.compile(r"(SLURM|SLURMD|SBATCH|SRUN|SALLOC|SQUEUE|SINFO|SCANCEL|SACCT|SCONTROL|PMI|PMIX|TORCHELASTIC|SUBMITIT)_"
                     r"|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)$|ROLE_NAME$|MASTER_(ADDR|PORT)$"
                     r"|(CUDA|ROCR|HIP)_VISIBLE_DEVICES$|GPU_DEVICE_ORDINAL$|ZE_AFFINITY_MASK$"
                     r"|LAUNCH_(RUN_DIR|ATTEMPT|EVENTS)$")
SAY_AFTER_S = 2.0    # a person who waits longer than this for a command is told so
TRIES = 3            # of a command that changes nothing the second time
TRY_AGAIN_S = 10.0   # a command is not tried again after this time
# Words of errors that come again however often the command is tried.
LASTING = re.compile(r"invalid|unrecognized|disabled|not supported|permission|denied|not found|does not exist|not installed"
                     r"|already (finished|comple)|no longer|can ?not be|not available|allocation failure|violates"
                     r"|permitted|exceeds?\b|slurm\.conf|configuration (source|file)", re.IGNORECASE)


def environment(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment for SLURM's commands: `env` without the variables that would change them unexpectedly.

    sbatch passes its environment on to the job.
    """
    return {key: value for key, value in env.items() if (value if key == "SLURM_CONF" else not DROPPED.match(key))}


def call(*words: str, timeout_s: float = 30, check: bool = True, stdin: str | None = None) -> str:
    """Run a command of SLURM and return what it prints. A command that can be repeated is tried again if it fails.

    Args:
        words: the command and its arguments.
        check: whether to raise if the command fails.
        stdin: text for the command's standard input.

    Raises:
        UserError: the command is not installed, did not answer in time, or failed (the error quotes its output).
    """
    env = environment()
    conf = env.get("SLURM_CONF")
    if conf and not os.path.exists(conf):  # SLURM's commands would wait a minute for the file
        raise UserError(f"SLURM_CONF is `{conf}`, but this file does not exist", "set it to an existing file, or unset it")
    if words[0] != "sbatch":  # sbatch passes its environment on to the job
        env["LC_ALL"] = "C"
    began = time.monotonic()
    for tries in range(1, TRIES + 1):
        code, output, errors = _run(words, env, stdin, timeout_s)
        if not code:
            return output
        complaint = _complaint(words[0], errors) or _complaint(words[0], output) or f"exit code {code}"
        late = time.monotonic() - began > TRY_AGAIN_S
        if tries == TRIES or late or LASTING.search(complaint) or not _repeatable(words):
            break
        time.sleep(tries / 2)
    if check:
        raise UserError(f"`{words[0]}` failed: {complaint}", _hint(complaint))
    return output


def _run(words: Sequence[str], env: Mapping[str, str], stdin: str | None, timeout_s: float) -> tuple[int, str, str]:
    """Run a command. Returns its exit code, its output and its errors."""
    try:
        process = subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        raise UserError(f"there is no SLURM here: `{words[0]}` is not installed",
                        "use a host that has SLURM's commands, such as the cluster's login node") from None
    with process:
        try:
            try:
                output, errors = process.communicate(stdin, timeout=min(SAY_AFTER_S, timeout_s))
            except subprocess.TimeoutExpired:
                if sys.stderr and sys.stderr.isatty():
                    print(f"waiting for {words[0]} ...", file=sys.stderr, flush=True)
                output, errors = process.communicate(timeout=max(0.0, timeout_s - SAY_AFTER_S))
        except subprocess.TimeoutExpired:
            process.kill()
            raise UserError(f"`{words[0]}` did not answer within {timeout_s:g} s",
                            "SLURM's controller may be busy or down (`scontrol ping`): try again later") from None
        except BaseException:
            process.kill()
            raise
    return process.returncode, output, errors


def _repeatable(words: Sequence[str]) -> bool:
    """Whether a command does no harm if it is carried out twice: queries, and commands whose effect stays the same."""
    match words:
        case ["sbatch", *options]:
            return "--test-only" in options
        case ["scontrol", verb, *_]:
            return verb in ("show", "ping", "release", "update")
        case ["scancel", *options]:
            return not any(option.startswith("--signal") for option in options)
        case _:
            return words[0] in ("squeue", "sinfo", "sacct")


def _complaint(program: str, text: str) -> str:
    """Return the last lines of a command's error output, as one line, without the command's name in front of each."""
    lines = [re.sub(rf"^{program}: (error: |fatal: )?", "", line.strip()) for line in text.splitlines()]
    return "; ".join(list(dict.fromkeys(line for line in lines if line))[-3:])


def _hint(complaint: str) -> str | None:
    if re.search(r"configuration source|configuration file|slurm\.conf", complaint):
        return "check that SLURM_CONF is right and that this host belongs to a cluster: SLURM's commands find none"
    if re.search(r"[Uu]nable to contact|Connection refused|[Tt]imed out|Zero Bytes", complaint):
        return "SLURM's controller may be down (`scontrol ping`): try again later"
    return None
