"""Show a run in progress, to a person or to a program."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import IO, TYPE_CHECKING, Any, Protocol

from trainers.contract.events import line as plain_line
from trainers.contract.events import speed
from trainers.contract.streams import take_any_text
from trainers.contract.text import duration, last_state, number

if TYPE_CHECKING:  # rich is imported only when something is drawn
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.text import Text

DRAW_EVERY_S = 0.05
BAR_EVERY_S = 30.0  # between two states of a script's own progress bar in a pipe


class View(Protocol):
    """Shows what ranks and the launcher print.

    No method raises because of the stream: a run continues without its reader (`| head`) and without its terminal.
    """

    def event(self, event: dict[str, Any]) -> None:
        """Show an event (trainers/contract/events.py)."""

    def text(self, line: str) -> None:
        """Show a line of rank 0's output that is not an event. The line has no line end."""

    def partial(self, text: str) -> None:
        """Show a part of a line of rank 0's output that has no line end yet, such as the line of a progress bar."""

    def notice(self, message: str) -> None:
        """Show a message of the launcher."""

    def close(self) -> None:
        """Restore the terminal. Nothing is shown afterwards."""


def make_view(json: bool, stream: IO[str] | None = None, ranks: bool = True) -> View:
    """Return the view that fits the stream: a progress line on a terminal that can draw one, otherwise plain lines.

    Args:
        json: show JSON lines instead.
        stream: None: standard output.
        ranks: False: show only the launcher's own messages, as plain lines.
    """
    stream = sys.stdout if stream is None else stream
    outlet = Outlet(stream)
    if not ranks:
        return NoticeView(outlet)
    if json:
        return JsonView(outlet)
    if outlet.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        return RichView(outlet)
    return PlainView(outlet)


class Outlet:
    """A stream that drops its output once the reader is gone, and takes characters that it cannot encode."""

    def __init__(self, stream: IO[str]):
        self._stream = stream
        self._gone = False
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        take_any_text(stream)

    def write(self, text: str) -> int:
        if not self._gone:
            try:
                self._stream.write(text)
            except (OSError, ValueError):  # ValueError: the stream is closed
                self._leave()
        return len(text)

    def flush(self) -> None:
        if not self._gone:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._leave()

    def line(self, text: str) -> None:
        self.write(text + "\n")
        self.flush()

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except ValueError:
            return False

    def fileno(self) -> int:
        return self._stream.fileno()

    def _leave(self) -> None:
        self._gone = True
        # Python flushes the stream's buffer when it exits. If the stream is broken, this fails with exit code 120.
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):
            pass  # a stream without a file descriptor


FOR_PROGRAMS = ("error", "failure")  # the launcher prints these once, when it ends, on standard error


class PlainView:
    """Shows one plain line per event, line of output or message."""

    def __init__(self, outlet: Outlet):
        self._outlet = outlet
        self._bar_at = float("-inf")  # when an unfinished line with carriage returns was shown last

    def event(self, event: dict[str, Any]) -> None:
        if event["event"] not in FOR_PROGRAMS:
            self._outlet.line(event_line(event))

    def text(self, line: str) -> None:
        self._outlet.line(last_state(line))

    def partial(self, text: str) -> None:
        """Show a progress bar, which may be redrawn for hours, only now and then."""
        if "\r" not in text or time.monotonic() > self._bar_at + BAR_EVERY_S:
            self._bar_at = time.monotonic()
            self.text(text)

    def notice(self, message: str) -> None:
        self._outlet.line(message)

    def close(self) -> None:
        self._outlet.flush()


class NoticeView(PlainView):
    """Shows only the launcher's messages. The output of ranks is in their logs."""

    def event(self, event: dict[str, Any]) -> None: ...
    def text(self, line: str) -> None: ...
    def partial(self, text: str) -> None: ...


class JsonView(PlainView):
    """Shows one JSON object per line: the events, {"event": "text", "line"} and {"event": "notice", "message"}."""

    def event(self, event: dict[str, Any]) -> None:
        self._outlet.line(strict_json(event))

    def text(self, line: str) -> None:
        self._outlet.line(strict_json({"event": "text", "line": last_state(line)}))

    def notice(self, message: str) -> None:
        self._outlet.line(strict_json({"event": "notice", "message": message}))


