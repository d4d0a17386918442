"""Random damage to checkpoints and random interruptions of saves. tests/benchmarks/corruptions.py tries more, on more kinds of
runs."""

from __future__ import annotations

import os

import pytest
from benchmarks.corruptions import HARMLESS, trials


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_wrong_state_is_loaded_and_no_good_state_is_lost(tmp_path):
    seed = int.from_bytes(os.urandom(4), "little")
    counts = trials(tmp_path, [("ddp", 1), ("zero3", 2), ("fsdp", 2)], count=54, seed=seed)
    for kind, outcomes in counts.items():
        print(f"{kind}: " + ", ".join(f"{outcome} {count}" for outcome, count in outcomes.items()))
        assert set(outcomes) <= set(HARMLESS), f"seed {seed}: {outcomes}"
    assert sum(sum(outcomes.values()) for outcomes in counts.values()) == 54
