"""Checkpoints, on one rank in this process and on several real ones.

This file is also the program of those ranks: it reads calls of the functions under "on the ranks" from
standard input and answers each with what the function returns.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from trainers import config
from trainers.engine import manifest
from trainers.engine.checkpoint import Checkpoints, owners
from trainers.engine.world import World
from trainers.errors import UserError
from trainers.paths import RunPaths

DCP = "torch.distributed.checkpoint"
ONE = World(0, 1, 0, 1, torch.device("cpu"))

pytestmark = [pytest.mark.timeout(180), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


def make(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of all awkward kinds; the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    return {
        "model.layers.0/weight": torch.randn(64, 33, generator=g),
        "model/names with spaces, ünd dots...": torch.nn.Parameter(torch.randn(40, 50, generator=g)),
        "bf16": torch.randn(129, generator=g).bfloat16(),
        "fp16": torch.randn(7, generator=g).half(),
        "int64": torch.randint(-2**62, 2**62, (5, 3), generator=g),
        "bytes": torch.randint(0, 256, (11,), generator=g).byte(),
        "mask": torch.rand(9, generator=g) > 0.5,
        "complex": torch.randn(3, generator=g) + 1j,
        "conjugated": (torch.randn(3, generator=g) + 1j).conj(),
        "step": torch.tensor(2**60 + seed),
        "empty": torch.empty(0, 3),
        "transposed": torch.randn(5, 7, generator=g).t(),
        "strided": torch.randn(20, generator=g)[::3],
        "expanded": torch.randn(4, 1, generator=g).expand(4, 6),
        "part of more": torch.randn(1000, generator=g)[10:14],
        "channels last": torch.randn(2, 3, 4, 5, generator=g).to(memory_format=torch.channels_last),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    }


def bits(tensors) -> dict[str, list]:
    """Each tensor to the last bit: dtype, shape, hash."""
    plain = {name: t.detach().resolve_conj().contiguous() for name, t in tensors.items()}
    raw = {name: t.reshape(-1).view(torch.uint8).numpy() for name, t in plain.items()}
    return {name: [str(t.dtype), list(t.shape), hashlib.sha256(raw[name]).hexdigest()] for name, t in plain.items()}


class Run:
    """One rank's view of a run's checkpoints, and what was said."""

    def __init__(self, root: Path, world: World = ONE, attempt: int | None = None, **settings):
        self.paths = RunPaths(Path(root))
        self.said: list[dict] = []
        self.committed: list[int] = []
        self.checkpoints = Checkpoints(self.paths, world, config.Checkpoint(**{"keep_last": 9, **settings}),
                                       strategy="ddp", attempt=attempt, say=self.said.append, committed=self.committed.append)

    def save(self, step: int, metrics=None, tensors=None) -> str | None:
        self.checkpoints.save(step, make(step) if tensors is None else tensors, {"step": step}, metrics or {})
        return self.checkpoints.wait()

    def load(self, step: int) -> dict[str, list]:
        tensors, state = self.checkpoints.load(step)
        assert state == {"step": step}
        return bits(tensors)

    def notes(self) -> list[str]:
        return [event["message"] for event in self.said if event["event"] == "note"]

    def names(self) -> list[str]:
        return sorted(os.listdir(self.paths.checkpoints))


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path)
    yield run
    run.checkpoints.close()


@pytest.fixture
def blocked(monkeypatch):
    """Writing waits for this event."""
    from trainers.engine import storage

    go, write = threading.Event(), storage.write
    monkeypatch.setattr(storage, "write", lambda *args: go.wait(60) and write(*args))
    yield go
    go.set()


# ---- one rank


@pytest.mark.parametrize("layout", ["full", "sharded"])
def test_what_was_saved_is_loaded_to_the_bit(tmp_path, layout):
    run = Run(tmp_path, layout=layout)
    assert run.save(3) is None and run.checkpoints.newest() == 3
    assert run.load(3) == bits(make(3))
    assert all(tensor.is_contiguous() for tensor in run.checkpoints.load(3)[0].values())


def test_a_commit_is_said_and_told(run):
    run.save(3, {"top1": 0.5, "loss": float("nan")})
    [event] = run.said
    assert run.committed == [3]
    assert (event["event"], event["step"], event["path"]) == ("checkpoint", 3, str(run.paths.checkpoint(3)))
    files = [path for path in run.paths.checkpoint(3).iterdir() if path.name != manifest.NAME]
    assert event["bytes"] == sum(path.stat().st_size for path in files)
    assert 0 < event["stall_s"] and 0 < event["seconds"]
    content = manifest.read(run.paths.checkpoint(3), 3)
    assert content["metrics"] == {"top1": 0.5, "loss": None} and content["world_size"] == 1
    assert sorted(content["files"]) == sorted(path.name for path in files)


def test_later_changes_do_not_enter(run, blocked):
    tensors = {"a": torch.randn(50), "b": torch.nn.Parameter(torch.randn(3, 4))}
    state, metrics, before = {"step": 1}, {"top1": 0.5}, bits(tensors)
    run.checkpoints.save(1, tensors, state, metrics)
    for tensor in tensors.values():
        tensor.detach().zero_()
    state["step"], metrics["top1"] = 99, 0.9
    assert run.committed == []
    blocked.set()
    assert run.checkpoints.wait() is None
    assert run.load(1) == before
    assert manifest.read(run.paths.checkpoint(1), 1)["metrics"] == {"top1": 0.5}


def test_host_buffers_are_kept(run, monkeypatch):
    from trainers.engine import storage

    seen, write = [], storage.write

    def note(folder, tensors, group):
        seen.append({name: tensor.data_ptr() for name, tensor in tensors.items()})
        return write(folder, tensors, group)

    monkeypatch.setattr(storage, "write", note)
    run.save(1), run.save(2)
    assert seen[0] == seen[1] and len(seen[0]) == len(make(1))
    smaller = {name: tensor for name, tensor in make(3).items() if name != "bf16"} | {"step": torch.tensor([3, 3])}
    assert run.save(3, tensors=smaller) is None
    assert run.load(3) == bits(smaller)


def test_the_next_save_waits_for_the_last(run, blocked):
    run.checkpoints.save(1, make(1), {"step": 1}, {})
    threading.Timer(0.3, blocked.set).start()
    run.checkpoints.save(2, make(2), {"step": 2}, {})
    assert run.committed == [1]
    run.checkpoints.close()
    assert run.committed == [1, 2] and run.said[1]["stall_s"] >= 0.2


def test_a_committed_step_is_not_saved_again(run):
    run.save(1)
    assert run.save(1) is None and run.committed == [1]


def test_no_checkpoint_is_no_error(run):
    assert run.checkpoints.newest() is None and run.checkpoints.wait() is None
    (run.paths.checkpoints / "step_4.tmp").mkdir(parents=True)
    assert run.checkpoints.newest() is None and run.said == []


def damages(path: Path):
    """(what, damaged content) in turn; None is a missing file."""
    whole = path.read_bytes()
    for place in sorted({0, len(whole) // 2, len(whole) - 1}):
        yield f"byte {place}", whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:]
    yield "cut", whole[:-1]
    yield "emptied", b""
    yield "missing", None


def damage(path: Path, content: bytes | None) -> None:
    path.unlink() if content is None else path.write_bytes(content)


def test_any_damage_to_any_file_is_passed_over(tmp_path, two):
    two.run("save", root=tmp_path / "whole", steps=[1, 2])
    names = sorted(os.listdir(tmp_path / "whole/checkpoints/step_2"))
    assert names == [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "state.json"]
    for name in names:
        for what, content in damages(tmp_path / "whole/checkpoints/step_2" / name):
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            shutil.copytree(tmp_path / "whole", tmp_path / "run")
            damage(tmp_path / "run/checkpoints/step_2" / name, content)
            run = Run(tmp_path / "run")
            assert run.checkpoints.newest() == 1, (name, what)
            assert run.names() == ["step_1", "step_2.broken"]
            [note] = run.said
            assert note["level"] == "warning" and "step 2" in note["message"] and name in note["message"]
            run.checkpoints.close()
    assert Run(tmp_path / "whole").checkpoints.newest() == 2


def test_none_whole_is_an_error_and_nothing_is_moved(run):
    run.save(1), run.save(2)
    for step in (1, 2):
        damage(run.paths.checkpoint(step) / "state.json", None)
    run.said.clear()
    with pytest.raises(UserError, match=r"step_2: state.json is missing; step_1: state.json is missing") as error:
        run.checkpoints.newest()
    assert error.value.hint and run.names() == ["step_1", "step_2"] and run.said == []


def test_a_checkpoint_without_a_state_is_broken(run):
    run.save(1), run.save(2)
    folder = run.paths.checkpoint(2)
    entries = manifest.read(folder, 2)["files"]
    del entries["state.json"]
    manifest.write(folder, step=2, entries=entries)
    assert run.checkpoints.newest() == 1 and "state.json is missing" in run.notes()[0]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", [
    lambda path: pickle.dumps(Evil(path)),
    lambda path: b"cbuiltins\neval\n(S'__import__(\"os\").mkdir(%r)'\ntR." % str(path),
    lambda path: b"ctorch.serialization\nload\n(S'x'\ntR.",
    lambda path: pickle.dumps([1, 2]),
    lambda path: b"",
])
def test_a_planted_pickle_is_refused(run, tmp_path, content):
    run.save(1)
    folder = run.paths.checkpoint(1)
    (folder / ".metadata").write_bytes(content(tmp_path / "owned"))
    entries = manifest.read(folder, 1)["files"]
    manifest.write(folder, step=1, entries=entries | {".metadata": manifest.entry(folder / ".metadata")})
    assert run.checkpoints.newest() == 1  # its manifest is right
    with pytest.raises(UserError, match="step_1 cannot be loaded"):
        run.checkpoints.load(1)
    assert not (tmp_path / "owned").exists()


def test_a_planted_pickle_among_the_tensors_is_refused(run, tmp_path):
    run.save(1)
    torch.save(Evil(tmp_path / "owned"), run.paths.checkpoint(1) / "__0_0.distcp")
    with pytest.raises(UserError, match="cannot be loaded"):
        run.checkpoints.load(1)
    assert not (tmp_path / "owned").exists()


def test_metadata_may_not_point_out_of_the_folder(run):
    run.save(1)
    path = run.paths.checkpoint(1) / ".metadata"
    found = pickle.loads(path.read_bytes())
    for info in found.storage_data.values():
        info.relative_path = "../step_1/__0_0.distcp"
    path.write_bytes(pickle.dumps(found))
    with pytest.raises(UserError, match="out of the checkpoint"):
        run.checkpoints.load(1)


def test_no_path_of_the_machine_lies_in_a_checkpoint(run, tmp_path):
    run.save(1)
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in run.paths.checkpoint(1).iterdir())


def test_after_a_failure_the_same_step_can_be_saved(run, monkeypatch):
    run.save(1)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", full_disk)
        assert "No space left" in run.save(2)
    assert run.names() == ["step_1"] and "newest whole one is step 1" in run.notes()[0]
    assert run.save(2) is None and run.committed == [1, 2] and run.load(2) == bits(make(2))


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_first_save_says_that_there_is_none(run, monkeypatch):
    monkeypatch.setattr(manifest, "write", full_disk)
    assert run.save(1) is not None
    assert run.notes()[0].endswith("there is no older one") and run.names() == []


@pytest.mark.parametrize("when", ["before", "while writing"])
def test_a_superseded_attempt_commits_nothing(tmp_path, monkeypatch, when):
    from trainers.engine import storage

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


def test_old_checkpoints_and_leftovers_go_after_a_commit(tmp_path):
    run = Run(tmp_path, keep_last=2, keep_best=1, keep_every=4, metric="top1")
    for name in ("step_1.tmp", "step_77.tmp", "step_5.broken", "step_6.old", "mine", "step_x.tmp"):
        (run.paths.checkpoints / name).mkdir(parents=True)
        (run.paths.checkpoints / name / "file").write_text("x")
    for step in range(1, 9):
        assert run.save(step, {"top1": 0.9 if step == 3 else 0.1}) is None
        assert run.committed[-1] == step
    assert run.names() == ["mine", "step_3", "step_4", "step_7", "step_8", "step_x.tmp"]


def test_one_that_cannot_be_read_is_neither_counted_nor_deleted(tmp_path):
    run = Run(tmp_path, keep_last=1)
    run.save(1)
    damage(run.paths.checkpoint(1) / manifest.NAME, b"{")
    run.save(2), run.save(3)
    assert run.names() == ["step_1", "step_3"]


def test_a_failure_after_the_commit_is_said_and_the_commit_stands(run, monkeypatch):
    monkeypatch.setattr(run.checkpoints, "committed", full_disk)
    assert run.save(1) is None and run.checkpoints.newest() == 1
    assert run.notes() == ["after the checkpoint of step 1 was committed: [Errno 28] No space left on device"]


def test_a_remnant_of_the_same_step_is_replaced(tmp_path):
    Run(tmp_path).save(5, tensors={"x": torch.zeros(3)})
    run = Run(tmp_path)
    assert run.save(5) is None and run.names() == ["step_5"] and run.load(5) == bits(make(5))


def test_a_remnant_is_put_back_if_its_successor_never_came(tmp_path, monkeypatch):
    Run(tmp_path).save(5)
    run, rename = Run(tmp_path), os.rename

    def fail(source, target):
        return full_disk() if Path(source).name == "step_5.tmp" else rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        assert "No space" in run.save(5, tensors={"x": torch.zeros(3)})
    assert run.names() == ["step_5"]
    os.rename(run.paths.checkpoint(5), run.paths.checkpoints / "step_5.old")  # killed between the two renames
    assert Run(tmp_path).checkpoints.newest() == 5 and run.names() == ["step_5"]


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
def test_bytes_are_spread_evenly(ranks):
    sizes = {f"layer {i}": size for i, size in enumerate([64, 64, 128, 128, 4000, 9, 9, 300, 301, 2000, 2000])}
    owner = owners(sizes, ranks)
    load = [sum(size for name, size in sizes.items() if owner[name] == rank) for rank in range(ranks)]
    assert sum(load) == sum(sizes.values()) and max(load) <= max(4000, sum(load) / ranks * 1.1)
    assert owners(dict(reversed(sizes.items())), ranks) == owner  # whatever the order of the dict


# ---- several ranks


class Ranks:
    """Real ranks over gloo, kept for several tests."""

    def __init__(self, size: int, folder: Path):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.processes = [
            subprocess.Popen([sys.executable, __file__, str(rank), str(size), str(folder / "store")], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            for rank in range(size)
        ]

    def run(self, function: str, **arguments) -> list:
        """The function's results by rank."""
        for process in self.processes:
            process.stdin.write(json.dumps([function, arguments], default=str) + "\n")
            process.stdin.flush()
        answers = [json.loads(process.stdout.readline() or '["died", null]') for process in self.processes]
        assert all(error is None for error, _ in answers), "\n".join(str(error) for error, _ in answers)
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("two"))
    # Importing dcp takes a second or more; a rank that saves and resumes nothing need not wait for it.
    assert ranks.run("imported", name=DCP) == [False, False]
    yield ranks
    ranks.close()