class RichView:
    """Shows plain lines and, from the first `start` event on, a progress line below them.

    No thread draws the progress line, because ranks are forked from this process. The methods of the view draw it.
    """

    def __init__(self, outlet: Outlet):
        self._outlet = outlet
        self._live: Live | None = None
        self._drawn_at = 0.0
        self._progress = Progress()
        self._unfinished = ""  # what was shown of the present line of output

    def event(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case kind if kind in FOR_PROGRAMS:
                return
            case "step" if self._live and self._progress.take(event):
                # Drawing takes 0.5 ms: do not draw for each of a thousand logged steps per second.
                if time.monotonic() - self._drawn_at > DRAW_EVERY_S:
                    self._live.refresh()
                    self._drawn_at = time.monotonic()
                return
            case "start":
                self._open(event)
            case "end":
                self._progress.shown = False  # the plain line of this event holds everything
        self._above(event_line(event))

    def text(self, line: str) -> None:
        if self._live:
            line, self._unfinished = self._unfinished + line, ""
            self._above(line)
        else:  # the terminal shows what a script prints as without `launch`
            self._unfinished = ""
            self._outlet.line(line)

    def partial(self, text: str) -> None:
        if self._live:  # the part would damage the progress line: it is shown with the rest of its line
            self._unfinished = last_state(self._unfinished + text)
        else:
            self._unfinished = text
            self._outlet.write(text)
            self._outlet.flush()

    def notice(self, message: str) -> None:
        self._above(message)

    def close(self) -> None:
        if self._live:
            if self._unfinished:
                self.text("")
            live, self._live = self._live, None
            live.transient = True
            live.stop()
            if self._progress.shown and self._progress.stepped:  # no `end` event came: the last step stays as a plain line
                self._outlet.line(event_line(self._progress.event))
        elif self._unfinished:
            self._outlet.line("")
        self._outlet.flush()

    def _open(self, event: dict[str, Any]) -> None:
        from rich.console import Console
        from rich.live import Live

        self._progress = Progress()
        self._progress.take({"step": event.get("step", 0), "total": event.get("total")})
        if self._live is None:
            if self._unfinished:
                self._unfinished = ""
                self._outlet.line("")
            console = Console(file=self._outlet,  # type: ignore[arg-type]  # rich uses only what Outlet has
                              force_terminal=True, highlight=False, markup=False, emoji=False)
            self._live = Live(get_renderable=lambda: self._progress, console=console, auto_refresh=False,
                              redirect_stdout=False, redirect_stderr=False)
            self._live.start()
            # Live hides the cursor. A launcher that is killed could not show the cursor again.
            console.show_cursor(True)

    def _above(self, line: str) -> None:
        if self._live is None:
            self._outlet.line("\n" * bool(self._unfinished) + line)
            self._unfinished = ""
            return
        from rich.text import Text

        # from_ansi keeps colours and removes other control sequences, which would damage the progress line. If a progress
        # bar has overwritten its line with carriage returns, the last version stays. soft_wrap: the terminal breaks long lines.
        self._live.console.print(Text.from_ansi(line.rstrip("\r\n")), soft_wrap=True)


class Progress:
    """The progress line: its most important parts, as many as fit, and a bar in the space that is left."""

    LEAST_BAR = 6  # columns

    def __init__(self) -> None:
        self.shown = True
        self.stepped = False
        self._began = time.monotonic()
        self.event: dict[str, Any] = {"step": 0, "total": None}

    def take(self, event: dict[str, Any]) -> bool:
        """Show this `step` event from now on. Return False if it cannot be drawn: a user's script may print anything."""
        try:
            self._parts(event)
        except (KeyError, TypeError, ValueError):
            return False
        self.event, self.stepped = event, event.get("event") == "step"
        return True

    def __rich_console__(self, console: Any, options: Any) -> Any:
        if not self.shown:
            return
        from rich.progress_bar import ProgressBar
        from rich.segment import Segment

        for part in self.draw(options.max_width - 1):  # the last column stays free: some terminals wrap there
            if console.no_color and isinstance(part, ProgressBar):  # rich tells the parts of a bar apart only by colours
                width = part.width or 0
                done = round(width * part.completed / (part.total or 1))
                yield Segment("#" * done + "-" * (width - done))
                continue
            segments = list(console.render(part, options))
            yield from segments
            # rich draws no rest of a bar on some terminals: the text after the bar would move with each step.
            yield Segment(" " * ((getattr(part, "width", None) or 0) - sum(segment.cell_length for segment in segments)))

    def draw(self, width: int) -> list[Text | ProgressBar]:
        """Return the parts of the line, from left to right, in at most `width` cells."""
        from rich.cells import cell_len
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        parts, total = self._parts(self.event), self.event["total"]
        gap = 2 if width >= 100 else 1
        chosen, room = {0}, width - cell_len(" ".join(parts[0][1:]))
        if total:
            room -= self.LEAST_BAR + gap
        for index in sorted(range(1, len(parts)), key=lambda index: parts[index][0]):
            needed = cell_len(" ".join(parts[index][1:]).strip()) + gap
            if needed <= room:
                chosen.add(index)
                room -= needed
        line: list[Text | ProgressBar] = []
        text = Text(no_wrap=True, overflow="crop", end="")
        for index in sorted(chosen):
            _, label, value = parts[index]
            text.append(" " * gap if index else "").append(f"{label} " if label else "", style="dim").append(value)
            if index == 0 and total and room >= 0:
                bar = ProgressBar(total=total, completed=self.event["step"], width=min(self.LEAST_BAR + room, 40),
                                  style="bright_black", complete_style="green", finished_style="green")
                line += [text.append(" " * gap), bar]
                text = Text(no_wrap=True, overflow="crop", end="")
        return [*line, text]

    def _parts(self, event: dict[str, Any]) -> list[tuple[int, str, str]]:
        """Return (importance, 0 being the highest, label, value) of each part, from left to right."""
        step, total = event["step"], event["total"]
        known = {"event", "step", "total", "loss", "lr", "rate", "unit", "data_wait", "eta_s"}
        parts = [(0, "", f"{step}/{total}") if total else (0, "step", str(step))]
        if total:
            parts.append((2, "", f"{step / total:.0%}"))
        if "loss" in event:
            parts.append((1, "loss", number(event["loss"])))
        parts += [(8, name, number(value)) for name, value in event.items() if name not in known]
        if "lr" in event:
            parts.append((6, "lr", number(event["lr"])))
        if "rate" in event:
            parts.append((4, "", speed(event)))
        if "data_wait" in event:
            parts.append((5, "data", f"{event['data_wait']:.0%}"))
        parts.append((7, "", duration(time.monotonic() - self._began)))
        if event.get("eta_s") is not None:
            parts.append((3, "eta", duration(event["eta_s"])))
        return parts


def event_line(event: dict[str, Any]) -> str:
    """Return the event's plain line, or the event as JSON if a field is missing or has the wrong type."""
    try:
        return plain_line(event)
    except (KeyError, TypeError, ValueError, AttributeError):
        return json.dumps(event, ensure_ascii=False)


def strict_json(value: dict[str, Any]) -> str:
    """Return JSON that every parser accepts: a number that is not finite (a loss of nan) becomes null."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), ensure_ascii=False)
