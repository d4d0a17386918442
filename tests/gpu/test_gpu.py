"""The checks that need a GPU, as tests. `python tests/gpu/drive.py` runs them faster and reports their figures."""

from __future__ import annotations

import json

import pytest
import torch
from gpu.drive import Driver
from gpu.table import CHECKS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_check(check):
    results = []
    Driver([check], cpu=False, deadline=2 * check.limit, tell=results.append).run()
    assert results[0]["ok"], json.dumps(results[0], indent=1)