@pytest.mark.parametrize("layout", ["full", "sharded"])
def test_from_two_ranks_to_one_and_back(two, tmp_path, layout):
    assert two.run("save", root=tmp_path, steps=[1], layout=layout) == [[None], [None]]
    parts = sorted(path.name for path in (tmp_path / "checkpoints/step_1").glob("*.distcp"))
    assert parts == (["__0_0.distcp"] if layout == "full" else ["__0_0.distcp", "__1_0.distcp"])
    run = Run(tmp_path, layout=layout)
    assert run.checkpoints.newest() == 1 and run.load(1) == bits(make(1))
    assert run.save(2) is None
    for step, loaded in two.run("load_newest", root=tmp_path, layout=layout):
        assert step == 2 and loaded == bits(make(2))


def test_two_ranks_write_half_each(two, tmp_path):
    two.run("save_megabytes", root=tmp_path, count=10)
    parts = [path.stat().st_size for path in (tmp_path / "checkpoints/step_1").glob("*.distcp")]
    assert len(parts) == 2 and all(abs(size - 5 * 2**20) < 2**17 for size in parts)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp", "state.json", "manifest.json"])
def test_all_ranks_pass_over_what_one_finds_broken(two, tmp_path, name):
    two.run("save", root=tmp_path, steps=[1, 2])
    damage(tmp_path / "checkpoints/step_2" / name, b"x" * (tmp_path / "checkpoints/step_2" / name).stat().st_size)
    assert [step for step, _ in two.run("load_newest", root=tmp_path)] == [1, 1]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_1", "step_2.broken"]


