"""Checks that call `launch` as a user does."""

from __future__ import annotations

import json

from gpu.place import Place


def main_job(place: Place) -> None:
    """`launch cifar10` trains, and its checkpoint can be evaluated, exported and predicted from."""
    from trainers.cifar10.shapes import draw_shapes

    size = ["model.width=0.125", "train.batch_size=25", "train.steps=4"] if place.toy else ["train.epochs=10"]
    done = place.launch("cifar10", "data=sample", *size, "eval.every=2" if place.toy else "eval.every=epoch", "log.every=1",
                        *place.ranks())
    run = place.run_folder()
    record = json.loads((run / "run.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    place.say(top1=record["metrics"].get("top1"), losses=[losses[0], losses[-1]],
              images_per_s=[row["rate"] for row in rows if row["split"] == "train"][-1],
              starts=[line for line in done.stdout.splitlines() if line.startswith(("run ", "training "))])
    place.expect(record["state"] == "finished", f"the run is {record['state']}")
    place.expect(f"on {place.device}" in done.stdout, f"the run was not on {place.device}")
    if not place.toy:
        place.expect(losses[-1] < 0.6 * losses[0], f"the loss went from {losses[0]} to {losses[-1]}")
        place.expect(record["metrics"]["top1"] > 0.6, f"top1 is {record['metrics']['top1']}")
    measured = json.loads(place.launch("eval", run.name, "--json").stdout.splitlines()[-1])
    metrics = measured.get("metrics", measured)
    place.say(eval=metrics)
    for name, value in record["metrics"].items():
        place.expect(metrics.get(name) == value, f"`launch eval` measures {name} {metrics.get(name)}, the run {value}")
    place.launch("export", run.name, "-o", "model.safetensors")
    _check_export(place)
    rows_of = place.launch("predict", run.name, "--set", "eval").stdout.splitlines()
    samples = len(draw_shapes().test.labels)
    place.expect(len(rows_of) == samples, f"{len(rows_of)} rows were predicted of {samples} samples")


def _check_export(place: Place) -> None:
    from safetensors.torch import load_file

    tensors = load_file(place.folder / "model.safetensors")
    place.say(exported=len(tensors), bytes=sum(tensor.nbytes for tensor in tensors.values()))
    place.expect(bool(tensors) and all(bool(tensor.isfinite().all()) for tensor in tensors.values()), "the export is not finite")
