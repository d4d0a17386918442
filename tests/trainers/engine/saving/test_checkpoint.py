"""Checkpoints, on one rank in this process and on several real ranks. This file is also the program of those ranks."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import resource
import shutil
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import wait_until
from crashes import CRASH_CODE, crash_at, run_forked
from ranks import Ranks, serve
from saving import Run, bits, make, whole

from trainers.checkpoints import evaluation, folders, manifest, tensor_files
from trainers.checkpoints.evaluation import Evaluation
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths
from trainers.engine.saving import storage

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path)
    yield run
    run.checkpoints.close()


@pytest.fixture
def blocked(monkeypatch):
    """An event; writing waits for it."""
    go, write = threading.Event(), storage.write
    monkeypatch.setattr(storage, "write", lambda *args: go.wait(60) and write(*args))
    yield go
    go.set()


# ---- one rank


@pytest.mark.parametrize("layout", ["full", "sharded"])
def test_a_loaded_checkpoint_equals_the_saved_one_to_the_bit(tmp_path, layout):
    run = Run(tmp_path, layout=layout)
    assert run.save(3) is None and run.checkpoints.newest() == 3
    assert run.load(3) == bits(make(3))


def test_a_commit_is_reported_with_its_size_and_times(run):
    run.save(3, {"top1": 0.5, "loss": float("nan")})
    [event] = run.events
    assert run.committed == [3]
    assert (event["event"], event["step"], event["path"]) == ("checkpoint", 3, str(run.paths.checkpoint(3)))
    files = [path for path in run.paths.checkpoint(3).iterdir() if path.name not in (manifest.NAME, evaluation.NAME)]
    assert event["bytes"] == sum(path.stat().st_size for path in files)
    assert 0 < event["stall_s"] and 0 < event["seconds"]
    content = manifest.read(run.paths.checkpoint(3), 3)
    assert folders.metrics(run.paths) == {3: {"top1": 0.5, "loss": None}} and content["world_size"] == 1
    assert sorted(content["files"]) == sorted(path.name for path in files)


def test_changes_after_save_do_not_reach_the_checkpoint(run, blocked):
    tensors = {"a": torch.randn(50), "b": torch.nn.Parameter(torch.randn(3, 4))}
    state, before = {"step": 1}, bits(tensors)
    run.checkpoints.save(1, whole(tensors), state)
    for tensor in tensors.values():
        tensor.detach().zero_()
    state["step"] = 99
    assert run.committed == []
    blocked.set()
    assert run.checkpoints.wait() is None
    reader, loaded = run.checkpoints.load(1)
    assert loaded == {"step": 1} and bits({name: reader.tensor(name) for name in before}) == before


def test_an_evaluation_is_added_after_the_commit_and_decides_what_is_kept(tmp_path, blocked):
    run = Run(tmp_path, keep_last=1, keep_best=1, metric="top1")
    for step, top1 in [(1, 0.5), (2, 0.9), (3, 0.1)]:
        run.checkpoints.save(step, whole(make(step)), {"step": step})
        run.checkpoints.add_evaluation(step, Evaluation({"top1": top1, "loss": math.nan}, [0.9]))  # before the commit
        blocked.set()
    run.checkpoints.close()
    assert run.committed == [1, 2, 3] and run.names() == ["step_2", "step_3"]
    found = Run(tmp_path).checkpoints.evaluation(2)
    assert found.metrics["top1"] == 0.9 and math.isnan(found.metrics["loss"]) and found.best == [0.9]
    assert folders.metrics(run.paths) == {2: {"top1": 0.9, "loss": None}, 3: {"top1": 0.1, "loss": None}}


def test_without_a_whole_evaluation_a_checkpoint_is_whole_but_not_evaluated(run):
    assert run.save(1) is None and run.checkpoints.evaluation(1) is None
    run.checkpoints.add_evaluation(1, Evaluation({"top1": 0.5}, []))
    run.checkpoints.close()
    file = run.paths.checkpoint(1) / evaluation.NAME
    assert run.checkpoints.evaluation(1).metrics == {"top1": 0.5}
    for what, content in damages(file):
        damage(file, content)
        assert run.checkpoints.evaluation(1) is None and folders.metrics(run.paths) == {1: {}}, what
        assert run.checkpoints.newest() == 1


def test_an_evaluation_of_a_superseded_attempt_or_of_a_failed_save_is_not_written(tmp_path, monkeypatch):
    run = Run(tmp_path, attempt=1)
    run.paths.attempt(1).mkdir(parents=True)
    assert run.save(1) is None
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", full_disk)
        assert "No space left" in run.save(2)
    run.checkpoints.add_evaluation(2, Evaluation({}, []))
    run.paths.attempt(2).mkdir()
    run.checkpoints.add_evaluation(1, Evaluation({}, []))
    run.checkpoints.close()
    assert "evaluation of step 1 could not be added to its checkpoint: attempt 2 has taken the run over" in run.notes()[-1]
    assert run.names() == ["step_1"] and run.checkpoints.evaluation(1) is None


def test_two_attempts_never_write_into_one_folder(tmp_path, blocked):
    """The newer attempt saves the same step while the older attempt, which is not known to be gone, still writes."""
    old = Run(tmp_path, attempt=1)
    old.paths.attempt(1).mkdir(parents=True)
    old.checkpoints.save(5, whole({"x": torch.zeros(3)}), {"step": 5})
    wait_until(lambda: old.paths.checkpoints.exists() and old.names() == ["step_5.1.tmp"], 20)
    old.paths.attempt(2).mkdir()
    new = Run(tmp_path, attempt=2)
    new.checkpoints.save(5, whole(make(5)), {"step": 5})
    wait_until(lambda: new.names() == ["step_5.1.tmp", "step_5.2.tmp"], 20)
    blocked.set()
    assert new.checkpoints.wait() is None and old.checkpoints.wait() is not None
    assert new.names() == ["step_5"] and new.checkpoints.newest() == 5 and new.load(5) == bits(make(5))


def test_a_commit_deletes_no_folder_of_a_newer_attempt(tmp_path):
    run = Run(tmp_path, attempt=2)
    for name in ("step_1.tmp", "step_1.1.tmp", "step_1.2.tmp", "step_1.3.tmp", "step_1.deleted.tmp", "step_1.0a9b.tmp"):
        (run.paths.checkpoints / name).mkdir(parents=True)
    run.save(4)
    assert run.names() == ["step_1.3.tmp", "step_4"]


def test_closing_waits_for_a_limited_time_only(run, blocked):
    run.checkpoints.save(1, whole(make(1)), {"step": 1})
    began = time.monotonic()
    run.checkpoints.close(0.2)
    assert 0.2 <= time.monotonic() - began < 20 and run.committed == []
    threading.Timer(0.2, blocked.set).start()
    run.checkpoints.close(60)
    assert run.committed == [1]


def test_host_buffers_are_used_again(run, monkeypatch):
    addresses, write = [], storage.write

    def record(file, tensors):
        addresses.append({name: tensor.data_ptr() for name, tensor in tensors.items()})
        return write(file, tensors)

    monkeypatch.setattr(storage, "write", record)
    run.save(1), run.save(2)
    assert addresses[0] == addresses[1] and len(addresses[0]) == len(make(1))
    smaller = {name: tensor for name, tensor in make(3).items() if name != "bf16"} | {"step": torch.tensor([3, 3])}
    assert run.save(3, tensors=smaller) is None
    assert run.load(3) == bits(smaller)


def test_a_save_waits_for_the_previous_save(run, blocked):
    run.checkpoints.save(1, whole(make(1)), {"step": 1})
    threading.Timer(0.3, blocked.set).start()
    run.checkpoints.save(2, whole(make(2)), {"step": 2})
    assert run.committed == [1]
    run.checkpoints.close()
    assert run.committed == [1, 2] and run.events[1]["stall_s"] >= 0.2


def test_a_committed_step_is_not_saved_again(run):
    run.save(1)
    assert run.save(1) is None and run.committed == [1]


def test_no_checkpoint_is_no_error(run):
    assert run.checkpoints.newest() is None and run.checkpoints.wait() is None
    (run.paths.checkpoints / "step_4.tmp").mkdir(parents=True)
    assert run.checkpoints.newest() is None and run.events == []


FILES = ["0.safetensors", "1.safetensors", "index.json", "manifest.json", "state.json"]  # written by two ranks


def damages(path: Path):
    """Yield each (damage, damaged content of the file); None stands for a missing file."""
    whole = path.read_bytes()
    for place in sorted({0, len(whole) // 2, len(whole) - 1}):
        yield f"byte {place}", whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:]
    yield "cut", whole[:-1]
    yield "emptied", b""
    yield "missing", None


def damage(path: Path, content: bytes | None) -> None:
    path.unlink() if content is None else path.write_bytes(content)


def test_a_checkpoint_with_any_damage_to_any_file_is_passed_over(tmp_path, two):
    two("save", root=tmp_path / "whole", steps=[1, 2])
    names = sorted(os.listdir(tmp_path / "whole/checkpoints/step_2"))
    assert names == FILES
    for name in names:
        for what, content in damages(tmp_path / "whole/checkpoints/step_2" / name):
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            shutil.copytree(tmp_path / "whole", tmp_path / "run")
            damage(tmp_path / "run/checkpoints/step_2" / name, content)
            run = Run(tmp_path / "run")
            assert run.checkpoints.newest() == 1, (name, what)
            assert run.names() == ["step_1", "step_2.broken"]
            [note] = run.events
            assert note["level"] == "warning" and "step 2" in note["message"] and name in note["message"]
            run.checkpoints.close()
    assert Run(tmp_path / "whole").checkpoints.newest() == 2


def test_without_a_whole_checkpoint_there_is_an_error_and_nothing_is_moved(run):
    run.save(1), run.save(2)
    for step in (1, 2):
        damage(run.paths.checkpoint(step) / "state.json", None)
    run.events.clear()
    with pytest.raises(UserError, match=r"step_2: state.json is missing; step_1: state.json is missing") as error:
        run.checkpoints.newest()
    assert error.value.hint and run.names() == ["step_1", "step_2"] and run.events == []


def plant(run: Run, step: int, name: str, content: bytes) -> None:
    """Put a foreign file into a checkpoint and its manifest."""
    folder = run.paths.checkpoint(step)
    (folder / name).write_bytes(content)
    entries = manifest.read(folder, step)["files"]
    manifest.write(folder, step=step, entries=entries | {name: manifest.entry(folder / name)})
    assert run.checkpoints.newest() == step


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


PLANTS = {
    "0.safetensors": [
        pickle.dumps, lambda evil: b"", lambda evil: b"\xff" * 64, lambda evil: (2**40).to_bytes(8, "little") + b"{}",
        lambda evil: header({}), lambda evil: header({"int64": []}), lambda evil: header({name: {} for name in make(1)}),
        lambda evil: header({name: {"dtype": "F32", "shape": [9**9], "data_offsets": [0, 9**9]} for name in make(1)}),
        lambda evil: header({name: {"dtype": "F31", "shape": [1], "data_offsets": [0, 1]} for name in make(1)}),
        lambda evil: header({name: {"dtype": "F32", "shape": [10**4], "data_offsets": [-9, 4]} for name in make(1)}),
    ],
    "index.json": [
        pickle.dumps, lambda evil: b"", lambda evil: b"[]", lambda evil: b'{"tensors": [1]}',
        lambda evil: b'{"tensors": {"int64": {"shape": [5, 3], "parts": {}}}}',
        lambda evil: b'{"tensors": {"int64": {"shape": [5, 3], "parts": {"0.safetensors": -3}}}}',
        lambda evil: b'{"tensors": {"int64": {"shape": [5, 4], "parts": {"0.safetensors": 0}}}}',
        lambda evil: b'{"tensors": {"int64": {"shape": [5, 3], "parts": {"7.safetensors": 0}}}}',
        lambda evil: b'{"tensors": {"else": {"shape": [5, 3], "parts": {"0.safetensors": 0}}}}',
    ],
    "state.json": [pickle.dumps, lambda evil: b"", lambda evil: b"{"],
}


def header(value) -> bytes:
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + bytes(100)


@pytest.mark.parametrize("name, content", [(name, content) for name, contents in PLANTS.items() for content in contents])
def test_a_planted_file_is_refused_and_not_executed(run, tmp_path, name, content):
    run.save(1)
    plant(run, 1, name, content(Evil(tmp_path / "owned")))
    with pytest.raises(UserError, match="step_1 cannot be loaded"):
        run.load(1)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("file", ["../step_1/0.safetensors", "/etc/passwd", "..", ""])
def test_the_index_may_not_point_out_of_the_folder(run, file):
    run.save(1)
    plant(run, 1, "index.json", json.dumps({"tensors": {"step": {"shape": [], "parts": {file: 0}}}}).encode())
    with pytest.raises(UserError, match="names a file outside of the checkpoint"):
        run.checkpoints.load(1)


def test_a_checkpoint_holds_no_path_of_the_machine(run, tmp_path):
    run.save(1)
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in run.paths.checkpoint(1).iterdir())


def test_after_a_failure_the_same_step_can_be_saved(run, monkeypatch):
    run.save(1)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", full_disk)
        assert "No space left" in run.save(2)
    assert run.names() == ["step_1"] and "newest whole checkpoint is step 1" in run.notes()[0]
    assert run.save(2) is None and run.committed == [1, 2] and run.load(2) == bits(make(2))


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_first_save_says_that_there_is_no_older_checkpoint(run, monkeypatch):
    monkeypatch.setattr(manifest, "write", full_disk)
    assert run.save(1) is not None
    assert run.notes()[0].endswith("there is no older checkpoint") and run.names() == []


@pytest.mark.parametrize("when", ["before", "while writing"])
def test_a_superseded_attempt_commits_nothing(tmp_path, monkeypatch, when):
    run = Run(tmp_path, attempt=2)
    for number in (1, 2):
        run.paths.attempt(number).mkdir(parents=True)
    assert run.save(1) is None and not run.checkpoints.superseded
    if when == "before":
        run.paths.attempt(10).mkdir()
    else:
        write = storage.write
        monkeypatch.setattr(storage, "write", lambda *args: run.paths.attempt(10).mkdir() or write(*args))
    assert "attempt 10 has taken the run over from attempt 2" in run.save(2)
    assert run.checkpoints.superseded and run.committed == [1] and run.checkpoints.newest() == 1
    assert "step 2 was not committed" in run.notes()[0]


def test_old_checkpoints_and_leftovers_are_deleted_after_a_commit(tmp_path):
    run = Run(tmp_path, keep_last=2, keep_best=1, keep_every=4, metric="top1")
    for name in ("step_1.tmp", "step_77.tmp", "step_5.broken", "step_6.old", "mine", "step_x.tmp"):
        (run.paths.checkpoints / name).mkdir(parents=True)
        (run.paths.checkpoints / name / "file").write_text("x")
    for step in range(1, 9):
        assert run.save(step, {"top1": 0.9 if step == 3 else 0.1}) is None
        assert run.committed[-1] == step
    assert run.names() == ["mine", "step_3", "step_4", "step_7", "step_8", "step_x.tmp"]


def test_a_checkpoint_with_an_unreadable_manifest_is_neither_counted_nor_deleted(tmp_path):
    run = Run(tmp_path, keep_last=1)
    run.save(1)
    damage(run.paths.checkpoint(1) / manifest.NAME, b"{")
    run.save(2), run.save(3)
    assert run.names() == ["step_1", "step_3"]


def test_a_failure_after_the_commit_is_a_warning_and_the_commit_stands(run, monkeypatch):
    monkeypatch.setattr(run.checkpoints, "on_commit", full_disk)
    assert run.save(1) is None and run.checkpoints.newest() == 1
    assert run.notes() == ["the checkpoint of step 1 was committed, but work after the commit failed: "
                           "[Errno 28] No space left on device"]


def test_an_earlier_checkpoint_of_the_same_step_is_replaced(tmp_path):
    Run(tmp_path).save(5, tensors={"x": torch.zeros(3)})
    run = Run(tmp_path)
    assert run.save(5) is None and run.names() == ["step_5"] and run.load(5) == bits(make(5))


def test_a_replaced_checkpoint_is_put_back_if_its_successor_was_not_committed(tmp_path, monkeypatch):
    Run(tmp_path).save(5)
    run, rename = Run(tmp_path), os.rename

    def fail(source, target):
        return full_disk() if Path(source).suffix == ".tmp" else rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        assert "No space" in run.save(5, tensors={"x": torch.zeros(3)})
    assert run.names() == ["step_5"]
    os.rename(run.paths.checkpoint(5), run.paths.checkpoints / "step_5.old")  # killed between the two renames
    assert Run(tmp_path).checkpoints.newest() == 5 and run.names() == ["step_5"]


# ---- several ranks


@pytest.fixture(scope="module")
def two(ranks):
    return ranks(2)


@pytest.mark.parametrize("layout", ["full", "sharded"])
def test_one_rank_loads_a_checkpoint_of_two_and_the_reverse(two, tmp_path, layout):
    assert two("save", root=tmp_path, steps=[1], layout=layout) == [[None], [None]]
    parts = sorted(path.name for path in (tmp_path / "checkpoints/step_1").glob("*.safetensors"))
    assert parts == (["0.safetensors"] if layout == "full" else ["0.safetensors", "1.safetensors"])
    run = Run(tmp_path, layout=layout)
    assert run.checkpoints.newest() == 1 and run.load(1) == bits(make(1))
    assert run.save(2) is None
    for step, loaded in two("load_newest", root=tmp_path, layout=layout):
        assert step == 2 and loaded == bits(make(2))


def test_each_of_two_ranks_writes_half(two, tmp_path):
    two("save_megabytes", root=tmp_path, count=10)
    parts = [path.stat().st_size for path in (tmp_path / "checkpoints/step_1").glob("*.safetensors")]
    assert len(parts) == 2 and all(abs(size - 5 * 2**20) < 2**17 for size in parts)


@pytest.mark.parametrize("name", FILES)
def test_all_ranks_pass_over_a_checkpoint_that_one_rank_finds_broken(two, tmp_path, name):
    two("save", root=tmp_path, steps=[1, 2])
    damage(tmp_path / "checkpoints/step_2" / name, b"x" * (tmp_path / "checkpoints/step_2" / name).stat().st_size)
    assert [step for step, _ in two("load_newest", root=tmp_path)] == [1, 1]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_1", "step_2.broken"]


def test_all_ranks_get_the_error_if_no_checkpoint_is_whole(two, tmp_path):
    two("save", root=tmp_path, steps=[1])
    damage(tmp_path / "checkpoints/step_1/1.safetensors", None)
    messages = two("newest_error", root=tmp_path)
    assert messages[0] == messages[1] and "1.safetensors is missing" in messages[0]


@pytest.mark.parametrize("how", ["file limit", "flush", "hash", "write"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_fails_the_save_on_all_ranks(two, tmp_path, how, rank):
    results = two("fail_on", root=tmp_path, rank=rank, how=how)
    reasons = [reason for reason, *_ in results]
    expected = {"file limit": "File too large", "write": "odd"}.get(how, "No space left on device")
    assert reasons[0] == reasons[1] and expected in reasons[0]
    for _, names, newest, again, loaded in results:
        assert names == ["step_1"] and newest == 1 and again is None and loaded == bits(make(2))
    assert Run(tmp_path).checkpoints.newest() == 2


def test_training_may_communicate_while_a_thread_writes(two, tmp_path):
    total, reasons = 2 * sum(range(300)), [None, None, None]
    assert two("save_and_reduce", root=tmp_path, count=300) == [[total, reasons], [total, reasons]]


def test_a_slow_writer_fails_neither_its_save_nor_later_saves(two, tmp_path):
    """torch's groups give up after 30 minutes, here after 1 s, and are of no use afterwards."""
    assert two("save_slowly", root=tmp_path, rank=1, pause_s=3, timeout_s=1) == [[None, None], [None, None]]
    assert Run(tmp_path).checkpoints.newest() == 2


