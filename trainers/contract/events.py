"""Events, by which a rank reports its progress: JSON objects, and the plain line for each. Imports no torch.

Under `launch` (LAUNCH_EVENTS=1), a rank writes each event to its standard output as one line that starts with the record
separator of RFC 7464. Other output may stand between events. The node process reads and shows the events. Elsewhere
(torchrun, accelerate), the rank prints the plain line.

| event      | keys besides `event`                                                                       |
|------------|--------------------------------------------------------------------------------------------|
| start      | step, total, world_size, device, precision, parameters, samples, resumed (bool), best_by   |
|            | (what makes a checkpoint one of the best, in words, or null)                               |
|            | of a search, whose steps are fits: step, total, about (a text), resumed                    |
| step       | step, total, rate, unit, data_wait (share of time), eta_s, and what was measured: loss, lr |
| eval       | step, total (null in `launch eval`), metrics                                               |
| test       | checkpoint (the step of the checkpoint that was scored on the test set), metrics           |
| checkpoint | step, path, bytes, seconds, stall_s                                                        |
| note       | level (`info` or `warning`), message; unsaved, if the checkpoint of that step has failed   |
| error      | message, hint, exit_code, retry (bool): a rank's last event, shown by the launcher         |
| failure    | what attempt.json records about the first failed rank: from the launcher, for `--json`     |
| end        | state (`finished` or `preempted`), step, total, metrics, checkpoint; of a search also unit |
|            | stopped_early (why a finished run ended before its last step, in words, or null)           |
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Mapping, TypeVar

from trainers.contract.text import duration, number

T = TypeVar("T")

SEPARATOR = "\x1e"
VARIABLE = "LAUNCH_EVENTS"


def emit(event: Mapping[str, Any]) -> None:
    """Write an event to standard output. Without `launch`, errors go to standard error."""
    stream = sys.stdout
    if os.environ.get(VARIABLE) == "1":
        text = SEPARATOR + json.dumps(event, ensure_ascii=False)
    else:
        text = line(event)
        stream = sys.stderr if event["event"] == "error" else stream
    # One write for the whole line, because other threads print too.
    stream.write(text + "\n")
    stream.flush()


def parse(text: str) -> dict[str, Any] | None:
    """Return the event in a line of output, or None if the line is not an event."""
    if not text.startswith(SEPARATOR):
        return None
    try:
        event = json.loads(text[len(SEPARATOR):])
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def line(event: Mapping[str, Any]) -> str:
    """Return the plain line of an event, for logs and for terminals without live display."""
    match event["event"]:
        case "start":
            if "about" in event:
                verb = "resuming at" if event["resumed"] else "from"
                return f"{verb} fit {event['step']} of {event['total']}: {event['about']}"
            verb = "resuming at" if event["resumed"] else "training from"
            return (f"{verb} step {event['step']} of {event['total']}: {event['world_size']} rank(s) on "
                    f"{event['device']}, {event['precision']}, {event['parameters']:,} parameters, "
                    f"{event['samples']:,} samples" + (f", best by {event['best_by']}" if event.get("best_by") else ""))
        case "step":
            if event["unit"] == "fits":
                return f"fit {event['step']}/{event['total']}  {speed(event)}  eta {duration(event['eta_s'])}"
            return (f"step {event['step']}/{event['total']}  {metrics_line(step_metrics(event))}  "
                    f"{speed(event)}  data {event['data_wait']:.0%}  eta {duration(event['eta_s'])}")
        case "eval":
            total = f"/{event['total']}" if event["total"] is not None else ""
            return f"eval {event['step']}{total}  {metrics_line(brief(event['metrics']))}"
        case "test":
            return f"test of checkpoint {event['checkpoint']}  {metrics_line(brief(event['metrics']))}"
        case "checkpoint":
            return (f"checkpoint {event['step']}  {event['bytes'] / 2**20:.1f} MiB in {event['seconds']:.2f} s, "
                    f"training stalled {event['stall_s']:.3f} s")
        case "note":
            return event["message"] if event["level"] == "info" else f"{event['level']}: {event['message']}"
        case "error":
            return f"error: {event['message']}" + (f"\nhint: {event['hint']}" if event.get("hint") else "")
        case "end":
            unit = "fit" if event.get("unit") == "fits" else "step"
            early = f", stopped early: {event['stopped_early']}" if event.get("stopped_early") else ""
            return f"{event['state']} at {unit} {event['step']}/{event['total']}{early}  {metrics_line(brief(event['metrics']))}"
        case _:
            return json.dumps(dict(event), ensure_ascii=False)


def speed(event: Mapping[str, Any]) -> str:
    """Return '1,234 images/s', or '0.42 fits/s' for rates below 10."""
    rate = event["rate"]
    return f"{rate:,.0f} {event['unit']}/s" if rate >= 10 else f"{rate:.2g} {event['unit']}/s"


def step_metrics(event: Mapping[str, Any]) -> dict[str, float]:
    """Return what a `step` event measured, in order: loss, lr, ... (with several updates: `critic/loss`, ...)."""
    others = {"event", "step", "total", "rate", "unit", "data_wait", "eta_s"}
    return {key: value for key, value in event.items() if key not in others}


def brief(metrics: Mapping[str, T]) -> dict[str, T]:
    """Return the metrics without those of single parts, such as `class/ship`."""
    return {name: value for name, value in metrics.items() if "/" not in name}


def metrics_line(metrics: Mapping[str, float]) -> str:
    """Return 'loss 0.1234  top1 0.9'."""
    return "  ".join(f"{name} {number(value)}" for name, value in metrics.items())


