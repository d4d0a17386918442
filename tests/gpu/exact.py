"""Checks that compare runs: with the CPU's losses, and an interrupted run with an uninterrupted one."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu import engine
from gpu.engine import SENTENCES
from gpu.place import Place

IMAGES = ["data=sample", "optim.schedule=constant", "checkpoint.every=4", "eval.every=5", "train.batch_size=64"]
LARGEST = {"fp32": 2e-3, "tf32": 1e-2, "bf16": 5e-2, "fp16": 5e-2}  # differences of losses from the CPU's, as fractions


def precisions(place: Place) -> None:
    """The losses in every precision follow those of the CPU in fp32."""
    steps = 3 if place.toy else 8
    for name, task, keys in (
            ("vgg", "cifar10", [*IMAGES, "optim.lr=0.005", "train.batch_size=32",
                                *(["model.width=0.125"] if place.toy else [])]),
            ("transformer", SENTENCES, ["optim.lr=1e-3", *([] if place.toy else ["model.width=256", "model.depth=4"])])):
        keys = [*keys, f"train.steps={steps}", "eval.every=never", "checkpoint.every=never"]
        expected = engine.train(task, keys, place.folder / name / "cpu", "cpu")
        assert expected is not None
        for precision in ("fp32", "bf16") if place.toy else LARGEST:
            got = engine.train(task, [*keys, f"train.precision={precision}"], place.folder / name / precision, place.device)
            assert got is not None
            pairs = list(zip(expected.steps, got.steps, strict=True))
            difference = max(abs(ours[1] - theirs[1]) / abs(theirs[1]) for theirs, ours in pairs)
            place.say(**{f"{name} {precision}": f"{difference:.1e}"})
            place.expect(difference <= LARGEST[precision],
                         f"{name} in {precision}: losses differ from the CPU's by {difference:.1e}")
            place.expect(precision == "fp32" or got.steps != expected.steps, f"{name} in {precision} has the losses of fp32")


def resume_vgg(place: Place) -> None:
    _resume(place, "cifar10", [*IMAGES, *(["model.width=0.125", "train.batch_size=16"] if place.toy else [])])


def resume_resnet18(place: Place) -> None:
    _resume(place, "cifar10", [*IMAGES, "model.arch=resnet18",
                               *(["train.batch_size=2", "eval.every=never"] if place.toy else [])])


def resume_transformer(place: Place) -> None:
    size = ["model.dropout=0.1", *([] if place.toy else ["model.width=256", "model.depth=4"])]
    _resume(place, SENTENCES, ["checkpoint.every=4", "eval.every=5", *size], processes=True)


def strategies(place: Place) -> None:
    """Every strategy trains on one rank with the losses of ddp, and ddp continues from its checkpoints."""
    size = [] if place.toy else ["model.width=256", "model.depth=4"]
    keys = ["checkpoint.every=4", "eval.every=never", "train.steps=10", *size]
    whole = engine.train(SENTENCES, keys, place.folder / "ddp", place.device)
    assert whole is not None
    for strategy in ("fsdp", "zero1") if place.toy else ("fsdp", "zero1", "zero2", "zero3"):
        job = {"task": str(SENTENCES), "keys": [*keys, f"train.strategy={strategy}"], "folder": str(place.folder / strategy),
               "device": place.device}
        try:
            place.python("gpu.engine", json.dumps([{**job, "cut": 6}]), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0",
                         LOCAL_WORLD_SIZE="1")
            # The checkpoint of step 4 is the last, so ddp repeats steps 5 and 6.
            got = engine.train(SENTENCES, keys, place.folder / strategy, place.device)
        except Exception as error:
            place.expect(False, f"{strategy}: {error}")
            continue
        assert got is not None
        difference = max(abs(ours[1] - theirs[1]) / abs(theirs[1])
                         for theirs, ours in zip(whole.steps, got.steps, strict=True))
        place.say(**{strategy: f"{difference:.1e}"})
        place.expect(difference < 1e-4, f"{strategy}: losses differ from those of ddp by {difference:.1e}")


def shared_gpu(place: Place) -> None:
    """Two ranks on one GPU, over gloo, train with the losses of one rank."""
    keys = ["checkpoint.every=never", "eval.every=5", "train.steps=10", *([] if place.toy else ["model.width=256"])]
    one = engine.train(SENTENCES, keys, place.folder / "one", place.device)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = json.dumps([{"task": str(SENTENCES), "keys": keys, "folder": str(place.folder / "two"), "device": place.device}])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "GLOO_SOCKET_IFNAME": "lo", "LAUNCH_SHARE_GPU": "1"}
    with ThreadPoolExecutor() as pool:
        ranks = [pool.submit(place.python, "gpu.engine", job, RANK=str(rank), LOCAL_RANK=str(rank), **common)
                 for rank in range(2)]
    wrong = [str(error) for rank in ranks if (error := rank.exception())]
    if not place.expect(not wrong, "; ".join(wrong)):
        return
    two = engine.read(place.folder / "two")
    assert one is not None
    difference = max(abs(ours[1] - theirs[1]) / abs(theirs[1]) for theirs, ours in zip(one.steps, two.steps, strict=True))
    place.say(difference=f"{difference:.1e}")
    place.expect(difference < 1e-4, f"losses of two ranks differ from those of one by {difference:.1e}")


def _resume(place: Place, task: str | Path, keys: list[str], processes: bool = False) -> None:
    """An uninterrupted run, a second one in another process, and a run that is cut off and resumed have the same bits.

    Args:
        processes: whether toys use processes of their own too.
    """
    steps, cut = (6, 5) if place.toy else (14, 10)
    precisions = ("bf16",) if place.toy else ("fp32", "bf16", "fp16")

    def job(kind: str, precision: str, **more: object) -> dict[str, object]:
        return {"task": str(task), "keys": [*keys, f"train.steps={steps}", f"train.precision={precision}"],
                "folder": str(place.folder / f"{precision}-{kind}"), "device": place.device, **more}

    first = [job("whole", precision) for precision in precisions] + [job("cut", precision, cut=cut) for precision in precisions]
    second = [job("cut", precision) for precision in precisions] + [job("again", precision) for precision in precisions]
    for jobs in first, second:
        if place.toy and not processes:
            for arguments in jobs:
                engine.train(**arguments)  # type: ignore[arg-type]
        else:
            place.python("gpu.engine", json.dumps(jobs))
    for precision in precisions:
        whole, cut_off, again = (engine.read(place.folder / f"{precision}-{kind}") for kind in ("whole", "cut", "again"))
        place.expect(len(whole.steps) == steps and (place.toy or len(whole.evaluations) >= 2) and len(whole.files) > 0,
                     f"{precision}: {len(whole.steps)} steps and {len(whole.evaluations)} evaluations were logged")
        for kind, other in ("a second run", again), ("the resumed run", cut_off):
            for what in ("steps", "evaluations", "files"):
                ours, theirs = getattr(other, what), getattr(whole, what)
                place.expect(ours == theirs, f"{precision}: {kind} has other {what}: {_first_difference(theirs, ours)}")
        place.say(**{precision: {"loss": whole.steps[-1][1], "bits equal": whole == again == cut_off}})


def _first_difference(expected: object, got: object) -> str:
    if isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        return next((f"{theirs} became {ours}" for theirs, ours in zip(expected, got) if theirs != ours), "nothing")
    return f"{expected} became {got}"[:300]