def test_a_save_of_a_superseded_attempt_fails_on_all_ranks(two, tmp_path):
    RunPaths(tmp_path).attempt(4).mkdir(parents=True)
    assert two("save_superseded", root=tmp_path, attempt=3) == [[True, True], [True, True]]


@pytest.mark.slow
def test_four_ranks_save_and_load(ranks, tmp_path):
    four = ranks(4)
    for layout in ("sharded", "full"):
        root = tmp_path / layout
        assert four("save", root=root, steps=[1], layout=layout) == [[None]] * 4
        for step, loaded in four("load_newest", root=root):
            assert step == 1 and loaded == bits(make(1))
        assert Run(root).load(1) == bits(make(1))
    Run(tmp_path / "one").save(1)
    assert [loaded for _, loaded in four("load_newest", root=tmp_path / "one")] == [bits(make(1))] * 4
    four("save_megabytes", root=tmp_path / "even", count=12)
    parts = [path.stat().st_size for path in (tmp_path / "even/checkpoints/step_1").glob("*.safetensors")]
    assert len(parts) == 4 and all(abs(size - 3 * 2**20) < 2**17 for size in parts)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_while_writing_leaves_the_older_checkpoint(tmp_path, victim):
    ranks = Ranks(2, __file__)
    ranks("save", root=tmp_path / "run", steps=[1])
    with pytest.raises((AssertionError, BrokenPipeError), match="died"):
        ranks("die", root=tmp_path / "run", rank=victim)
    ranks.close()
    run = Run(tmp_path / "run")
    assert run.checkpoints.newest() == 1 and run.load(1) == bits(make(1))
    assert run.save(2) is None and run.names() == ["step_1", "step_2"]


