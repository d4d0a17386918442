"""Try what a rank needs: the run folder, torch, a GPU, and one all-reduce over all ranks. For `launch doctor --job`.

    python -P -m trainers.trial

A trial needs torchrun's environment and LAUNCH_RUN_DIR, as any rank does. It imports nothing else from this package. Each probe
prints its result as a line on standard output: its name, `ok` or `failed`, and what it found.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

SIZE = 2**20              # numbers that the all-reduce sums
COLLECTIVE_S = 60.0       # limit of the all-reduce
OTHERS_S = 10.0           # a failed rank waits before it exits, because its exit stops ranks that have not printed results yet
ON_CPU = os.environ.get("ACCELERATE_USE_CPU") == "true"
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK, LOCAL_RANKS = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def folder() -> str:
    """Write, read and delete a file in the run folder."""
    file = Path(os.environ["LAUNCH_RUN_DIR"]) / f"probe-{RANK}"
    file.write_text(str(RANK))
    text = file.read_text()
    file.unlink()
    return f"wrote and read {len(text)} byte(s)"


def torch() -> str:
    """Import torch."""
    started = time.monotonic()
    import torch

    return f"{torch.__version__}, imported in {time.monotonic() - started:.1f} s"


def gpu() -> str:
    """Multiply two matrices on this rank's GPU."""
    if ON_CPU:
        return "not needed by CPU ranks"
    import torch

    count = torch.cuda.device_count()
    if count < LOCAL_RANKS:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise RuntimeError(f"torch sees {count} GPU(s), but the node has {LOCAL_RANKS} rank(s); torch is {built}")
    torch.cuda.set_device(LOCAL_RANK)
    ones = torch.ones(256, 256, device="cuda")
    if (ones @ ones)[0, 0].item() != 256:
        raise RuntimeError("the GPU computes wrong numbers: its sum of 256 ones is not 256")
    properties = torch.cuda.get_device_properties(LOCAL_RANK)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def all_reduce() -> str:
    """Sum ones over all ranks."""
    import torch.distributed as dist
    from torch import ones

    backend = "gloo" if ON_CPU else "nccl"
    started = time.monotonic()
    dist.init_process_group(backend, timeout=timedelta(seconds=COLLECTIVE_S))
    numbers = ones(SIZE, device="cpu" if ON_CPU else f"cuda:{LOCAL_RANK}")
    dist.all_reduce(numbers)
    if not (numbers == RANKS).all().item():
        raise RuntimeError(f"the sum of ones over {RANKS} rank(s) is {numbers[0].item():g}")
    dist.destroy_process_group()
    return f"over {backend}, {RANKS} rank(s), in {time.monotonic() - started:.1f} s"


PROBES: dict[str, Callable[[], str]] = {"folder": folder, "torch": torch, "GPU": gpu, "all-reduce": all_reduce}


def main() -> int:
    for name, probe in PROBES.items():
        try:
            result, ok = probe(), True
        except Exception as error:
            result, ok = " ".join(f"{type(error).__name__}: {error}".split()), False
        print(f"{name} {'ok' if ok else 'failed'}: {result}", flush=True)
        if not ok:
            time.sleep(OTHERS_S)
            return 1
    return 0


if __name__ == "__main__":
    if not sys.flags.safe_path:  # Python put this folder first on sys.path: its modules would hide others of the same name
        del sys.path[0]
    code = main()
    sys.stdout.flush()
    os._exit(code)  # exit at once: a normal exit would wait for a broken collective
