from __future__ import annotations

import json
import os

from trainers.contract.files import jsonable
from trainers.engine.tracking import metrics
from trainers.engine.tracking.metrics import MetricsFile


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_after_the_step_and_an_incomplete_last_line_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "split": "eval"}\n{"step": 3}\n{"step": 4, "lo')
    file = MetricsFile(path, 2, True, warn=print)
    assert [row["step"] for row in file.kept] == [1, 2]
    file.append({"step": 3, "again": True})
    file.close()
    assert lines(path) == [{"step": 1}, {"step": 2, "split": "eval"}, {"step": 3, "again": True}]


def test_rows_are_kept_in_memory_while_the_disk_is_full(tmp_path, monkeypatch):
    warnings = []
    file = MetricsFile(tmp_path / "metrics.jsonl", 0, False, warnings.append)
    file.append({"step": 1})
    write = os.write

    def full(handle, data):
        if len(data) > 5:
            return write(handle, data[:5])  # as much as still fits
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "write", full)
    file.append({"step": 2})
    file.append({"step": 3})
    assert len(warnings) == 1 and "No space left on device" in warnings[0] and lines(file.path) == [{"step": 1}]
    monkeypatch.setattr(metrics.os, "write", write)
    file.append({"step": 4})
    file.close()
    assert [row["step"] for row in lines(file.path)] == [1, 2, 3, 4]
    assert len(warnings) == 2 and "none is lost" in warnings[1]


def test_the_row_of_an_evaluation_that_will_be_repeated_is_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "eval"}\n{"step": 2, "split": "train"}\n{"step": 2, "split": "eval"}\n')
    file = MetricsFile(path, 2, False, warn=print)
    file.append({"step": 2, "split": "eval", "loss": float("nan")})
    file.close()
    assert lines(path) == [{"step": 1, "split": "eval"}, {"step": 2, "split": "train"},
                           {"step": 2, "split": "eval", "loss": None}]


def test_nan_and_infinity_become_null_in_nested_values_too():
    assert jsonable({"a": [1.0, float("nan"), {"b": (float("inf"), 2)}]}) == {"a": [1.0, None, {"b": [None, 2]}]}