@pytest.mark.slow
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    ranks = Ranks(1, __file__)
    [newest] = ranks("kill_everywhere", folder=tmp_path)
    ranks.close()
    # A kill before the commit leaves the old checkpoint as the newest, a kill after the commit the new one.
    commit = newest.index(2)
    assert commit > 10 and len(newest) - commit > 3
    assert newest == [1] * commit + [2] * (len(newest) - commit)


# ---- on the ranks


def save_slowly(world, root, rank, pause_s, timeout_s):
    """Save twice. `rank` pauses while it writes the first checkpoint; new groups of torch give up after `timeout_s`."""
    import torch.distributed.distributed_c10d as torch_groups

    write, timeout = storage.write, torch_groups.default_pg_timeout
    torch_groups.default_pg_timeout = timedelta(seconds=timeout_s)
    try:
        run = Run(root, world)
        storage.write = lambda *args: time.sleep(pause_s * (world.rank == rank)) or write(*args)
        first = run.save(1)
        storage.write = write
        return [first, run.save(2)]
    finally:
        storage.write, torch_groups.default_pg_timeout = write, timeout
        run.checkpoints.close()


def save(world, root, steps, **settings):
    run = Run(root, world, **settings)
    reasons = [run.save(step) for step in steps]
    assert run.committed == (steps if world.main else [])
    run.checkpoints.close()
    return reasons


