from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from json import loads

import pytest
from rich.cells import cell_len
from rich.console import Console

from launch.supervise.terminal import JsonView, PlainView, Progress, RichView, make_view

START = {"event": "start", "step": 0, "total": 1000, "world_size": 2, "device": "cpu", "precision": "fp32",
         "parameters": 10, "samples": 50000, "resumed": False}
STEP = {"event": "step", "step": 250, "total": 1000, "loss": 1.75, "lr": 0.1, "rate": 12345.6, "unit": "samples",
        "data_wait": 0.03, "eta_s": 132.0}
EVAL = {"event": "eval", "step": 250, "total": 1000, "metrics": {"top1": 0.5}}
END = {"event": "end", "state": "finished", "step": 1000, "total": 1000, "metrics": {"top1": 0.9}, "checkpoint": 1000}
ERROR = {"event": "error", "message": "SECRET FAILURE", "hint": None, "exit_code": 1, "retry": False}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    return Terminal()


def test_the_view_suits_the_stream(terminal, monkeypatch):
    assert isinstance(make_view(False, terminal), RichView)
    assert isinstance(make_view(True, terminal), JsonView)
    assert isinstance(make_view(False, io.StringIO()), PlainView)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_view(False, terminal), PlainView)


def test_the_plain_view():
    stream = io.StringIO()
    view = make_view(False, stream)
    view.notice("run x in runs/x")
    for event in (STEP, ERROR, EVAL):
        view.event(event)
    view.text("[bold]as it is[/bold]\ttab")
    view.close()
    assert stream.getvalue().splitlines() == [
        "run x in runs/x",
        "step 250/1000  loss 1.75  lr 0.1  12,346 samples/s  data 3%  eta 2:12",
        "eval 250/1000  top1 0.5",
        "[bold]as it is[/bold]\ttab",
    ]


def test_json_is_strict():
    stream = io.StringIO()
    view = make_view(True, stream)
    view.notice("n")
    view.event({**STEP, "loss": float("nan")})
    view.event(ERROR)
    view.text("长\u2028")
    view.close()

    def refuse(constant):
        raise AssertionError(constant)

    assert [json.loads(line, parse_constant=refuse) for line in stream.getvalue().strip("\n").split("\n")] == [
        {"event": "notice", "message": "n"}, {**STEP, "loss": None}, ERROR, {"event": "text", "line": "长\u2028"},
    ]


def test_the_output_of_a_script_without_events_is_shown_unchanged(terminal):
    view = make_view(False, terminal)
    lines = ["[bold]x[/bold]", "\x1b[31mred\x1b[0m", "1%\r2%"]
    for line in lines:
        view.text(line)
    view.close()
    assert terminal.getvalue() == "".join(line + "\n" for line in lines)


def test_steps_move_the_bar_and_everything_else_is_printed_above_it(terminal):
    view = make_view(False, terminal)
    view.event(START)
    before = terminal.getvalue().count("\n")
    for step in range(10, 260, 10):
        view.event({**STEP, "step": step})
    assert terminal.getvalue().count("\n") == before, "step events must not print lines"
    view.text("[bold]no markup[/bold] :smile:")
    assert "250/1000" in terminal.getvalue() and "2:12" in terminal.getvalue()
    view.text("1%\r2%\r3%\r")
    view.text("a\x1b[31mred\x1b[0m\x1b[2J\x1b[1;1Hb")
    view.text("长" * 100)
    view.event(EVAL)
    view.event(ERROR)
    view.notice("from [the] launcher")
    view.event(END)
    view.close()
    shown = terminal.getvalue()
    for text in ("[bold]no markup[/bold] :smile:\n", "3%\n", "aredb\n", "长" * 100 + "\n", "eval 250/1000  top1 0.5\n",
                 "from [the] launcher\n", "finished at step 1000/1000  top1 0.9\n"):
        assert text in shown
    for text in ("1%\r", "\x1b[2J", "\x1b[1;1H", "SECRET"):
        assert text not in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor must be visible again"


def test_a_progress_bar_of_a_script_is_redrawn_on_its_line(terminal):
    """The terminal gets what it would get without `launch`."""
    view = make_view(False, terminal)
    for text in ("  0%|  |", "\r 50%|█ |", "\r100%|██|"):
        view.partial(text)
    view.text(" done")
    view.partial("\r 10%|")
    view.notice("from the launcher")
    view.partial("next? ")
    view.close()
    assert terminal.getvalue() == "  0%|  |\r 50%|█ |\r100%|██| done\n\r 10%|\nfrom the launcher\nnext? \n"


