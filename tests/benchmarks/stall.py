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

from trainers import config
from trainers.engine.checkpoint import Checkpoints
from trainers.engine.fragments import Fragment
from trainers.engine.world import World

MB = 10**6
LAYERS, WIDTH = 20, 2500          # 20 x 2500 x 2500 x 4 bytes = 500 MB
STEPS = 40                        # after a checkpoint, of about 50 ms


class Training:
    """Steps of a model whose state is its parameters, 500 MB of them."""

    def __init__(self):
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(1, WIDTH)).square().mean().backward()
        self.optimizer.step()

    def seconds(self, save: Callable[[], None]) -> tuple[float, float]:
        """(the call, the call and STEPS steps after it)"""
        began = time.perf_counter()
        save()
        called = time.perf_counter() - began
        for _ in range(STEPS):
            self.step()
        return called, time.perf_counter() - began


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
        calls, wholes = [], []
        for turn in range(1, turns + 1):
            plain = training.seconds(lambda: None)[1]
            found = {}
            for save in (ours, theirs) if turn % 2 else (theirs, ours):
                found[save] = training.seconds(save)
                checkpoints.wait()
                os.sync()
            calls.append(found[ours][0] / found[theirs][0])
            wholes.append((found[ours][1] - plain) / max(found[theirs][1] - plain, 1e-9))
            print(f"turn {turn}: {STEPS} steps {plain:.2f} s; the call: ours {found[ours][0]:.3f} s, save_state "
                  f"{found[theirs][0]:.3f} s, ratio {calls[-1]:.3f}; with the steps: {found[ours][1]:.2f} s, "
                  f"{found[theirs][1]:.2f} s, ratio of what it added {wholes[-1]:.3f}", flush=True)
        print(f"median ratio of the stall {statistics.median(calls):.3f}; of all that a checkpoint added to the steps around "
              f"it, writing in the background included, {statistics.median(wholes):.3f} ({torch.get_num_threads()} threads)")
        checkpoints.close()
        size = sum(value.nbytes for value in training.model.parameters())
        peak, idle = (rss(words) for words in (["export", str(paths.root)], ["--help"]))
        print(f"launch export of {size / MB:.0f} MB: at most {peak / MB:.0f} MB resident, {idle / MB:.0f} MB of them without "
              f"any work: {(peak - idle) / size:.3f} of the model")


def rss(words: list[str]) -> int:
    """Bytes that `launch` had resident at most."""
    code = ("import re, sys\nfrom launch.cli import main\nassert main(sys.argv[1:]) == 0\n"
            "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])")
    ran = subprocess.run([sys.executable, "-P", "-c", code, *words], check=True, capture_output=True, text=True)
    return int(re.findall(r"\d+", ran.stdout)[-1]) * 1024


if __name__ == "__main__":
    main()