def save_megabytes(world, root, count):
    run = Run(root, world)
    run.save(1, tensors={str(i): torch.zeros(2**18) for i in range(count)})
    run.checkpoints.close()


def load_newest(world, root, **settings):
    run = Run(root, world, **settings)
    step = run.checkpoints.newest()
    return step, run.load(step)


def newest_error(world, root):
    with pytest.raises(UserError) as error:
        Run(root, world).checkpoints.newest()
    return str(error.value)


def fail_on(world, root, rank, how):
    class Odd(Exception):
        def __reduce__(self):
            raise TypeError("an error that pickle refuses")

    def odd(*args):
        raise Odd("odd")

    run = Run(root, world)
    assert run.save(1) is None
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == rank:
            if how == "file limit":  # the system refuses to write more, as on a full disk
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
            elif how == "flush":
                patch.setattr(tensor_files.os, "fsync", full_disk)
            elif how == "hash":
                patch.setattr(tensor_files.hashlib, "sha256", full_disk)
            else:
                patch.setattr(storage, "write", odd)
        reason = run.save(2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()
    names, newest = run.names(), run.checkpoints.newest()
    again = run.save(2)
    return reason, names, newest, again, run.load(2)


def save_and_reduce(world, root, count):
    run, total, reasons = Run(root, world), 0, []
    for step in (1, 2, 3):
        run.checkpoints.save(step, whole(make(step)), {"step": step})
        total = 0
        for i in range(count):
            value = torch.tensor(i)
            dist.all_reduce(value)
            total += value.item()
        reasons.append(run.checkpoints.wait())
    return total, reasons


def save_superseded(world, root, attempt):
    run = Run(root, world, attempt=attempt)
    reason = run.save(1)
    return "attempt 4 has taken" in reason, run.checkpoints.superseded


def die(world, root, rank):
    if world.rank == rank:
        storage.write = lambda *args: os._exit(9)
    return Run(root, world).save(2)


def kill_everywhere(world, folder):
    """Kill a save at its first, second, ... event on a file. Return the newest step after each kill.

    Each save runs in its own process, which is forked here because no thread runs here. With keep_last=1 the killed save
    would delete the older checkpoint at its end.
    """
    def save_until(event: int | None, root: Path) -> int:
        run = Run(root, world, keep_last=1)
        if event is not None:
            crash_at(event, root)
        assert run.save(1 if event is None else 2) is None
        return 0

    def find(root: Path) -> int:
        run = Run(root, world, keep_last=1)
        step = run.checkpoints.newest()
        assert run.load(step) == bits(make(step)) and run.notes() == []
        assert run.save(3) is None and run.names() == ["step_3"]  # all leftovers are gone
        return step

    newest = []
    for event in range(1, 1000):
        root = Path(folder) / f"killed {event}"
        assert run_forked(lambda: save_until(None, root)) == 0
        status = run_forked(lambda: save_until(event, root))
        newest.append(run_forked(lambda: find(root)))
        if status == 0:
            return newest
        assert status == CRASH_CODE
    raise AssertionError("no save was completed")


if __name__ == "__main__":
    serve(globals())
