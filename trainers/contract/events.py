"""What a rank says while it runs: one JSON object an event, and the plain line for it. Imports no torch.

Under `launch` (LAUNCH_EVENTS=1) a rank writes events to its standard output between the lines of
anything else that prints there, each one line that begins with the record separator of RFC 7464; the
node process draws them. Elsewhere (torchrun, accelerate) the plain line is printed.

| event      | keys beside `event`                                                                  |
|------------|--------------------------------------------------------------------------------------|
| start      | step, total, world_size, device, precision, parameters, samples, resumed (bool)      |
|            | of a search, whose steps are fits: step, total, about (words), resumed               |
| step       | step, total, rate, unit, data_wait (share of time), eta_s, and the measured: loss, lr |
| eval       | step, total (null in `launch eval`), metrics                                         |
| checkpoint | step, path, bytes, seconds, stall_s                                                  |
| note       | level (`info` or `warning`), message                                                 |
| error      | message, hint, exit_code, retry (bool): a rank's last word, shown by the launcher    |
| failure    | what attempt.json says of the first rank that failed: from the launcher, for `--json` |
| end        | state (`finished` or `preempted`), step, total, metrics, checkpoint; of a search unit |
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Mapping

from trainers.contract.text import duration, number

SEPARATOR = "\x1e"
VARIABLE = "LAUNCH_EVENTS"


def emit(event: Mapping[str, Any]) -> None:
    """Say one event on standard output (without `launch`, an error on standard error)."""
    stream = sys.stdout
    if os.environ.get(VARIABLE) == "1":
        text = SEPARATOR + json.dumps(event, ensure_ascii=False)
    else:
        text = line(event)
        stream = sys.stderr if event["event"] == "error" else stream
    # One write for the whole line: other threads print too.
    stream.write(text + "\n")
    stream.flush()


def parse(text: str) -> dict[str, Any] | None:
    """The event in a line of output, or None if the line is none."""
    if not text.startswith(SEPARATOR):
        return None
    try:
        event = json.loads(text[len(SEPARATOR):])
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def line(event: Mapping[str, Any]) -> str:
    """The plain line of an event, for logs and for terminals that cannot draw."""
    match event["event"]:
        case "start":
            if "about" in event:
                verb = "resuming at" if event["resumed"] else "from"
                return f"{verb} fit {event['step']} of {event['total']}: {event['about']}"
            verb = "resuming at" if event["resumed"] else "training from"
            return (f"{verb} step {event['step']} of {event['total']}: {event['world_size']} rank(s) on "
                    f"{event['device']}, {event['precision']}, {event['parameters']:,} parameters, "
                    f"{event['samples']:,} samples")
        case "step":
            if event["unit"] == "fits":
                return f"fit {event['step']}/{event['total']}  {speed(event)}  eta {duration(event['eta_s'])}"
            return (f"step {event['step']}/{event['total']}  {metrics_line(step_metrics(event))}  "
                    f"{speed(event)}  data {event['data_wait']:.0%}  eta {duration(event['eta_s'])}")
        case "eval":
            of = f"/{event['total']}" if event["total"] is not None else ""
            return f"eval {event['step']}{of}  {metrics_line(brief(event['metrics']))}"
        case "checkpoint":
            return (f"checkpoint {event['step']}  {event['bytes'] / 2**20:.1f} MiB in {event['seconds']:.2f} s, "
                    f"training stalled {event['stall_s']:.3f} s")
        case "note":
            return event["message"] if event["level"] == "info" else f"{event['level']}: {event['message']}"
        case "error":
            return f"error: {event['message']}" + (f"\nhint: {event['hint']}" if event.get("hint") else "")
        case "end":
            what = "fit" if event.get("unit") == "fits" else "step"
            return f"{event['state']} at {what} {event['step']}/{event['total']}  {metrics_line(brief(event['metrics']))}"
        case _:
            return json.dumps(dict(event), ensure_ascii=False)


def speed(event: Mapping[str, Any]) -> str:
    """'1,234 images/s'; of slow things '0.42 fits/s'."""
    rate = event["rate"]
    return f"{rate:,.0f} {event['unit']}/s" if rate >= 10 else f"{rate:.2g} {event['unit']}/s"


def step_metrics(event: Mapping[str, Any]) -> dict[str, float]:
    """What a `step` event measured, in order: loss, lr, ... (a task with several updates: `critic/loss`, ...)."""
    about = {"event", "step", "total", "rate", "unit", "data_wait", "eta_s"}
    return {key: value for key, value in event.items() if key not in about}


def brief(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without the parts of a whole (`class/ship`)."""
    return {name: value for name, value in metrics.items() if "/" not in name}


def metrics_line(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {number(value)}" for name, value in metrics.items())


