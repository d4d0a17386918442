"""A language model trained with `train.batch_tokens` is the same run on any number of ranks, with any micro-batches, and after
any interruption. This file is also the program of its ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from ranks import serve

SENTENCES = Path(__file__).parents[3] / "sentences"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_ranks_and_micro_batches_change_no_loss_and_an_epoch_holds_each_sample_once(ranks, tmp_path):
    """A budget of 100 tokens on 4 ranks leaves ranks without a sentence of their own: the batches of the longest sentences have
    one or two."""
    runs, drawn = {}, {}
    for size, most in ((1, None), (2, None), (3, None), (4, None), (1, 30), (3, 17)):
        for budget in (100, 300):
            steps = 60 if budget == 100 else 50
            answers = ranks(size)("trained", root=tmp_path / f"{size}-{most}-{budget}", train={
                "batch_tokens": budget, "micro_batch_size": most, **({"epochs": 3} if budget == 300 else {"steps": steps})})
            runs[size, most, budget] = answers[0]["rows"]
            if budget == 300:
                assert len(answers[0]["rows"]) >= steps
                drawn[size, most] = sorted(tuple(row) for answer in answers for row in answer["drawn"])
            else:
                assert (sum(answer["fillers"] for answer in answers) > 0) == (size > 1)
    expected = [(epoch, row) for epoch in range(3) for row in range(500)]
    assert all(rows == expected for rows in drawn.values())
    for (size, most, budget), rows in runs.items():
        whole = runs[1, None, budget]
        assert [row["step"] for row in rows] == list(range(1, len(whole) + 1))
        furthest = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(rows, whole, strict=True))
        print(f"{size} rank(s), micro-batches of {most}, batches of {budget} tokens: losses within {furthest:.1e}")
        assert furthest < 1e-5, (size, most, budget)
        assert max(abs(a.get("eval loss", 1) / b.get("eval loss", 1) - 1) for a, b in zip(rows, whole)) < 1e-5


def test_a_run_that_was_stopped_continues_bit_for_bit(ranks, tmp_path):
    """With an average of the weights, parameter groups, dropout and micro-batches; stopped inside of the second epoch. Then it
    continues under another strategy, on more ranks. tests/test_same_run.py kills such a run under every strategy."""
    train = {"batch_tokens": 300, "epochs": 3, "micro_batch_size": 90, "ema": 0.9}
    more = {"model": {"dropout": 0.1}, "groups": [{"match": "*norm*", "weight_decay": 0.0, "lr_scale": 2.0}]}
    whole = ranks(2)("trained", root=tmp_path / "whole", train=train, **more)[0]["rows"]
    for stop in (9, 31):
        ranks(2)("trained", root=tmp_path / "cut", train=train, until=stop, **more)
    cut = ranks(2)("trained", root=tmp_path / "cut", train=train, **more)[0]["rows"]
    assert cut == whole and len(whole) > 50
    other = {**train, "strategy": "fsdp"}
    ranks(2)("trained", root=tmp_path / "moved", train=train, until=31, **more)
    moved = ranks(3)("trained", root=tmp_path / "moved", train=other, **more)[0]["rows"]
    assert moved[:31] == whole[:31] and len(moved) == len(whole)


def test_what_a_user_sees_when_it_cannot_work(ranks, tmp_path):
    def error(root, **keys):
        return ranks(1)("error_of", root=tmp_path / root, **keys)[0]

    message, hint = error("lengths", task="WithoutLengths", train={"steps": 1, "batch_tokens": 500})
    assert message == "`train.batch_tokens` needs the lengths of the samples, but the training set, a Text, has no `lengths`"
    assert "use train.batch_size, or add lengths" in hint
    message, hint = error("long", train={"steps": 1, "batch_tokens": 50})
    assert message == "sample 134 of the training set has 58 tokens, more than `train.batch_tokens` (50)"
    assert hint.startswith("use train.batch_tokens=58 or more")


# ---- on the ranks


def loop_of(world, root, train, model=None, groups=None, task="Language"):
    sys.path.append(str(SENTENCES))
    import language

    from trainers.config.schema import RunConfig
    from trainers.contract.paths import RunPaths
    from trainers.engine import loop

    loop.close_process_group = lambda: None  # the process group serves the next call too
    config = RunConfig.model_validate({
        "name": "language", "task": f"language:{task}", "model": model or {}, "train": train, "log": {"every": 1},
        "eval": {"every": 20}, "checkpoint": {"every": "never"},
        "optim": {"name": "adamw", "lr": 1e-2, "schedule": "cosine", "warmup": 3, "clip_norm": 1.0, "weight_decay": 0.01,
                  "groups": groups or []},
    })
    Path(root).mkdir(parents=True, exist_ok=True)
    return loop.Loop(getattr(language, task)(config), config, world, RunPaths(Path(root)), None)


def trained(world, root, until=None, **keys):
    """Return the training rows of a run, what this rank has drawn, and the number of fillers. The run continues to its end, or
    is asked to stop at step `until`."""
    loop = loop_of(world, root, **keys)
    samples, fillers = loop.runners[0].samples, 0
    shares = samples.shares

    def counting(*args):
        nonlocal fillers
        found = shares(*args)
        fillers += sum(share.filler for share in found)
        return found

    samples.shares = counting
    settle = loop.runners[0].settle

    def settle_unseen(draw):
        settle(draw)
        loop.task.text.drawn.clear()

    loop.runners[0].settle = settle_unseen
    if until is not None:
        loop.stopping.at_boundary = lambda: loop.step >= until
    assert loop.run() == (0 if until is None else 75)
    rows = [json.loads(line) for line in (Path(root) / "metrics.jsonl").read_text().splitlines()]
    evaluated = {row["step"]: {"eval loss": row["loss"]} for row in rows if row["split"] == "eval"}
    return {"rows": [{name: row[name] for name in ("step", "loss", "grad_norm", "lr")} | evaluated.get(row["step"], {})
                     for row in rows if row["split"] == "train"], "drawn": loop.task.text.drawn, "fillers": fillers}


def error_of(world, root, **keys):
    from trainers.contract.errors import UserError

    with pytest.raises(UserError) as error:
        loop_of(world, root, **keys)
    return error.value.message, error.value.hint


if __name__ == "__main__":
    serve(globals())
