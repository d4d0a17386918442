from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainers.config.micro_batch import note, out_of_memory, settled
from trainers.config.retries import changes_settings
from trainers.config.schema import RunConfig
from trainers.contract.errors import OutOfMemory
from trainers.contract.paths import RunPaths


def config(micro, batch: int = 24) -> RunConfig:
    return RunConfig(name="run", task="module:Task", train={"steps": 1, "batch_size": batch, "micro_batch_size": micro})


def runs_out(asked: RunConfig, paths: RunPaths, attempt: int, ranks: int = 2) -> OutOfMemory:
    return out_of_memory(asked, settled(asked, paths, ranks), paths, attempt, rank=1, ranks=ranks, work="step")


def split(asked: RunConfig, paths: RunPaths, ranks: int) -> tuple[int, int]:
    batching = settled(asked, paths, ranks).batching(ranks)
    return batching.micro, batching.accumulation


def test_after_each_attempt_without_memory_the_next_smaller_size_is_used(tmp_path: Path):
    paths, asked, splits = RunPaths(tmp_path), config("auto"), []
    for attempt in range(1, 7):
        splits.append(split(asked, paths, 2))
        error = runs_out(asked, paths, attempt)
        assert changes_settings(paths, attempt) == error.retry == (attempt < 6)
    assert splits == [(12, 1), (6, 2), (4, 3), (3, 4), (2, 6), (1, 12)]
    assert error.message == "rank 1 ran out of memory with a micro-batch of 1, the smallest possible"
    assert note(settled(asked, paths, 2), paths, 2) == (
        "train.micro_batch_size=auto: 1 micro-batch x 12 accumulation (12, 6, 4, 3, 2 did not fit)")


def test_recorded_sizes_also_count_for_other_numbers_of_ranks(tmp_path: Path):
    paths, asked = RunPaths(tmp_path), config("auto")
    for attempt in (1, 2):
        runs_out(asked, paths, attempt)
    assert split(asked, paths, 2) == (4, 3)
    assert split(asked, paths, 1) == (4, 6)
    assert split(asked, paths, 8) == (3, 1)


def test_a_budget_of_tokens_is_halved(tmp_path: Path):
    paths, sizes = RunPaths(tmp_path), []
    asked = RunConfig(name="run", task="module:Task", train={"steps": 1, "batch_tokens": 4096, "micro_batch_size": "auto"})
    for attempt in range(1, 4):
        sizes.append(split(asked, paths, 4))
        error = runs_out(asked, paths, attempt, ranks=4)
    assert sizes == [(1024, 1), (512, 2), (256, 4)] and error.retry
    assert error.message == "rank 1 ran out of memory with a micro-batch of 256 tokens"
    assert split(asked, paths, 64) == (64, 1)


def test_a_sample_that_does_not_fit_alone_is_not_retried(tmp_path: Path):
    paths = RunPaths(tmp_path)
    asked = RunConfig(name="run", task="module:Task", train={"steps": 1, "batch_tokens": 4096, "micro_batch_size": "auto"})
    error = out_of_memory(asked, settled(asked, paths, 1), paths, 1, rank=0, ranks=1, work="sample")
    assert error.message == "rank 0 ran out of memory with a micro-batch of 1 sample, the smallest possible"
    assert not error.retry and not paths.micro_batch.exists()


def test_two_ranks_of_one_attempt_make_one_entry(tmp_path: Path):
    paths, asked = RunPaths(tmp_path), config("auto")
    used = settled(asked, paths, 2)
    for rank in (0, 1):
        out_of_memory(asked, used, paths, 1, rank, 2, work="step")
    assert json.loads(paths.micro_batch.read_text()) == [{"attempt": 1, "size": 12, "next": 6}]


def test_a_given_size_is_not_changed(tmp_path: Path):
    paths = RunPaths(tmp_path)
    for asked in (config(4), config(None)):
        assert settled(asked, paths, 2) is asked
        error = runs_out(asked, paths, 1)
        assert not error.retry and "train.micro_batch_size=" in error.hint
    assert not paths.micro_batch.exists() and not changes_settings(paths, 1)


def test_the_smallest_is_not_tried_again(tmp_path: Path):
    assert not runs_out(config(1), RunPaths(tmp_path), 1).retry


@pytest.mark.parametrize("given, only, work, message, hint, retry", [
    ({}, False, "evaluation", "in an evaluation, 48 samples at a time", "the next attempt uses a micro-batch of 6", True),
    ({"batch_size": 10}, False, "evaluation", "in an evaluation, 10 samples at a time", "resume run` with eval.batch_size=5",
     False),
    ({}, True, "evaluation", "in an evaluation", "start again with eval.batch_size=24", False),
    ({}, False, "checkpoint", "while it copied a checkpoint into the host's memory", "sbatch.mem", False),
    ({}, False, None, "outside of steps, evaluations and checkpoints", "launch plan", False),
])
def test_only_a_micro_batch_that_is_too_large_is_made_smaller(tmp_path: Path, given, only, work, message, hint, retry):
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    more = {"eval": {**given, "only": only}, **({"init": {"source": "weights"}} if only else {})}
    asked = RunConfig.model_validate({**config("auto").model_dump(exclude_unset=True), **more})
    error = out_of_memory(asked, settled(asked, paths, 2), paths, 1, rank=1, ranks=2, work=work)
    assert message in error.message and hint in error.hint and error.retry == retry
    assert paths.micro_batch.exists() == changes_settings(paths, 1) == retry
