"""Checks of what becomes of a run that goes wrong on a GPU, and of worker processes beside CUDA."""

from __future__ import annotations

import json
import re
import sys
import time

from gpu import engine
from gpu.place import TESTS, Place

PICTURES = TESTS / "pictures" / "pictures.yaml"


def out_of_memory(place: Place) -> None:
    """Where a batch does not fit in memory, `auto` finds a micro-batch that does."""
    size = ["train.batch_size=24"] if place.toy else ["train.batch_size=2048", "model.width=512", "model.depth=4"]
    done = place.launch(place.task("Narrow"), *size, "train.micro_batch_size=auto", "train.steps=2", "checkpoint.every=never",
                        *place.ranks())
    found = re.findall(r"auto: (\d+) micro-batch x (\d+) accumulation", done.stdout)  # one for each attempt
    record = json.loads((place.run_folder() / "run.json").read_text())
    place.say(attempts=record["attempt"], found=found)
    place.expect(bool(found) and int(found[-1][1]) > 1, "no smaller micro-batch was found")
    place.expect(record["state"] == "finished", f"the run is {record['state']}")


def hung_kernel(place: Place) -> None:
    """A kernel that does not end is noticed, and the rank is named, within 20 s."""
    hang_s = 8
    began = time.time()
    done = place.launch(place.task("Hung"), f"run.hang_s={hang_s}", "run.grace_s=3", "checkpoint.every=never",
                        "eval.every=never", *place.ranks(), codes=(1,))
    run = place.run_folder()
    metrics = run / "metrics.jsonl"
    last, ended = metrics.stat().st_mtime, time.time()
    place.say(steps=len(metrics.read_text().splitlines()), seconds_to_the_hang=round(last - began, 1),
              seconds_until_the_end=round(ended - last, 1),
              error=[line for line in done.stderr.splitlines() if "hung" in line][:2])
    place.expect("rank 0 hung" in done.stderr, "the error does not say that rank 0 hung")
    place.expect(place.toy or ended - last < hang_s + 20, f"the run ended {ended - last:.0f} s after the last step")
    log = (run / "attempts" / "1" / "logs" / "0.log").read_text(errors="replace")
    place.expect("tasks.py" in log, "the log of the rank does not show where the rank was")


def workers(place: Place) -> None:
    """Worker processes of a map-style data set are forked from a process that uses CUDA, and change no loss."""
    sys.path.append(str(PICTURES.parent))
    from pictures import draw_pictures

    draw_pictures(place.folder / "pictures", 30 if place.toy else 150)
    keys = [f"data.source={place.folder / 'pictures'}", "train.epochs=2", "checkpoint.every=never", "eval.every=5"]
    alone, with_workers = (engine.train(PICTURES, [*keys, f"data.workers={count}"], place.folder / str(count), place.device)
                           for count in (0, 2))
    assert alone is not None and with_workers is not None
    place.say(steps=len(alone.steps), loss=alone.steps[-1][1])
    place.expect(len(alone.steps) > 1 and alone == with_workers, "two workers change the losses or the weights")
