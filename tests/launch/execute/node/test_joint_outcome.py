"""How the outcomes of several nodes become the outcome of an attempt. No node process is started."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import pytest

from launch.execute.node.forensics import joint_outcome
from launch.supervise.rank import Failure, Outcome

PLAN = SimpleNamespace(grace_s=0.0, batch="x", folder="nowhere", attempt=1, resources=SimpleNamespace(node_of=lambda rank: rank))


@pytest.mark.parametrize("mine, other, expected", [
    (Outcome("finished", checkpoint_s=2.0), Outcome("finished", checkpoint_s=30.0), ("finished", 30.0)),
    (Outcome("finished"), Outcome("finished", checkpoint_s=30.0), ("finished", 30.0)),
    (Outcome("preempted", checkpoint_s=2.0), Outcome("finished"), ("preempted", 2.0)),
    (Outcome("ended"), Outcome("failed", Failure(1, 1, None, "x", None, None, True), checkpoint_s=3.0), ("failed", 3.0)),
    (Outcome("finished"), Outcome("finished"), ("finished", None)),
])
def test_the_slowest_checkpoint_may_be_of_any_node(mine, other, expected):
    received = [{"node": 1, "ended": asdict(other)}]
    if other.failure:
        received.append({"node": 1, "failure": other.failure.as_dict()})
    group = SimpleNamespace(received=received, links={1: SimpleNamespace(open=True)})
    found = joint_outcome(mine, group, PLAN, ["n1", "n2"])
    assert (found.kind, found.checkpoint_s) == expected