def test_a_progress_bar_of_a_task_becomes_one_line_above_the_progress_line(terminal):
    view = make_view(False, terminal)
    view.event(START)
    mark = len(terminal.getvalue())
    for text in ("  0%|  |", "\r 50%|█ |", "\r100%|██|"):
        view.partial(text)
    assert terminal.getvalue()[mark:] == ""
    view.text("")
    view.close()
    assert "100%|██|\n" in terminal.getvalue() and "50%" not in terminal.getvalue()


@pytest.mark.parametrize("json", [False, True])
def test_a_progress_bar_in_a_pipe_is_shown_now_and_then_by_its_last_state(json):
    stream = io.StringIO()
    view = make_view(json, stream)
    for i in range(10):
        view.partial(f"\r{i}%")
    view.text("\r100%\r")
    view.partial("a prompt: ")
    view.close()
    lines = [loads(line)["line"] if json else line for line in stream.getvalue().splitlines()]
    assert lines == ["0%", "100%", "a prompt: "]


def test_without_colours_the_parts_of_the_bar_differ(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    progress = Progress()
    progress.take(STEP)
    console = Console(width=60, force_terminal=True, file=io.StringIO())
    console.print(progress)
    line = console.file.getvalue()
    assert re.search(r" #{2,}-{6,} ", line) and "━" not in line, line


def test_the_last_step_stays_visible_without_an_end_event(terminal):
    view = make_view(False, terminal)
    view.event(START)
    view.event(STEP)
    mark = len(terminal.getvalue())
    view.close()
    shown = terminal.getvalue()[mark:]
    assert shown.endswith("eta 2:12\n") and "\nstep" not in shown, "as a plain line in place of the bar"


@pytest.mark.parametrize("width", [5, 10, 24, 49, 79, 119, 200])
def test_the_progress_line_fits_any_width(width):
    progress = Progress()
    assert progress.take({**STEP, "generator_loss": 0.5, "语言": 1.0})
    console = Console(width=300, color_system="standard", force_terminal=True, _environ={})
    line = "".join(segment.text for part in progress.draw(width) for segment in console.render(part))
    assert cell_len(line) <= width or line == "250/1000"
    for least, text in [(24, "25%"), (49, "loss 1.75"), (49, "eta 2:12"), (79, "12,346 samples/s"), (79, "data 3%"),
                        (79, "lr 0.1"), (79, "━" * 6), (119, "generator_loss 0.5")]:
        assert text in line or width < least


@pytest.mark.parametrize("event", [
    {"event": "step"}, {"event": "step", "step": "x", "total": 3}, {**STEP, "rate": None}, {"event": "start"},
    {"event": "start", "total": "many"}, {"event": "eval"}, {"event": "mine", "a": 1},
])
def test_unusual_events_do_not_stop_a_run(terminal, event):
    for view in (make_view(False, terminal), make_view(False, io.StringIO()), make_view(True, io.StringIO())):
        view.event(event)
        view.event(START)
        view.event(event)
        view.close()


def show_everything(view):
    for _ in range(3):
        view.event(START)
        view.event(STEP)
        view.text("x" * 100_000)
        view.notice("n")
    view.event(END)
    view.close()


@pytest.mark.parametrize("json", [False, True])
def test_a_closed_pipe_does_not_stop_a_run(json):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        show_everything(make_view(json, stream))


def test_a_closed_terminal_does_not_stop_a_run(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    master, slave = os.openpty()
    with open(slave, "w") as stream:
        view = make_view(False, stream)
        assert isinstance(view, RichView)
        os.close(master)
        with pytest.raises(OSError):
            os.write(slave, b"the terminal is closed")
        show_everything(view)


def test_a_closed_pipe_does_not_change_the_exit_code():
    code = ("from launch.supervise.terminal import make_view\nview = make_view(False)\n"
            "for i in range(50000): view.text(f'line {i}')\n")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"line 0\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


def test_a_character_that_the_stream_cannot_encode_is_escaped():
    raw = io.BytesIO()
    view = make_view(False, io.TextIOWrapper(raw, encoding="ascii"))
    view.text("长 x")
    view.close()
    assert raw.getvalue() == b"\\u957f x\n"
