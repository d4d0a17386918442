"""Measure how long a checkpoint of 500 MB stalls training, in alternating turns with `accelerator.save_state`. Then measure the
memory that `launch export` of the checkpoint uses.

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
STEPS = 30                        # steps after a checkpoint, while the checkpoint is written in the background


class Training:
    """Training of a model with 500 MB of parameters. Only the last layer is trained, so that a step takes a few milliseconds."""

    def __init__(self):
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))).requires_grad_(False)
        self.optimizer = torch.optim.SGD(self.model[-1].requires_grad_(True).parameters(), lr=1e-3)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(1, WIDTH)).square().mean().backward()
        self.optimizer.step()

    def seconds(self, save: Callable[[], None]) -> tuple[float, float, float]:
        """Call `save`, then take STEPS steps.

        Returns: the seconds of the call, the CPU seconds of this thread in the call, the seconds of the call and the steps.
        """
        began, cpu_began = time.perf_counter(), time.thread_time()
        save()
        call_s, cpu_s = time.perf_counter() - began, time.thread_time() - cpu_began
        for _ in range(STEPS):
            self.step()
        return call_s, cpu_s, time.perf_counter() - began


def main() -> None:
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    training = Training()
    with tempfile.TemporaryDirectory() as folder:
        paths = make_run(Path(folder, "run"))
        checkpoints = Checkpoints(paths, World(0, 1, 0, 1, torch.device("cpu")), config.Checkpoint(keep_last=1), strategy="ddp",
                                  attempt=None, emit=lambda event: None, on_commit=lambda step: None)
        accelerator = Accelerator()
        accelerator.prepare(training.model, training.optimizer)
        fragments = {f"models/model/{name}": Fragment.whole(value) for name, value in training.model.named_parameters()}
        turn = 0

        def ours() -> None:
            checkpoints.save(turn + 1, fragments, {})

        def theirs() -> None:
            shutil.rmtree(Path(folder, "state"), ignore_errors=True)
            with contextlib.redirect_stdout(io.StringIO()):
                accelerator.save_state(str(Path(folder, "state")))

        ours(), checkpoints.wait(), theirs(), training.step()  # not measured: the first save allocates the buffers
        print("turn: seconds of ours / of save_state, for the call, the CPU time in the call, and the call with the steps after "
              "it minus the same steps alone")
        ratios = []
        for turn in range(1, turns + 1):
            plain = training.seconds(lambda: None)[2]
            measured = {}
            for save in (ours, theirs) if turn % 2 else (theirs, ours):
                call_s, cpu_s, with_steps_s = training.seconds(save)
                measured[save] = call_s, cpu_s, with_steps_s - plain
                assert checkpoints.wait() is None
                os.sync()
            ratios.append([our_s / their_s for our_s, their_s in zip(measured[ours], measured[theirs])])
            columns = (f"{our_s:.3f} / {their_s:.3f}" for our_s, their_s in zip(measured[ours], measured[theirs]))
            print(f"{turn}: " + ", ".join(columns), flush=True)
        call, cpu, with_steps = (statistics.median(column) for column in zip(*ratios))
        print(f"median ratios: the stall {call:.3f}; CPU time in the stall {cpu:.3f}; the stall and how much the background "
              f"write slows the steps {with_steps:.3f} ({torch.get_num_threads()} threads)")
        checkpoints.close()
        size = sum(value.nbytes for value in training.model.parameters())
        peak, idle = (peak_memory(args) for args in (["export", str(paths.root)], ["--help"]))
        print(f"launch export of {size / MB:.0f} MB: at most {peak / MB:.0f} MB resident, `launch --help` {idle / MB:.0f} MB; "
              f"the difference is {(peak - idle) / size:.3f} of the model")


def peak_memory(args: list[str]) -> int:
    """Run `launch` with these arguments and return its highest resident memory in bytes."""
    code = ("import re, sys\nfrom launch.cli.main import main\nassert main(sys.argv[1:]) == 0\n"
            "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])")
    done = subprocess.run([sys.executable, "-P", "-c", code, *args], check=True, capture_output=True, text=True)
    return int(re.findall(r"\d+", done.stdout)[-1]) * 1024


if __name__ == "__main__":
    main()
