"""Tensors in files: any part can be read, however ranks wrote the tensors. This file is also the program of its ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from random import Random

import pytest
import torch
from ranks import serve
from saving import Run, bits, make, whole

from trainers.checkpoints import tensor_files
from trainers.contract.errors import UserError
from trainers.engine.parallel.fragments import Fragment, check_no_unknown, fill
from trainers.engine.saving import storage
from trainers.engine.saving.checkpoint import owners

pytestmark = pytest.mark.timeout(180)


def cut(count: int, ranks: int, how: str) -> list[tuple[int, int]]:
    """Return (start, elements) of each rank's part of a tensor of `count` elements."""
    if how == "evenly":  # as fully_shard cuts rows: the last ranks may have fewer elements, or none
        per_rank = -(-count // ranks)
        places = [min(rank * per_rank, count) for rank in range(ranks + 1)]
    else:
        random = Random(f"{how} {count} {ranks}")
        places = [0, *sorted(random.randrange(count + 1) for _ in range(ranks - 1)), count]
    return [(first, last - first) for first, last in zip(places, places[1:])]


def split(tensors, rank: int, ranks: int, how: str) -> dict[str, Fragment]:
    """Return a rank's parts: rows, or ranges of the flattened elements. Every rank holds single numbers whole."""
    parts = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 0:
            parts[name] = Fragment.whole(tensor)
        elif how == "rows":
            row = tensor.shape[1:].numel()
            first, rows = cut(len(tensor), ranks, "evenly")[rank]
            parts[name] = Fragment(tensor[first:first + rows], first * row, tuple(tensor.shape))
        else:
            first, count = cut(tensor.numel(), ranks, how)[rank]
            parts[name] = Fragment(tensor.reshape(-1)[first:first + count], first, tuple(tensor.shape))
    return parts


def empty_like(fragments: dict[str, Fragment]) -> dict[str, Fragment]:
    return {name: Fragment(torch.zeros_like(f.part).contiguous(), f.start, f.shape, f.replicated)
            for name, f in fragments.items()}


SPLITS = ["rows", "evenly", "somehow", "anyhow"]


@pytest.mark.parametrize("how", SPLITS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_any_part_can_be_read_however_ranks_wrote_the_tensors(tmp_path, ranks, how):
    tensors = make(1)
    places = {}
    for rank in range(ranks):
        parts = {name: f for name, f in split(tensors, rank, ranks, how).items()
                 if (f.part.numel() or 0 in f.shape) and (rank == 0 or not f.replicated)}
        plain = {name: f.part.detach().resolve_conj().contiguous() for name, f in parts.items()}
        storage.write(tmp_path / f"{rank}.safetensors", plain)
        places[f"{rank}.safetensors"] = {name: (f.start, f.shape) for name, f in parts.items()}
    storage.write_index(tmp_path, places)
    reader = storage.Reader(tmp_path)
    assert bits({name: reader.tensor(name) for name in reader.shapes}) == bits(tensors)
    random = Random(ranks)
    for name, tensor in tensors.items():
        flat = tensor.detach().resolve_conj().reshape(-1)
        for _ in range(30):
            start = random.randrange(len(flat) + 1)
            count = random.randrange(len(flat) - start + 1)
            read = reader.read(name, start, count)
            assert bits({"": read}) == bits({"": flat[start:start + count]})
        with pytest.raises(UserError, match=f"element {len(flat)} of .* is in no file"):
            reader.read(name, 0, len(flat) + 1)
    for other in (1, 2, 5):
        for rank in range(other):
            wanted = split(tensors, rank, other, SPLITS[other % 4])
            got = empty_like(wanted)
            fill(got, reader.shapes, reader.read)
            assert bits({n: f.part for n, f in got.items()}) == bits({n: f.part for n, f in wanted.items()})


def test_a_part_that_no_rank_wrote_is_an_error(tmp_path):
    storage.write(tmp_path / "0.safetensors", {"a": torch.arange(10)})
    for parts in ({"0.safetensors": (4, (20,))}, {"0.safetensors": (0, (20,))}):
        storage.write_index(tmp_path, {file: {"a": part} for file, part in parts.items()})
        with pytest.raises(UserError, match=r"element (0|10) of `a` is in no file"):
            storage.Reader(tmp_path).tensor("a")


def test_a_tensor_of_another_name_or_shape_is_an_error(tmp_path):
    run = Run(tmp_path)
    run.save(1)
    reader, _ = run.checkpoints.load(1)
    for tensors, problem in [({"more": torch.zeros(1)}, "has no `more`"),
                             ({"mask": torch.zeros(3, 3)}, r"`mask` has shape \[9\] in the checkpoint and \[3, 3\]")]:
        with pytest.raises(UserError, match=problem):
            fill(whole(tensors), reader.shapes, reader.read)
    check_no_unknown({"models/model/a": (1,), "optim/model/b/step": ()}, {"models/model/a"})
    with pytest.raises(UserError, match="has `models/model/b`, but the model does not"):
        check_no_unknown({"models/model/a": (1,), "models/model/b": (1,)}, {"models/model/a"})


def test_other_readers_of_safetensors_open_the_files(tmp_path):
    from safetensors.torch import load_file

    run = Run(tmp_path)
    tensors = {f"{i} ü\"\\/\n\u2028 {'x' * i}": tensor for i, tensor in enumerate(make(1).values())}
    run.save(1, tensors=tensors)
    found = load_file(run.paths.checkpoint(1) / "0.safetensors")
    assert bits(found) == bits({name: tensor.reshape(-1) for name, tensor in tensors.items()})
    assert run.load(1) == bits(tensors)


def test_a_dtype_that_files_cannot_hold_fails_the_save(tmp_path):
    run = Run(tmp_path)
    assert "`x` is torch.complex128" in run.save(1, tensors={"x": torch.zeros(2, dtype=torch.complex128)})
    assert run.names() == []


def test_a_checkpoint_may_have_very_many_tensors(tmp_path):
    run = Run(tmp_path)
    tensors = {f"models/model/layer.{i}.weight": torch.full((i % 3,), i) for i in range(20_000)}
    assert run.save(1, tensors=tensors) is None
    reader, _ = run.checkpoints.load(1)
    assert all(torch.equal(reader.tensor(name), tensor) for name, tensor in tensors.items())


def test_files_of_many_ranks_are_not_all_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "OPEN_FILES", 3)
    places = {}
    for rank in range(30):
        storage.write(tmp_path / f"{rank}.safetensors", {"a": torch.arange(rank * 5, rank * 5 + 5)})
        places[f"{rank}.safetensors"] = {"a": (rank * 5, (150,))}
    storage.write_index(tmp_path, places)
    before = len(os.listdir("/proc/self/fd"))
    reader = storage.Reader(tmp_path)
    assert torch.equal(reader.tensor("a"), torch.arange(150)) and torch.equal(reader.read("a", 33, 100), torch.arange(33, 133))
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_reading_and_writing_need_no_copy_in_memory(tmp_path):
    code = """
import re, sys, torch
from pathlib import Path
from trainers.engine.saving import storage
folder, size = Path(sys.argv[1]), 2**26
def peak(): return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
large = torch.arange(size, dtype=torch.float32)  # 256 MiB
small = torch.zeros(1000)
storage.write(folder / "1.safetensors", {"b": small})
before = peak()
storage.write(folder / "0.safetensors", {"a": large})
storage.write_index(folder, {"0.safetensors": {"a": (0, (size,))}, "1.safetensors": {"b": (0, (1000,))}})
assert peak() - before < 2**25, peak() - before
assert before > 2**28
del large
part = storage.Reader(folder).read("a", size // 3, size // 4)
for piece in storage.Reader(folder)._parts.pieces("a"): pass
assert part[0] == size // 3 and len(part) == size // 4 and peak() - before < 2**25, peak() - before
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
def test_bytes_are_spread_evenly(ranks):
    sizes = {f"layer {i}": size for i, size in enumerate([64, 64, 128, 128, 4000, 9, 9, 300, 301, 2000, 2000])}
    owner = owners(sizes, ranks)
    load = [sum(size for name, size in sizes.items() if owner[name] == rank) for rank in range(ranks)]
    assert sum(load) == sum(sizes.values()) and max(load) <= max(4000, sum(load) / ranks * 1.1)
    assert owners(dict(reversed(sizes.items())), ranks) == owner  # the order of the dict does not matter


# ---- several ranks


@pytest.fixture(scope="module")
def two(ranks):
    return ranks(2)


@pytest.mark.parametrize("how", SPLITS)
def test_one_rank_reads_the_parts_of_two_and_the_reverse(two, tmp_path, how):
    assert two("save_parts", root=tmp_path, step=1, how=how) == [None, None]
    run = Run(tmp_path)
    assert run.checkpoints.newest() == 1 and run.load(1) == bits(make(1))
    assert run.save(2) is None
    two("load_parts", root=tmp_path, step=2, how=how)


# ---- on the ranks


def save_parts(world, root, step, how):
    run = Run(root, world)
    run.checkpoints.save(step, split(make(step), world.rank, world.size, how), {"step": step})
    return run.checkpoints.wait()


def load_parts(world, root, step, how):
    run = Run(root, world)
    assert run.checkpoints.newest() == step
    reader, _ = run.checkpoints.load(step)
    wanted = split(make(step), world.rank, world.size, how)
    got = empty_like(wanted)
    fill(got, reader.shapes, reader.read)
    assert bits({name: f.part for name, f in got.items()}) == bits({name: f.part for name, f in wanted.items()})


if __name__ == "__main__":
    serve(globals())
