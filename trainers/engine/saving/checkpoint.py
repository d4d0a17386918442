"""Checkpoints as transactions: a folder `step_<n>` is a whole checkpoint or it is passed over.

All ranks write into `step_<n>.tmp`, a manifest of hashes seals it, everything is flushed, and rank 0
renames it. What else may lie beside it, `folders` says.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Mapping, TypeVar

import torch
import torch.distributed as dist

from trainers.checkpoints import folders, manifest, retention
from trainers.checkpoints.folders import BROKEN, OLD, TMP
from trainers.checkpoints.manifest import INDEX, STATE
from trainers.config.schema import Checkpoint
from trainers.contract import files, heartbeat
from trainers.contract.clock import utc_now
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths
from trainers.engine.parallel.fragments import Fragment
from trainers.engine.saving import storage
from trainers.engine.world import World

T = TypeVar("T")


class Superseded(UserError):
    """A newer attempt has taken the run; this one must commit nothing more."""


class Checkpoints:
    """The checkpoints of one run, as its ranks write and read them.

    All methods are collective: every rank calls them in the same order.

    Args:
        strategy: how the models were spread over ranks, for the manifest.
        attempt: this attempt's number, by which it is fenced off once there is a newer one; None: no fence.
        say: takes the events `checkpoint` and `note`, on rank 0; called from the writing thread too.
        committed: told each committed step, on rank 0, in the writing thread, before older ones are deleted.
    """

    def __init__(self, paths: RunPaths, world: World, config: Checkpoint, *, strategy: str, attempt: int | None,
                 say: Callable[[Mapping[str, Any]], None], committed: Callable[[int], None]):
        self.paths, self.world, self.config, self.strategy = paths, world, config, strategy
        self.attempt, self.say, self.committed = attempt, say, committed
        # A group of its own, for collectives of two threads on one group can meet each other.
        self.group = dist.new_group(backend="gloo") if world.size > 1 else None
        self.superseded = False  # whether a save failed because a newer attempt has taken the run
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[str | None] | None = None
        self._committed_step: int | None = None
        self._buffers: dict[str, torch.Tensor] = {}

    def newest(self) -> int | None:
        """The newest step whose manifest proves it whole; None if none was ever committed.

        Broken ones that are newer are reported and moved aside.

        Raises:
            UserError: there are checkpoints, and none is whole.
        """
        self.wait()
        broken: dict[int, str] = {}
        whole = None
        for step in reversed(self._on_main(self._committed_steps)):
            problem = self._problem(step)
            if problem is None:
                whole = step
                break
            broken[step] = problem
        if broken and whole is None:
            listed = "; ".join(f"step_{step}: {problem}" for step, problem in broken.items())
            raise UserError(f"no checkpoint in {self.paths.checkpoints} is whole ({listed})",
                            "put a good copy back, or remove that folder to start from the beginning")
        if broken:
            self._on_main(lambda: self._pass_over(broken, whole))
        return whole

    def load(self, step: int) -> tuple[storage.Reader, dict[str, Any]]:
        """The tensors, to be read, and the state of a step that `newest` gave; for any number of ranks.

        Raises:
            UserError: its files are not what `save` writes.
        """
        self.wait()
        folder = self.paths.checkpoint(step)
        loaded: list[Any] = []

        def read() -> None:
            reader = storage.Reader(folder)
            loaded[:] = reader, reader.json(STATE)

        self._everywhere(read)
        return loaded[0], loaded[1]

    def save(self, step: int, fragments: Mapping[str, Fragment], state: Mapping[str, Any],
             metrics: Mapping[str, float]) -> None:
        """Copy everything and return; a thread writes and commits it. Waits for the save before this one.

        A step that this object has just committed is not saved again. What becomes of it, `wait` tells.

        Args:
            fragments: what this rank holds of each tensor, on any device. What all ranks hold whole must have the same
                values on all (buffers that DDP lets drift apart must be made equal first): one rank writes it.
            state: what JSON can hold; rank 0's is written.
            metrics: of the last evaluation, by which the best are kept; rank 0's are written.
        """
        began = time.perf_counter()
        self.wait()
        if step == self._committed_step:
            return
        state_text = json.dumps(state, indent=1) + "\n"
        metrics = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        mine = self._mine(fragments)
        copies = self._stage(mine)
        places = {name: (fragment.start, fragment.shape) for name, fragment in mine.items()}
        stall_s = time.perf_counter() - began
        self._writing = self._writer.submit(self._write, step, copies, places, state_text, metrics, stall_s)

    def wait(self) -> str | None:
        """Wait until the last save is committed or has failed: the reason if it failed, the same on all ranks."""
        return self._writing.result() if self._writing else None

    def close(self) -> None:
        """Wait for the last save and end the thread."""
        self._writer.shutdown()

    # -- agreeing

    def _everywhere(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank: the results by rank. Where one fails, all raise the first one's error,
        and none is left waiting."""
        result: tuple[T | None, UserError | None]
        try:
            result = work(), None
        except UserError as error:
            result = None, error
        except Exception as error:
            result = None, UserError(str(error) or type(error).__name__)
        results = [result]
        if self.group is not None:
            results = [result] * self.world.size
            dist.all_gather_object(results, result, group=self.group)
        for _, error in results:
            if error is not None:
                raise error
        return [value for value, _ in results]

    def _on_main(self, work: Callable[[], T]) -> T:
        """What rank 0 gets from `work`, on every rank."""
        return self._everywhere(lambda: work() if self.world.main else None)[0]

    # -- finding

    def _committed_steps(self) -> list[int]:
        folders.put_back(self.paths)
        return self.paths.checkpoint_steps()

    def _problem(self, step: int) -> str | None:
        """What is wrong with a checkpoint; each rank verifies its part of the files."""
        folder = self.paths.checkpoint(step)

        def entries() -> tuple[dict[str, Any], str | None]:
            try:
                return manifest.read(folder, step)["files"], None
            except manifest.Broken as problem:
                return {}, str(problem)

        found, problem = self._on_main(entries)
        if problem is not None:
            return problem
        by_size = sorted(found, key=lambda name: (-found[name]["size"], name))

        def verify() -> str | None:
            try:
                for name in by_size[self.world.rank::self.world.size]:
                    manifest.check(folder, name, found[name])
            except manifest.Broken as problem:
                return str(problem)
            return None

        return next((problem for problem in self._everywhere(verify) if problem is not None), None)

    def _pass_over(self, broken: Mapping[int, str], whole: int) -> None:
        for step, problem in broken.items():
            path = self.paths.checkpoint(step)
            aside = path.with_name(path.name + BROKEN)
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            self._warn(f"the checkpoint of step {step} is broken ({problem}): passed over, moved to {aside.name}; "
                       f"resuming at step {whole}")

    # -- writing

    def _mine(self, fragments: Mapping[str, Fragment]) -> dict[str, Fragment]:
        """Those that this rank writes: its own, and its share of those that all ranks hold."""
        common = {name: fragment.part.nbytes for name, fragment in fragments.items() if fragment.everywhere}
        owner = owners(common, self.world.size if self.config.layout == "sharded" else 1)
        return {name: fragment for name, fragment in fragments.items() if owner.get(name, self.world.rank) == self.world.rank
                and (fragment.part.numel() or 0 in fragment.shape)}

    def _stage(self, fragments: Mapping[str, Fragment]) -> dict[str, torch.Tensor]:
        """Their values, in host buffers that are kept for the next time."""
        parts = {name: fragment.part.detach() for name, fragment in fragments.items()}
        for name, part in parts.items():
            kept = self._buffers.get(name)
            if kept is None or kept.shape != part.shape or kept.dtype != part.dtype:
                self._buffers[name] = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
            _copy(part, self._buffers[name])
        if any(part.is_cuda for part in parts.values()):
            torch.cuda.synchronize(self.world.device)
        self._buffers = {name: self._buffers[name] for name in parts}
        return self._buffers

    @heartbeat.saving()
    def _write(self, step: int, parts: Mapping[str, torch.Tensor], places: storage.Places, state_text: str,
               metrics: Mapping[str, float | None], stall_s: float) -> str | None:
        """The transaction, in the thread: the reason if it failed."""
        began = time.perf_counter()
        final = self.paths.checkpoint(step)
        tmp = final.with_name(final.name + TMP)

        def prepare() -> None:
            self._check_fence()
            if tmp.exists():
                shutil.rmtree(tmp)
            tmp.mkdir(parents=True)
            files.flush_folder(self.paths.root)

        def write() -> tuple[str, dict[str, Any] | None, storage.Places]:
            name = f"{self.world.rank}.safetensors"
            entry = storage.write(tmp / name, parts) if parts else None
            files.flush_folder(tmp)
            return name, entry, places

        def commit() -> None:
            files.replace_text(tmp / STATE, state_text)
            storage.write_index(tmp, {name: places for name, _, places in written})
            entries = {name: entry for name, entry, _ in written if entry is not None}
            entries |= {name: manifest.entry(tmp / name) for name in (STATE, INDEX)}
            manifest.write(tmp, step=step, entries=entries, created=utc_now(),
                           strategy=self.strategy, world_size=self.world.size, layout=self.config.layout,
                           versions={"torch": torch.__version__}, metrics=metrics)
            self._check_fence()
            if final.exists():
                old = final.with_name(final.name + OLD)
                shutil.rmtree(old, ignore_errors=True)
                os.rename(final, old)
            os.rename(tmp, final)
            files.flush_folder(final.parent)
            try:
                self.committed(step)
                self.say({"event": "checkpoint", "step": step, "path": str(final),
                          "bytes": sum(entry["size"] for entry in entries.values()),
                          "seconds": time.perf_counter() - began, "stall_s": stall_s})
                self._clean(step)
            except Exception as error:  # it is committed all the same
                self._warn(f"after the checkpoint of step {step} was committed: {error}")

        try:
            self._on_main(prepare)
            written = self._everywhere(write)
            self._on_main(commit)
        except Exception as error:
            reason = error.message if isinstance(error, UserError) else str(error)
            self.superseded = isinstance(error, Superseded)
            if self.world.main:
                self._give_up(step, tmp, reason)
            return reason
        self._committed_step = step
        return None

    def _check_fence(self) -> None:
        newest = max(self.paths.attempt_numbers(), default=0)
        if self.attempt is not None and newest > self.attempt:
            raise Superseded(f"attempt {newest} has taken the run over from attempt {self.attempt}")

    def _give_up(self, step: int, tmp: Path, reason: str) -> None:
        if self.superseded:  # the folder may be the newer attempt's by now
            return self._warn(f"the checkpoint at step {step} was not committed: {reason}")
        shutil.rmtree(tmp, ignore_errors=True)
        older = self._committed_steps()
        self._warn(f"checkpoint at step {step} could not be written: {reason}; training goes on; " +
                   (f"the newest whole one is step {older[-1]}" if older else "there is no older one"))

    def _clean(self, newest: int) -> None:
        """Delete what the newest commit makes superfluous."""
        folders.sweep(self.paths)
        # One whose manifest cannot be read is neither counted nor deleted: somebody may want to look at it.
        for step in retention.stale(folders.metrics(folders.manifests(self.paths)), self.config, newest):
            folders.delete(self.paths, step)

    def _warn(self, message: str) -> None:
        self.say({"event": "note", "level": "warning", "message": message})


def _copy(tensor: torch.Tensor, buffer: torch.Tensor) -> None:
    if tensor.is_cuda or tensor.is_conj() or tensor.is_neg() or not tensor.is_contiguous():
        buffer.copy_(tensor, non_blocking=True)
    else:
        # In one thread, by numpy: torch's several wait for each other wherever something else has a core
        # (500 MB on two busy cores: 0.19 s, not 0.06 s).
        storage.raw(buffer)[:] = storage.raw(tensor)


def owners(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Which rank writes which tensor: the largest first, each to the rank with the fewest bytes so far.

    Decided before copying and alike on every rank, so that a rank copies only what it will write.
    """
    load = [0] * ranks
    owner = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = load.index(min(load))
        load[owner[name]] += sizes[name]
    return owner