def test_all_ranks_get_the_error_if_none_is_whole(two, tmp_path):
    two.run("save", root=tmp_path, steps=[1])
    damage(tmp_path / "checkpoints/step_1/__1_0.distcp", None)
    messages = two.run("newest_error", root=tmp_path)
    assert messages[0] == messages[1] and "__1_0.distcp is missing" in messages[0]


@pytest.mark.parametrize("how", ["file limit", "flush", "hash", "plan"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_that_cannot_write_fails_the_save_for_all(two, tmp_path, how, rank):
    results = two.run("fail_on", root=tmp_path, rank=rank, how=how)
    reasons = [reason for reason, *_ in results]
    expected = {"file limit": "File too large", "plan": "odd"}.get(how, "No space left on device")
    assert reasons[0] == reasons[1] and expected in reasons[0]
    for _, names, newest, again, loaded in results:
        assert names == ["step_1"] and newest == 1 and again is None and loaded == bits(make(2))
    assert Run(tmp_path).checkpoints.newest() == 2


def test_training_may_communicate_while_a_thread_writes(two, tmp_path):
    total, reasons = 2 * sum(range(300)), [None, None, None]
    assert two.run("save_and_reduce", root=tmp_path, count=300) == [[total, reasons], [total, reasons]]


def test_a_superseded_attempt_is_stopped_on_all_ranks(two, tmp_path):
    RunPaths(tmp_path).attempt(4).mkdir(parents=True)
    assert two.run("save_superseded", root=tmp_path, attempt=3) == [[True, True], [True, True]]


@pytest.mark.slow
def test_four_ranks(tmp_path):
    ranks = Ranks(4, tmp_path)
    for layout in ("sharded", "full"):
        root = tmp_path / layout
        assert ranks.run("save", root=root, steps=[1], layout=layout) == [[None]] * 4
        for step, loaded in ranks.run("load_newest", root=root):
            assert step == 1 and loaded == bits(make(1))
        assert Run(root).load(1) == bits(make(1))
    Run(tmp_path / "one").save(1)
    assert [loaded for _, loaded in ranks.run("load_newest", root=tmp_path / "one")] == [bits(make(1))] * 4
    ranks.run("save_megabytes", root=tmp_path / "even", count=12)
    parts = [path.stat().st_size for path in (tmp_path / "even/checkpoints/step_1").glob("*.distcp")]
    assert len(parts) == 4 and all(abs(size - 3 * 2**20) < 2**17 for size in parts)
    ranks.close()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_while_writing_leaves_the_older_one(tmp_path, victim):
    ranks = Ranks(2, tmp_path)
    ranks.run("save", root=tmp_path / "run", steps=[1])
    with pytest.raises((AssertionError, BrokenPipeError), match="died"):
        ranks.run("die", root=tmp_path / "run", rank=victim)
    ranks.close()
    run = Run(tmp_path / "run")
    assert run.checkpoints.newest() == 1 and run.load(1) == bits(make(1))
    assert run.save(2) is None and run.names() == ["step_1", "step_2"]


@pytest.mark.slow
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    ranks = Ranks(1, tmp_path)
    [newest] = ranks.run("kill_everywhere", folder=tmp_path)
    ranks.close()
    # Killed before the commit, the older one is the newest; after it, the new one; and there is no third.
    turn = newest.index(2)
    assert turn > 10 and len(newest) - turn > 3
    assert newest == [1] * turn + [2] * (len(newest) - turn)


# ---- on the ranks


def imported(world, name):
    return name in sys.modules


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
    from torch.distributed.checkpoint import DefaultSavePlanner

    from trainers.engine import storage

    class Odd(Exception):
        def __reduce__(self):
            raise TypeError("an error that pickle refuses")

    def odd(*args):
        raise Odd("odd")

    run = Run(root, world)
    assert run.save(1) is None
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == rank:
            if how == "file limit":  # the system refuses to write on, as it does on a full disk
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
            elif how == "flush":
                patch.setattr(storage.os, "fsync", full_disk)
            elif how == "hash":
                patch.setattr(manifest, "entry", full_disk)
            else:
                patch.setattr(DefaultSavePlanner, "resolve_data", odd)
        reason = run.save(2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()
    names, newest = run.names(), run.checkpoints.newest()
    again = run.save(2)
    return reason, names, newest, again, run.load(2)


def save_and_reduce(world, root, count):
    run, total, reasons = Run(root, world), 0, []
    for step in (1, 2, 3):
        run.checkpoints.save(step, make(step), {"step": step}, {})
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
    from trainers.engine import storage

    if world.rank == rank:
        storage._Writer.write_data = lambda *args: os._exit(9)
    return Run(root, world).save(2)


def kill_everywhere(world, folder):
    """Kill a save at its first, second, ... event on a file; which checkpoint is the newest each time.

    Each save is in a process of its own, forked here, where no thread runs; keep_last=1 makes the killed
    save delete the older checkpoint at its end.
    """
    from trainers.engine import storage  # noqa: F401  once, before forking

    def forked(work) -> int:
        child = os.fork()
        if child == 0:
            status = 99
            try:
                status = work()
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def save_until(event: int | None, root: Path) -> int:
        seen = 0

        def hook(name, args):
            nonlocal seen
            if (name.startswith(("os.", "shutil.")) or name == "open") and str(root) in str(args):
                seen += 1
                if seen == event:
                    os._exit(9)

        run = Run(root, world, keep_last=1)
        if event is None:
            assert run.save(1) is None
            return 0
        sys.addaudithook(hook)
        assert run.save(2) is None
        return 0

    def find(root: Path) -> int:
        run = Run(root, world, keep_last=1)
        step = run.checkpoints.newest()
        assert run.load(step) == bits(make(step)) and run.notes() == []
        assert run.save(3) is None and run.names() == ["step_3"]  # and all leftovers are gone
        return step

    newest = []
    for event in range(1, 1000):
        root = Path(folder) / f"killed {event}"
        assert forked(lambda: save_until(None, root)) == 0
        status = forked(lambda: save_until(event, root))
        newest.append(forked(lambda: find(root)))
        if status == 0:
            return newest
        assert status == 9
    raise AssertionError("the save never came to its end")


def serve(rank: int, size: int, store: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything prints goes elsewhere
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    world = World(rank, size, rank, size, torch.device("cpu"))
    for line in sys.stdin:
        function, arguments = json.loads(line)
        try:
            answer = None, globals()[function](world, **arguments)
        except BaseException:
            answer = traceback.format_exc(), None
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
