"""Checkpoints of real runs, damaged at random, and saves that end at random: is a wrong state ever loaded, a good one lost?

    python tests/benchmarks/corruptions.py [trials] [FOLDER]

A run is made of each strategy and number of ranks, in FOLDER if one is given, where the next time finds them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parents[1]))

from crashes import CODE, crash_at, ended, fork, forked

from trainers.checkpoints import manifest
from trainers.config import schema as config
from trainers.contract.paths import RunPaths
from trainers.engine.parallel.fragments import Fragment
from trainers.engine.saving import storage
from trainers.engine.saving.checkpoint import Checkpoints
from trainers.engine.world import World

SENTENCES = Path(__file__).parents[1] / "sentences" / "sentences.yaml"
STRATEGIES, RANKS = ("ddp", "zero3", "fsdp"), (1, 2, 4)
STEPS = (10, 20, 30)
HARMLESS = ("passed over", "old one kept", "new one kept")


def make_run(folder: Path, strategy: str, ranks: int) -> RunPaths:
    """A run with three checkpoints, in a folder of its own."""
    runs = folder / f"{strategy}-{ranks}"
    if not list(runs.glob("*/run.json")):
        subprocess.run([sys.executable, "-P", "-m", "launch", SENTENCES, "--procs", str(ranks), "--strategy", strategy,
                        "checkpoint.keep_last=3", "--runs", runs], check=True, stdout=subprocess.DEVNULL)
    (root,) = runs.glob("*")
    paths = RunPaths(root)
    assert tuple(paths.checkpoint_steps()) == STEPS
    return paths


def checkpoints(paths: RunPaths, world: World, committed: Callable[[int], None] = lambda step: None) -> Checkpoints:
    return Checkpoints(paths, world, config.Checkpoint(keep_last=1), strategy="ddp", attempt=None, say=lambda event: None,
                       committed=committed)


def alone() -> World:
    return World(0, 1, 0, 1, torch.device("cpu"))


def loaded(paths: RunPaths, step: int) -> str:
    """A hash of all that a resumption puts in place."""
    reader, state = checkpoints(paths, alone()).load(step)
    digest = hashlib.sha256(json.dumps(state).encode())
    for name in sorted(reader.shapes):
        tensor = reader.tensor(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(storage.raw(tensor))
    return digest.hexdigest()


# Damages: each changes a file of a checkpoint for sure


def flip(random: Random, file: Path, others: list[Path]) -> None:
    content = bytearray(file.read_bytes())
    for place in random.sample(range(len(content)), random.randint(1, 8)):
        content[place] ^= random.randint(1, 255)
    file.write_bytes(content)


def truncate(random: Random, file: Path, others: list[Path]) -> None:
    os.truncate(file, random.randrange(file.stat().st_size))


def remove(random: Random, file: Path, others: list[Path]) -> None:
    file.unlink()


def mix(random: Random, file: Path, others: list[Path]) -> None:
    """A file of another step or rank, or a block of zeros, as a file system may leave it."""
    before = file.read_bytes()
    if random.random() < 0.5:
        start = random.randrange(len(before))
        file.write_bytes(before[:start] + bytes(min(512, len(before) - start)) + before[start + 512:])
    else:
        shutil.copyfile(random.choice(others), file)
    if file.read_bytes() == before:
        flip(random, file, others)


DAMAGES = {"flipped bytes": flip, "truncation": truncate, "missing file": remove, "mixed up": mix}
CRASHES = ("killed in a save", "power cut in a save")


class Trials:
    """`truth`: by step, what a resumption of the undamaged checkpoint loads."""

    def __init__(self, paths: RunPaths, scratch: Path, random: Random):
        self.paths, self.scratch, self.random = paths, scratch, random
        self.truth = {step: loaded(paths, step) for step in STEPS}
        self.ranks = manifest.read(paths.checkpoint(30), 30)["world_size"]
        self.operations: dict[int, int] = {}  # of a save, by rank

    def copy(self, *steps: int) -> RunPaths:
        shutil.rmtree(self.scratch, ignore_errors=True)
        for step in steps:
            shutil.copytree(self.paths.checkpoint(step), RunPaths(self.scratch).checkpoint(step))
        return RunPaths(self.scratch)

    def damage(self, kind: str) -> str:
        """Damage the newest, or the newest two; what became of it."""
        copy = self.copy(*STEPS)
        hit = STEPS[-self.random.choice((1, 1, 2)):]
        for step in hit:
            files = sorted(copy.checkpoint(step).iterdir())
            file = self.random.choice(files)
            others = [path for path in copy.checkpoints.glob("step_*/*") if path.suffix == file.suffix and path != file]
            DAMAGES[kind](self.random, file, others)
        expected = max(set(STEPS) - set(hit))
        return self.judge(copy, [expected], "passed over")

    def crash(self, kind: str) -> str:
        """End one rank of a save of step 30 somewhere in it; what became of it."""
        victim = self.random.randrange(self.ranks)
        if victim not in self.operations:
            self.save(self.copy(10, 20), victim, None)
            self.operations[victim] = int((self.scratch / "operations").read_text())
        copy = self.copy(10, 20)
        code = self.save(copy, victim, self.random.randint(1, self.operations[victim]), kind == CRASHES[1])
        assert code == CODE, code
        if (self.scratch / "committed").exists():
            return self.judge(copy, [30], "new one kept")
        return self.judge(copy, [20, 30], "old one kept" if not copy.checkpoint(30).exists() else "new one kept")

    def judge(self, copy: RunPaths, expected: list[int], good: str) -> str:
        try:
            step = checkpoints(copy, alone()).newest()
            if loaded(copy, step) != self.truth[step]:
                return "WRONG STATE LOADED"
        except Exception as error:
            return f"GOOD ONE LOST: {error}"
        if step not in expected:
            return "GOOD ONE LOST"
        if forked(lambda: self.save_again(copy)):
            return "NEXT SAVE FAILED"
        return good

    def save_again(self, copy: RunPaths) -> int:
        """And the leftovers are gone."""
        after = checkpoints(copy, alone())
        after.save(40, {"x": Fragment.whole(torch.zeros(3))}, {}, {})
        return int(after.wait() is not None or os.listdir(copy.checkpoints) != ["step_40"])

    def save(self, copy: RunPaths, victim: int, number: int | None, power: bool = False) -> int:
        """Save step 30 as its run has done, by as many ranks; the exit code of the rank that was to end."""
        store = copy.root / "store"
        children = [fork(lambda: self.rank(copy, rank, store, number if rank == victim else None, rank == victim, power))
                    for rank in range(self.ranks)]
        codes = [ended(child) for child in children]
        assert all(code == 0 for rank, code in enumerate(codes) if rank != victim), codes
        return codes[victim]

    def rank(self, copy: RunPaths, rank: int, store: Path, number: int | None, victim: bool, power: bool) -> int:
        if self.ranks > 1:
            dist.init_process_group("gloo", store=dist.FileStore(str(store), self.ranks), rank=rank, world_size=self.ranks,
                                    timeout=timedelta(seconds=60))
        world = World(rank, self.ranks, rank, self.ranks, torch.device("cpu"))
        mine = checkpoints(copy, world, committed=lambda step: (copy.root / "committed").touch())
        source = self.paths.checkpoint(30)
        index = json.loads((source / manifest.INDEX).read_text())["tensors"]
        reader = storage.Reader(source)
        file = f"{rank}.safetensors"
        fragments = {}
        for name, entry in index.items():
            if file in entry["parts"]:
                start = entry["parts"][file]
                ends = [other for other in entry["parts"].values() if other > start]
                count = min(ends, default=torch.Size(entry["shape"]).numel()) - start
                fragments[name] = Fragment(reader.read(name, start, count), start, tuple(entry["shape"]))
        done = crash_at(number, copy.checkpoints, Random(f"{number}") if power else None) if victim else None
        mine.save(30, fragments, reader.json(manifest.STATE), {})
        mine.wait()
        if victim:
            (copy.root / "operations").write_text(str(done()))
        return 0


def trials(folder: Path, made: Iterable[tuple[str, int]], count: int, seed: int) -> dict[str, Counter]:
    """What became of it, counted by kind."""
    torch.set_num_threads(1)  # a process whose threads work should not fork
    random = Random(seed)
    kinds = [*DAMAGES, *CRASHES]
    counts: dict[str, Counter] = {kind: Counter() for kind in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        of = [Trials(make_run(folder, strategy, ranks), Path(scratch, "run"), random) for strategy, ranks in made]
        for trial in range(count):
            kind = kinds[trial % len(kinds)]
            one = of[trial // len(kinds) % len(of)]
            counts[kind][one.damage(kind) if kind in DAMAGES else one.crash(kind)] += 1
    return counts


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as folder:
        made = [(strategy, ranks) for ranks in RANKS for strategy in STRATEGIES]
        counts = trials(Path(sys.argv[2] if len(sys.argv) > 2 else folder).absolute(), made, count, seed=1)
    outcomes = list(dict.fromkeys([*HARMLESS, "WRONG STATE LOADED", "GOOD ONE LOST", "NEXT SAVE FAILED",
                                   *(outcome for found in counts.values() for outcome in found)]))
    print(f"{count} trials on checkpoints of {', '.join(f'{strategy} x {ranks}' for strategy, ranks in made)}")
    print(f"{'':22}" + "  ".join(outcomes))
    for kind, found in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        print(f"{kind:22}" + "  ".join(f"{found[outcome]:>{len(outcome)}}" for outcome in outcomes))
    sys.exit(any(outcome not in HARMLESS for found in counts.values() for outcome in found))


if __name__ == "__main__":
    main()
