"""Tries a rank's place: the run folder, torch, its GPU, and one all-reduce over all ranks. For `launch doctor --job`.

    python -P -m trainers.trial

Needs what any rank needs, torchrun's environment and LAUNCH_RUN_DIR, and nothing else of this package. Each finding is
a line of JSON on standard output: {"probe": its name, "ok", "said"}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

SIZE = 2**20              # numbers that are summed
COLLECTIVE_S = 60.0
OTHERS_S = 10.0           # for other ranks to say what they find: the first that ends, ends them all
ON_CPU = os.environ.get("ACCELERATE_USE_CPU") == "true"
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK, LOCAL_RANKS = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def folder() -> str:
    file = Path(os.environ["LAUNCH_RUN_DIR"]) / f"probe-{RANK}"
    file.write_text(str(RANK))
    said = file.read_text()
    file.unlink()
    return f"wrote and read {len(said)} byte(s)"


def torch() -> str:
    began = time.monotonic()
    import torch

    return f"{torch.__version__}, imported in {time.monotonic() - began:.1f} s"


def gpu() -> str:
    if ON_CPU:
        return "none wanted"
    import torch

    count = torch.cuda.device_count()
    if count < LOCAL_RANKS:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise RuntimeError(f"torch sees {count} GPU(s) of {LOCAL_RANKS}; it is {built}")
    torch.cuda.set_device(LOCAL_RANK)
    ones = torch.ones(256, 256, device="cuda")
    if (ones @ ones)[0, 0].item() != 256:
        raise RuntimeError("a sum of 256 ones is not 256")
    found = torch.cuda.get_device_properties(LOCAL_RANK)
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB"


def all_reduce() -> str:
    import torch.distributed as dist
    from torch import ones

    backend = "gloo" if ON_CPU else "nccl"
    began = time.monotonic()
    dist.init_process_group(backend, timeout=timedelta(seconds=COLLECTIVE_S))
    numbers = ones(SIZE, device="cpu" if ON_CPU else f"cuda:{LOCAL_RANK}")
    dist.all_reduce(numbers)
    if not (numbers == RANKS).all().item():
        raise RuntimeError(f"the sum of {RANKS} ones is {numbers[0].item():g}")
    dist.destroy_process_group()
    return f"over {backend}, {RANKS} rank(s), in {time.monotonic() - began:.1f} s"


PROBES: dict[str, Callable[[], str]] = {"folder": folder, "torch": torch, "GPU": gpu, "all-reduce": all_reduce}


def main() -> int:
    for name, probe in PROBES.items():
        try:
            said, ok = probe(), True
        except Exception as error:
            said, ok = " ".join(f"{type(error).__name__}: {error}".split()), False
        print(json.dumps({"probe": name, "ok": ok, "said": said}), flush=True)
        if not ok:
            time.sleep(OTHERS_S)
            return 1
    return 0


if __name__ == "__main__":
    if not sys.flags.safe_path:  # Python put this folder first, where modules of ours would shadow torch's
        del sys.path[0]
    code = main()
    sys.stdout.flush()
    os._exit(code)  # at once: a broken collective would be waited for
