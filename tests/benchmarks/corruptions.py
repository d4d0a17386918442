"""Damage checkpoints of real runs at random and crash saves at random. Check that no wrong state is loaded and that no good
checkpoint is lost.

    python tests/benchmarks/corruptions.py [trials] [FOLDER]

The benchmark trains one run for each strategy and number of ranks. With FOLDER the runs are kept there and used again the next
time.
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

from crashes import CRASH_CODE, crash_at, exit_code_of, fork, run_forked

from trainers.checkpoints import evaluation, folders, manifest
from trainers.config import schema as config
from trainers.contract.paths import RunPaths
from trainers.engine.parallel.fragments import Fragment
from trainers.engine.saving import storage
from trainers.engine.saving.checkpoint import Checkpoints
from trainers.engine.world import World

SENTENCES = Path(__file__).parents[1] / "sentences" / "sentences.yaml"
STRATEGIES, RANKS = ("ddp", "zero3", "fsdp"), (1, 2, 4)
STEPS = (10, 20, 30)
HARMLESS = DETECTED, OLD_KEPT, NEW_KEPT = "damage detected", "old checkpoint kept", "new checkpoint kept"
HARMFUL = WRONG_STATE, GOOD_LOST, SAVE_FAILED = "WRONG STATE LOADED", "GOOD CHECKPOINT LOST", "NEXT SAVE FAILED"


def make_run(folder: Path, strategy: str, ranks: int) -> RunPaths:
    """Train a run with three checkpoints, or return the existing run of an earlier call."""
    runs = folder / f"{strategy}-{ranks}"
    if not list(runs.glob("*/run.json")):
        subprocess.run([sys.executable, "-P", "-m", "launch", SENTENCES, "--procs", str(ranks), "--strategy", strategy,
                        "checkpoint.keep_last=3", "--runs", runs], check=True, stdout=subprocess.DEVNULL)
    (root,) = runs.glob("*")
    paths = RunPaths(root)
    assert tuple(paths.checkpoint_steps()) == STEPS
    return paths


def checkpoints(paths: RunPaths, world: World, committed: Callable[[int], None] = lambda step: None) -> Checkpoints:
    return Checkpoints(paths, world, config.Checkpoint(keep_last=1), strategy="ddp", attempt=None, emit=lambda event: None,
                       on_commit=committed)


def single_rank() -> World:
    return World(0, 1, 0, 1, torch.device("cpu"))


def hash_of_state(paths: RunPaths, step: int) -> str:
    """Return a hash of everything that a resumed run loads from the checkpoint of a step."""
    reader, state = checkpoints(paths, single_rank()).load(step)
    digest = hashlib.sha256(json.dumps(state).encode())
    for name in sorted(reader.shapes):
        tensor = reader.tensor(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(storage.raw(tensor))
    return digest.hexdigest()


# Kinds of damage. Each function changes `file`, a file of a checkpoint, in every case.


def flip(random: Random, file: Path, others: list[Path]) -> None:
    """Change up to 8 bytes."""
    content = bytearray(file.read_bytes())
    for position in random.sample(range(len(content)), random.randint(1, 8)):
        content[position] ^= random.randint(1, 255)
    file.write_bytes(content)


def truncate(random: Random, file: Path, others: list[Path]) -> None:
    os.truncate(file, random.randrange(file.stat().st_size))


def remove(random: Random, file: Path, others: list[Path]) -> None:
    file.unlink()


def mix(random: Random, file: Path, others: list[Path]) -> None:
    """Replace the file by the file of another step or rank, or a block of it by zeros, as a file system may do in a crash."""
    before = file.read_bytes()
    if random.random() < 0.5:
        start = random.randrange(len(before))
        file.write_bytes(before[:start] + bytes(min(512, len(before) - start)) + before[start + 512:])
    else:
        shutil.copyfile(random.choice(others), file)
    if file.read_bytes() == before:
        flip(random, file, others)


DAMAGES = {"flipped bytes": flip, "truncation": truncate, "missing file": remove, "replaced content": mix}
CRASHES = ("killed while saving", "power failure while saving")


class Trials:
    """Trials on copies of the checkpoints of one run.

    `correct` holds, for each step, the hash of the state that the undamaged checkpoint gives.
    """

    def __init__(self, paths: RunPaths, scratch: Path, random: Random):
        self.paths, self.scratch, self.random = paths, scratch, random
        self.correct = {step: hash_of_state(paths, step) for step in STEPS}
        self.ranks = manifest.read(paths.checkpoint(30), 30)["world_size"]
        self.operations: dict[int, int] = {}  # file operations of a save, by rank

    def copy(self, *steps: int) -> RunPaths:
        """Return a fresh copy of the run that holds only the checkpoints of these steps."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        for step in steps:
            shutil.copytree(self.paths.checkpoint(step), RunPaths(self.scratch).checkpoint(step))
        return RunPaths(self.scratch)

    def damage(self, kind: str) -> str:
        """Damage the newest checkpoint, or the newest two. Return the outcome."""
        copy = self.copy(*STEPS)
        damaged = STEPS[-self.random.choice((1, 1, 2)):]
        whole = set(STEPS) - set(damaged)
        for step in damaged:
            files = sorted(copy.checkpoint(step).iterdir())
            file = self.random.choice(files)
            others = [path for path in copy.checkpoints.glob("step_*/*") if path.suffix == file.suffix and path != file]
            DAMAGES[kind](self.random, file, others)
            if file.name == evaluation.NAME:  # it says nothing about the tensors: the step counts as not evaluated
                whole.add(step)
                if evaluation.read(copy.checkpoint(step), step) is not None:
                    return WRONG_STATE
        return self.judge(copy, [max(whole)], DETECTED)

    def crash(self, kind: str) -> str:
        """Crash one rank at a random file operation while it saves step 30. Return the outcome."""
        victim = self.random.randrange(self.ranks)
        if victim not in self.operations:
            self.save(self.copy(10, 20), victim, None)
            self.operations[victim] = int((self.scratch / "operations").read_text())
        copy = self.copy(10, 20)
        code = self.save(copy, victim, self.random.randint(1, self.operations[victim]), kind == CRASHES[1])
        assert code == CRASH_CODE, code
        if (self.scratch / "committed").exists():
            return self.judge(copy, [30], NEW_KEPT)
        return self.judge(copy, [20, 30], OLD_KEPT if not copy.checkpoint(30).exists() else NEW_KEPT)

    def judge(self, copy: RunPaths, expected: list[int], good: str) -> str:
        """Load the newest checkpoint and save another one. Return `good`, or what went wrong."""
        try:
            step = checkpoints(copy, single_rank()).newest()
            if hash_of_state(copy, step) != self.correct[step]:
                return WRONG_STATE
        except Exception as error:
            return f"{GOOD_LOST}: {error}"
        if step not in expected:
            return GOOD_LOST
        if run_forked(lambda: self.save_again(copy)):
            return SAVE_FAILED
        return good

    def save_again(self, copy: RunPaths) -> int:
        """Save step 40. Return 0 if that worked and nothing else is left in the folder, otherwise 1.

        An older checkpoint whose manifest cannot be read stays: somebody may want to look at it.
        """
        unreadable = {copy.checkpoint(step).name for step in set(copy.checkpoint_steps()) - set(folders.metrics(copy))}
        after = checkpoints(copy, single_rank())
        after.save(40, {"x": Fragment.whole(torch.zeros(3))}, {})
        return int(after.wait() is not None or set(os.listdir(copy.checkpoints)) != {"step_40", *unreadable})

    def save(self, copy: RunPaths, victim: int, number: int | None, power: bool = False) -> int:
        """Save step 30 with as many ranks as the run had. Crash the rank `victim` at its operation `number` (None: never).

        Returns: the exit code of the victim.
        """
        store = copy.root / "store"
        children = [fork(lambda: self.rank(copy, rank, store, number if rank == victim else None, rank == victim, power))
                    for rank in range(self.ranks)]
        codes = [exit_code_of(child) for child in children]
        assert all(code == 0 for rank, code in enumerate(codes) if rank != victim), codes
        return codes[victim]

    def rank(self, copy: RunPaths, rank: int, store: Path, number: int | None, victim: bool, power: bool) -> int:
        """Save step 30 as one rank. The parts that the rank saves are read from the undamaged checkpoint."""
        if self.ranks > 1:
            dist.init_process_group("gloo", store=dist.FileStore(str(store), self.ranks), rank=rank, world_size=self.ranks,
                                    timeout=timedelta(seconds=60))
        world = World(rank, self.ranks, rank, self.ranks, torch.device("cpu"))
        target = checkpoints(copy, world, committed=lambda step: (copy.root / "committed").touch())
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
        operations = crash_at(number, copy.checkpoints, Random(f"{number}") if power else None) if victim else None
        target.save(30, fragments, reader.json(manifest.STATE))
        target.wait()
        if victim:
            (copy.root / "operations").write_text(str(operations()))
        return 0


