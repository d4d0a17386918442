"""How long a checkpoint of 500 MB holds training up, against `accelerator.save_state`, by turns; and the memory that
`launch export` of it takes.

    python tests/benchmarks/stall.py [turns]
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
from accelerate import Accelerator
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))

from made import make_run

from trainers.config import schema as config
from trainers.engine.parallel.fragments import Fragment
from trainers.engine.saving.checkpoint import Checkpoints
from trainers.engine.world import World

MB = 10**6
LAYERS, WIDTH = 20, 2500          # 20 x 2500 x 2500 x 4 bytes = 500 MB
STEPS = 30                        # after a checkpoint, while it is written in the background


class Training:
    """Steps of a model whose state is its parameters, 500 MB of them, of which the last layer is trained: steps of a few
    milliseconds."""

    def __init__(self):
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))).requires_grad_(False)
        self.optimizer = torch.optim.SGD(self.model[-1].requires_grad_(True).parameters(), lr=1e-3)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(1, WIDTH)).square().mean().backward()
        self.optimizer.step()

    def seconds(self, save: Callable[[], None]) -> tuple[float, float, float]:
        """(the call; of it, this thread at work; the call and STEPS steps after it)"""
        began, at_work = time.perf_counter(), time.thread_time()
        save()
        called, worked = time.perf_counter() - began, time.thread_time() - at_work
        for _ in range(STEPS):
            self.step()
        return called, worked, time.perf_counter() - began


def main() -> None:
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    training = Training()
    with tempfile.TemporaryDirectory() as folder:
        paths = make_run(Path(folder, "run"))
        checkpoints = Checkpoints(paths, World(0, 1, 0, 1, torch.device("cpu")), config.Checkpoint(keep_last=1), strategy="ddp",
                                  attempt=None, say=lambda event: None, committed=lambda step: None)
        accelerator = Accelerator()
        accelerator.prepare(training.model, training.optimizer)
        fragments = {f"models/model/{name}": Fragment.whole(value) for name, value in training.model.named_parameters()}
        turn = 0

        def ours() -> None:
            checkpoints.save(turn + 1, fragments, {}, {})

        def theirs() -> None:
            shutil.rmtree(Path(folder, "state"), ignore_errors=True)
            with contextlib.redirect_stdout(io.StringIO()):
                accelerator.save_state(str(Path(folder, "state")))

        ours(), checkpoints.wait(), theirs(), training.step()  # the first, with fresh buffers, is no turn
        print("turn: seconds of ours / of save_state: the call, work in it, what call and steps took more than steps alone")
        ratios = []
        for turn in range(1, turns + 1):
            plain = training.seconds(lambda: None)[2]
            found = {}
            for save in (ours, theirs) if turn % 2 else (theirs, ours):
                call, work, whole = training.seconds(save)
                found[save] = call, work, whole - plain
                assert checkpoints.wait() is None
                os.sync()
            ratios.append([mine / other for mine, other in zip(found[ours], found[theirs])])
            print(f"{turn}: " + ", ".join(f"{mine:.3f} / {other:.3f}" for mine, other in zip(found[ours], found[theirs])),
                  flush=True)
        call, work, whole = (statistics.median(column) for column in zip(*ratios))
        print(f"median ratios: the stall {call:.3f}; work in it {work:.3f}; with what writing in the background takes from "
              f"the steps {whole:.3f} ({torch.get_num_threads()} threads)")
        checkpoints.close()
        size = sum(value.nbytes for value in training.model.parameters())
        peak, idle = (rss(words) for words in (["export", str(paths.root)], ["--help"]))
        print(f"launch export of {size / MB:.0f} MB: at most {peak / MB:.0f} MB resident, {idle / MB:.0f} MB of them without "
              f"any work: {(peak - idle) / size:.3f} of the model")


def rss(words: list[str]) -> int:
    """Bytes that `launch` had resident at most."""
    code = ("import re, sys\nfrom launch.cli.main import main\nassert main(sys.argv[1:]) == 0\n"
            "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])")
    ran = subprocess.run([sys.executable, "-P", "-c", code, *words], check=True, capture_output=True, text=True)
    return int(re.findall(r"\d+", ran.stdout)[-1]) * 1024


if __name__ == "__main__":
    main()
