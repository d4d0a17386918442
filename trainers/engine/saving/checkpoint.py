"""Checkpoints as transactions: a folder `step_<n>` is a whole checkpoint, or its manifest shows that it is broken.

A save has these steps, see `Checkpoints.save` and `Checkpoints._write`:

1. Every rank copies its tensors into host memory. Training continues, and a thread does the rest.
2. Rank 0 checks that no newer attempt has started, and creates an empty temporary folder.
3. Every rank writes its file of tensors into this folder and flushes it.
4. Rank 0 adds the state, the index, and the manifest with the size and hash of each file.
5. Rank 0 checks again for a newer attempt, and renames the folder to `step_<n>`. This is the commit.
6. Rank 0 reports the commit and deletes old checkpoints.

If one of steps 2 to 5 fails on one rank, the save fails on every rank, and older checkpoints stay as they are.

The evaluation of a step may end after the commit. `Checkpoints.add_evaluation` then adds the evaluation to the checkpoint.
`folders` lists what else may be in the folder of checkpoints.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence, TypeVar, cast

import torch
import torch.distributed as dist

from trainers.checkpoints import evaluation, folders, manifest, retention
from trainers.checkpoints.evaluation import Evaluation
from trainers.checkpoints.folders import BROKEN, OLD
from trainers.checkpoints.manifest import INDEX, STATE
from trainers.config.schema import Checkpoint
from trainers.contract import files, heartbeat
from trainers.contract.clock import utc_now
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths
from trainers.engine.parallel.fragments import Fragment
from trainers.engine.saving import storage
from trainers.engine.saving.staging import Staging
from trainers.engine.world import World

T = TypeVar("T")


class Superseded(UserError):
    """A newer attempt has taken over the run, so this attempt must not commit anything."""


@dataclass(frozen=True)
class _Save:
    """What the writing thread needs to write one checkpoint."""

    step: int
    final: Path                           # the folder of the committed checkpoint
    parts: Mapping[str, torch.Tensor]     # what this rank writes, in host memory
    places: storage.Places                # where each part lies in its tensor
    state_text: str
    found: Evaluation | None              # the evaluation of this step, if it is done already
    stall_s: float                        # how long `save` held up training


@dataclass(frozen=True)
class _Written:
    """The file that one rank has written."""

    name: str
    entry: dict[str, Any] | None  # for the manifest; None: the rank had nothing to write, and there is no file
    places: storage.Places


class Checkpoints:
    """The checkpoints of one run, which all ranks write and read together.

    All methods are collective: every rank calls them in the same order.

    Args:
        strategy: how the models are spread over ranks, for the manifest.
        attempt: the number of this attempt. Once a newer attempt exists, this one commits nothing. None: no such check.
        emit: called on rank 0 with events of kind `checkpoint` and `note`; also from the writing thread.
        on_commit: called on rank 0 with each committed step, in the writing thread, before older checkpoints are deleted.
    """

    def __init__(self, paths: RunPaths, world: World, config: Checkpoint, *, strategy: str, attempt: int | None,
                 emit: Callable[[Mapping[str, Any]], None], on_commit: Callable[[int], None]):
        self.paths, self.world, self.config, self.strategy = paths, world, config, strategy
        self.attempt, self.emit, self.on_commit = attempt, emit, on_commit
        self._name = secrets.token_hex(4) if attempt is None else str(attempt)  # in the names of temporary folders
        # The writing thread has its own group: collectives of two threads in one group could be mixed up.
        self.group = world.new_gloo_group()
        self.superseded = False  # whether a save failed because a newer attempt has taken over the run
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[str | None] | None = None  # the last save
        self._last: Future[Any] | None = None            # the last work of any kind
        self._committed_step: int | None = None
        self._staging = Staging()

    def newest(self) -> int | None:
        """Return the newest step whose checkpoint is whole by its manifest; None if no checkpoint was ever committed.

        Newer checkpoints that are broken are reported and moved aside.

        Raises:
            UserError: there are checkpoints, but none is whole.
        """
        self.wait()
        broken: dict[int, str] = {}
        for step in reversed(self._on_rank_0(self._committed_steps)):
            problem = self._problem(step)
            if problem is None:
                if broken:
                    self._on_rank_0(lambda: self._move_aside(broken, whole=step))
                return step
            broken[step] = problem
        if broken:
            problems = "; ".join(f"step_{step}: {problem}" for step, problem in broken.items())
            raise UserError(f"no checkpoint in {self.paths.checkpoints} is whole ({problems})",
                            "put a good copy back, or delete that folder to start from the beginning")
        return None

    def best(self) -> int | None:
        """Return the step of the best whole checkpoint by `checkpoint.metric`; None if no checkpoint is kept for being good, or
        none was evaluated. Waits for everything that the thread has begun."""
        if self.config.metric is None or not self.config.keep_best:
            return None

        def ranked() -> list[int]:
            if self._last is not None:
                wait([self._last])
            return retention.ranked(folders.metrics(self.paths), self.config)

        return next((step for step in reversed(self._on_rank_0(ranked)) if self._problem(step) is None), None)

    def load(self, step: int) -> tuple[storage.Reader, dict[str, Any]]:
        """Return a reader of the tensors and the state of a step that `newest` returned. The number of ranks may differ from
        that of the save.

        Raises:
            UserError: the files are not what `save` writes.
        """
        self.wait()
        folder = self.paths.checkpoint(step)
        loaded: list[Any] = []

        def read() -> None:
            reader = storage.Reader(folder)
            loaded[:] = reader, reader.json(STATE)

        self._on_all_ranks(read)
        return loaded[0], loaded[1]

    def evaluation(self, step: int) -> Evaluation | None:
        """Return the evaluation of a step that `newest` returned; None if the checkpoint was not evaluated."""
        return self._on_rank_0(lambda: evaluation.read(self.paths.checkpoint(step), step))

    def save(self, step: int, fragments: Mapping[str, Fragment], state: Mapping[str, Any],
             found: Evaluation | None = None) -> None:
        """Copy everything and return; a thread writes and commits the checkpoint. Waits for the previous save first.

        Does nothing if `step` is the last step that this object has committed. `wait` tells whether the save succeeded.

        Args:
            fragments: this rank's part of each tensor, on any device. A tensor that every rank holds whole is written by one
                rank, so its values must be the same on all ranks. (Under DDP buffers drift apart: use `share_buffers` first.)
            state: anything that JSON can hold. Rank 0's is written.
            found: the evaluation of this step, if it is done already. Rank 0's is written.
        """
        started = time.perf_counter()
        self.wait()
        if step == self._committed_step:
            return
        state_text = json.dumps(state, indent=1) + "\n"
        own = self._own(fragments)
        copies = self._staging.copies({name: fragment.part for name, fragment in own.items()})
        self._last = self._writing = self._writer.submit(self._write, _Save(
            step, self.paths.checkpoint(step), parts=copies,
            places={name: (fragment.start, fragment.shape) for name, fragment in own.items()},
            state_text=state_text, found=found, stall_s=time.perf_counter() - started))

    def add_evaluation(self, step: int, found: Evaluation) -> None:
        """Add an evaluation to the checkpoint of its step, and return; the thread does so after the saves that it has begun.

        The evaluation may change which checkpoints are the best, so old checkpoints are deleted again. If the evaluation
        cannot be written, there is a warning, and a run that resumes from this checkpoint evaluates again.
        """
        if self.world.main:
            self._last = self._writer.submit(self._write_evaluation, step, found)

    def wait(self) -> str | None:
        """Wait until the last save is committed or has failed. Return the reason if it failed, the same on every rank."""
        return self._writing.result() if self._writing else None

    def close(self, timeout_s: float | None = None) -> None:
        """Wait until the thread has done everything, or for at most `timeout_s` seconds, and end the thread."""
        self._writer.shutdown(wait=False)
        if self._last is not None:
            wait([self._last], timeout_s)

    # -- agreement between ranks

    def _on_all_ranks(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank and return all results, by rank.

        If `work` fails on any rank, every rank raises the error of the first rank that failed, and no rank hangs.
        """
        own: T | UserError
        try:
            own = work()
        except UserError as error:
            own = error
        except Exception as error:
            own = UserError(str(error) or type(error).__name__)
        outcomes = [own]
        if self.group is not None:
            outcomes = [own] * self.world.size
            dist.all_gather_object(outcomes, own, group=self.group)
        results: list[T] = []
        for outcome in outcomes:
            if isinstance(outcome, UserError):
                raise outcome
            results.append(outcome)
        return results

    def _on_rank_0(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return the result on every rank."""
        return cast(T, self._on_all_ranks(lambda: work() if self.world.main else None)[0])

    # -- finding a whole checkpoint

    def _committed_steps(self) -> list[int]:
        folders.put_back(self.paths)
        return self.paths.checkpoint_steps()

    def _problem(self, step: int) -> str | None:
        """Return what is wrong with a checkpoint, or None if it is whole. Each rank verifies its share of the files."""
        folder = self.paths.checkpoint(step)

        def read_manifest() -> tuple[dict[str, Any], str | None]:
            try:
                return manifest.read(folder, step)["files"], None
            except manifest.Broken as problem:
                return {}, str(problem)

        entries, problem = self._on_rank_0(read_manifest)
        if problem is not None:
            return problem
        by_size = sorted(entries, key=lambda name: (-entries[name]["size"], name))

        def verify() -> str | None:
            try:
                for name in by_size[self.world.rank::self.world.size]:
                    manifest.check(folder, name, entries[name])
            except manifest.Broken as problem:
                return str(problem)
            return None

        return next((problem for problem in self._on_all_ranks(verify) if problem is not None), None)

    def _move_aside(self, broken: Mapping[int, str], whole: int) -> None:
        for step, problem in broken.items():
            path = self.paths.checkpoint(step)
            aside = path.with_name(path.name + BROKEN)
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            self._warn(f"the checkpoint of step {step} is broken ({problem}): skipped and moved to {aside.name}; "
                       f"resuming at step {whole}")

    # -- step 1 of a save: copying

    def _own(self, fragments: Mapping[str, Fragment]) -> dict[str, Fragment]:
        """Return the fragments that this rank writes: those that only this rank holds, and its share of the others."""
        common = {name: fragment.part.nbytes for name, fragment in fragments.items() if fragment.replicated}
        owner = owners(common, self.world.size if self.config.layout == "sharded" else 1)
        return {name: fragment for name, fragment in fragments.items() if owner.get(name, self.world.rank) == self.world.rank
                and (fragment.part.numel() or 0 in fragment.shape)}

    # -- steps 2 to 6 of a save, in the thread

    @heartbeat.saving()
    def _write(self, save: _Save) -> str | None:
        """Write and commit a checkpoint. Return the reason if the save failed."""
        started = time.perf_counter()

        def commit() -> None:
            size = self._seal(save, tmp, written)
            self._check_fence()
            self._rename(tmp, save.final)
            self._after_commit(save, size, started)

        try:
            tmp = self._on_rank_0(lambda: self._create_folder(save))
            written = self._on_all_ranks(lambda: self._write_part(save, tmp))
            self._on_rank_0(commit)
        except Exception as error:
            reason = error.message if isinstance(error, UserError) else str(error)
            self.superseded = isinstance(error, Superseded)
            if self.world.main:
                self._give_up(save, reason)
            return reason
        self._committed_step = save.step
        return None

    def _create_folder(self, save: _Save) -> Path:
        self._check_fence()
        tmp = folders.unfinished(save.final, self._name)
        if tmp.exists():
            shutil.rmtree(tmp)
        tmp.parent.mkdir(exist_ok=True)  # not its parents: a run whose folder was deleted must not make it again
        tmp.mkdir()
        files.flush_folder(self.paths.root)
        return tmp

    def _write_part(self, save: _Save, tmp: Path) -> _Written:
        name = f"{self.world.rank}.safetensors"
        entry = storage.write(tmp / name, save.parts) if save.parts else None
        files.flush_folder(tmp)
        return _Written(name, entry, save.places)

    def _seal(self, save: _Save, tmp: Path, written: Sequence[_Written]) -> int:
        """Write the state, the index and the manifest. Return the bytes of all files in the manifest."""
        files.replace_text(tmp / STATE, save.state_text)
        storage.write_index(tmp, {file.name: file.places for file in written})
        if save.found is not None:
            evaluation.write(tmp, save.step, save.found)
        entries = {file.name: file.entry for file in written if file.entry is not None}
        entries |= {name: manifest.entry(tmp / name) for name in (STATE, INDEX)}
        manifest.write(tmp, step=save.step, entries=entries, created=utc_now(),
                       strategy=self.strategy, world_size=self.world.size, layout=self.config.layout,
                       versions={"torch": torch.__version__})
        return sum(entry["size"] for entry in entries.values())

    def _rename(self, tmp: Path, final: Path) -> None:
        """Rename the folder, which commits the checkpoint. A previous checkpoint of the same step is first renamed to
        `step_<n>.old`; `folders.put_back` undoes this if the commit does not follow."""
        if final.exists():
            old = final.with_name(final.name + OLD)
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
        os.rename(tmp, final)
        files.flush_folder(final.parent)

    def _after_commit(self, save: _Save, size: int, started: float) -> None:
        """Report the commit and delete old checkpoints. A failure here is only a warning: the checkpoint is committed."""
        try:
            self.on_commit(save.step)
            self.emit({"event": "checkpoint", "step": save.step, "path": str(save.final), "bytes": size,
                      "seconds": time.perf_counter() - started, "stall_s": save.stall_s})
            self._delete_old(save.step)
        except Exception as error:
            self._warn(f"the checkpoint of step {save.step} was committed, but work after the commit failed: {error}")

    def _check_fence(self) -> None:
        """Raises: Superseded: there is a newer attempt."""
        newest = max(self.paths.attempt_numbers(), default=0)
        if self.attempt is not None and newest > self.attempt:
            raise Superseded(f"attempt {newest} has taken the run over from attempt {self.attempt}")

    def _give_up(self, save: _Save, reason: str) -> None:
        shutil.rmtree(folders.unfinished(save.final, self._name), ignore_errors=True)
        if self.superseded:
            return self._warn(f"the checkpoint of step {save.step} was not committed: {reason}")
        older = self._committed_steps()
        self._warn(f"the checkpoint of step {save.step} could not be written: {reason}; training continues; " +
                   (f"the newest whole checkpoint is step {older[-1]}" if older else "there is no older checkpoint"),
                   unsaved=save.step)

    def _delete_old(self, newest: int) -> None:
        """Delete the checkpoints that are not needed any more. `newest` is the step of the newest one."""
        folders.delete_leftovers(self.paths, self.attempt)
        # A checkpoint whose manifest cannot be read is neither counted nor deleted: somebody may want to look at it.
        for step in retention.stale(folders.metrics(self.paths), self.config, newest):
            folders.delete(self.paths, step)

    # -- after a save, in the thread

    def _write_evaluation(self, step: int, found: Evaluation) -> None:
        folder = self.paths.checkpoint(step)
        if not folder.exists():  # the save has failed
            return
        try:
            self._check_fence()
            evaluation.write(folder, step, found)
            self._delete_old(step)
        except Exception as error:
            reason = error.message if isinstance(error, UserError) else error
            self._warn(f"the evaluation of step {step} could not be added to its checkpoint: {reason}")

    def _warn(self, message: str, **more: int) -> None:
        self.emit({"event": "note", "level": "warning", "message": message, **more})


def owners(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Return which rank writes which tensor: the largest tensor first, each by the rank with the fewest bytes so far.

    The result is the same on every rank and known before the copy, so a rank copies only the tensors that it writes.

    Args:
        sizes: the bytes of each tensor, by name.
    """
    load = [0] * ranks
    owner = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = load.index(min(load))
        load[owner[name]] += sizes[name]
    return owner
