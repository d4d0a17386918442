from __future__ import annotations

import json
import os

from trainers.contract.files import jsonable
from trainers.engine.tracking import metrics
from trainers.engine.tracking.metrics import MetricsFile


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_is_cut_back_to_the_step_and_half_a_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "split": "eval"}\n{"step": 3}\n{"step": 4, "lo')
    file = MetricsFile(path, 2, True, warn=print)
    assert [row["step"] for row in file.kept] == [1, 2]
    file.append({"step": 3, "again": True})
    file.close()
    assert lines(path) == [{"step": 1}, {"step": 2, "split": "eval"}, {"step": 3, "again": True}]


def test_rows_wait_while_the_disk_is_full(tmp_path, monkeypatch):
    warned = []
    file = MetricsFile(tmp_path / "metrics.jsonl", 0, False, warned.append)
    file.append({"step": 1})
    real = os.write

    def full(handle, data):
        if len(data) > 5:
            return real(handle, data[:5])  # what still fits
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "write", full)
    file.append({"step": 2})
    file.append({"step": 3})
    assert len(warned) == 1 and "No space left on device" in warned[0] and lines(file.path) == [{"step": 1}]
    monkeypatch.setattr(metrics.os, "write", real)
    file.append({"step": 4})
    file.close()
    assert [row["step"] for row in lines(file.path)] == [1, 2, 3, 4]
    assert len(warned) == 2 and "none is lost" in warned[1]


def test_an_evaluation_that_is_yet_to_come_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "eval"}\n{"step": 2, "split": "train"}\n{"step": 2, "split": "eval"}\n')
    file = MetricsFile(path, 2, False, warn=print)
    file.append({"step": 2, "split": "eval", "loss": float("nan")})
    file.close()
    assert lines(path) == [{"step": 1, "split": "eval"}, {"step": 2, "split": "train"},
                           {"step": 2, "split": "eval", "loss": None}]


def test_json_has_no_number_for_nan_in_a_list_either():
    assert jsonable({"a": [1.0, float("nan"), {"b": (float("inf"), 2)}]}) == {"a": [1.0, None, {"b": [None, 2]}]}
