"""Some damages and ends of saves at random; tests/benchmarks/corruptions.py tries more, on more kinds of runs."""

from __future__ import annotations

import os

import pytest
from benchmarks.corruptions import HARMLESS, trials


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_wrong_state_is_loaded_and_no_good_one_lost(tmp_path):
    seed = int.from_bytes(os.urandom(4), "little")
    counts = trials(tmp_path, [("ddp", 1), ("zero3", 2), ("fsdp", 2)], count=54, seed=seed)
    for kind, found in counts.items():
        print(f"{kind}: " + ", ".join(f"{outcome} {count}" for outcome, count in found.items()))
        assert set(found) <= set(HARMLESS), f"seed {seed}: {found}"
    assert sum(sum(found.values()) for found in counts.values()) == 54