def trials(folder: Path, runs: Iterable[tuple[str, int]], count: int, seed: int) -> dict[str, Counter]:
    """Make `count` trials on runs of these (strategy, number of ranks). Return the outcomes, counted for each kind of trial."""
    torch.set_num_threads(1)  # torch threads that compute would make it unsafe to fork
    random = Random(seed)
    kinds = [*DAMAGES, *CRASHES]
    counts: dict[str, Counter] = {kind: Counter() for kind in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        trials_by_run = [Trials(make_run(folder, strategy, ranks), Path(scratch, "run"), random) for strategy, ranks in runs]
        for trial in range(count):
            kind = kinds[trial % len(kinds)]
            run = trials_by_run[trial // len(kinds) % len(trials_by_run)]
            counts[kind][run.damage(kind) if kind in DAMAGES else run.crash(kind)] += 1
    return counts


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as folder:
        runs = [(strategy, ranks) for ranks in RANKS for strategy in STRATEGIES]
        counts = trials(Path(sys.argv[2] if len(sys.argv) > 2 else folder).absolute(), runs, count, seed=1)
    outcomes = list(dict.fromkeys([*HARMLESS, *HARMFUL, *(outcome for counter in counts.values() for outcome in counter)]))
    print(f"{count} trials on checkpoints of {', '.join(f'{strategy} x {ranks}' for strategy, ranks in runs)}")
    print(f"{'':28}" + "  ".join(outcomes))
    for kind, counter in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        print(f"{kind:28}" + "  ".join(f"{counter[outcome]:>{len(outcome)}}" for outcome in outcomes))
    sys.exit(any(outcome not in HARMLESS for counter in counts.values() for outcome in counter))


if __name__ == "__main__":
    main()
