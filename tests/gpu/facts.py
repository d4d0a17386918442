"""What the machine and its libraries are, and how fast: the figures of the other checks mean little without them."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from gpu.place import Place

LIBRARIES = ("torch", "torchvision", "triton", "transformers", "accelerate", "deepspeed", "safetensors", "pydantic", "numpy")


def facts(place: Place) -> None:
    """Say versions, the chosen kernels of attention, and the speed of matrix products and of copies."""
    place.say(python=platform.python_version(), **{name: _version(name) for name in LIBRARIES})
    import torch

    if not place.toy:
        place.say(driver=_nvidia_smi(), card=torch.cuda.get_device_name(), cuda=torch.version.cuda,
                  cudnn=torch.backends.cudnn.version(), nccl=".".join(map(str, torch.cuda.nccl.version())),
                  memory_gib=round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1))
    device = torch.device(place.device)
    side = 64 if place.toy else 8192
    for name, dtype in ("bf16", torch.bfloat16), ("fp32", torch.float32):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        seconds = timed(lambda: a @ b, place, 10)
        place.say(**{f"{name}_tflops": round(2 * side**3 / seconds / 1e12, 1)})
    size = 2**16 if place.toy else 2**30
    on_device = torch.empty(size, dtype=torch.uint8, device=device)
    for name, host in ("pageable", torch.ones(size, dtype=torch.uint8)), ("pinned", _pinned(size, place)):
        for way, copy in (("up", lambda: on_device.copy_(host, non_blocking=True)),
                          ("down", lambda: host.copy_(on_device, non_blocking=True))):
            place.say(**{f"{name}_{way}_gb_s": round(size / timed(copy, place, 3) / 1e9, 2)})
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        place.say(**{f"attention_{str(dtype).removeprefix('torch.')}": _attention(dtype, device)})


def timed(work: Callable[[], object], place: Place, times: int) -> float:
    """Return the seconds that `work` takes, the mean of `times` calls after one that does not count."""
    import torch

    wait = torch.cuda.synchronize if not place.toy else lambda: None
    work()
    wait()
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - began) / times


def _pinned(size: int, place: Place):
    import torch

    return torch.ones(size, dtype=torch.uint8, pin_memory=not place.toy)


def _attention(dtype, device) -> str:
    """Return the kernels that attention chooses for the shapes of a small language model, from the names in its graph."""
    import torch
    from torch.nn import functional as F

    q, k, v = (torch.randn(2, 4, 64, 64, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        F.scaled_dot_product_attention(q, k, v, is_causal=True)
    names = {event.key.removeprefix("aten::") for event in profile.key_averages()}
    return ", ".join(sorted(name for name in names if name.startswith("_scaled_dot_product"))) or "unknown"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _nvidia_smi() -> str:
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv,noheader"],
                              capture_output=True, text=True, timeout=30)
        return done.stdout.strip() or done.stderr.strip()[:200]
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
