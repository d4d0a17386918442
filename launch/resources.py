"""What a run is given to run on, and what this machine has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Mapping

from trainers.errors import UserError


@dataclass(frozen=True)
class Resources:
    """`ranks` in all, over `nodes` nodes; `threads`: CPU threads of one rank."""

    device: Literal["cuda", "cpu"]
    ranks: int
    nodes: int = 1
    threads: int = 1

    @property
    def ranks_per_node(self) -> int:
        return self.ranks // self.nodes


def visible_gpus(env: Mapping[str, str], dev: Path = Path("/dev")) -> int:
    """GPUs of this machine that the mask in CUDA_VISIBLE_DEVICES lets through."""
    there = sum(1 for path in dev.glob("nvidia*") if path.name.removeprefix("nvidia").isdigit())
    there = there or int((dev / "dxg").exists())  # Windows' Linux shows no more than that there is one
    mask = env.get("CUDA_VISIBLE_DEVICES")
    if mask is None:
        return there
    listed = 0
    for word in mask.split(","):
        word = word.strip()
        if not word or word.startswith("-"):  # CUDA stops at the first entry that is none
            break
        listed += 1
    return min(there, listed) if not mask.startswith("MIG") else listed * bool(there)


def local_resources(gpus: int | None, procs: int | None, env: Mapping[str, str] = os.environ,
                    threads: int | None = None) -> Resources:
    """Resources on this machine; with neither given, one GPU if there is one, else one CPU rank. `threads`
    of a rank are by default its share of this machine's cores.

    Raises:
        UserError: more GPUs were asked for than there are.
    """
    there = visible_gpus(env)
    if gpus is None and procs is None:
        gpus, procs = (1, None) if there else (None, 1)
    if procs is not None:
        return Resources("cpu", procs, threads=threads or _threads(procs, env))
    if gpus > there:
        mask = env.get("CUDA_VISIBLE_DEVICES")
        masked = f" (CUDA_VISIBLE_DEVICES is `{mask}`)" if mask is not None else ""
        raise UserError(f"--gpus {gpus} was asked for; this machine has {there} NVIDIA GPU(s) to give{masked}",
                        f"use --procs {gpus} for as many CPU ranks" + (f", or --gpus {there}" if there else ""))
    return Resources("cuda", gpus, threads=threads or _threads(gpus, env))


def _threads(ranks: int, env: Mapping[str, str]) -> int:
    asked = env.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else max(1, len(os.sched_getaffinity(0)) // ranks)
