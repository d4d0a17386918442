"""A job of many nodes, all of them on this host."""

from __future__ import annotations

import json
import os
import time
from datetime import datetime
from pathlib import Path

import pytest
from conftest import attempt, record, wait_until
from slurm.cluster import cluster, outside
from slurm.conftest import LoginCommand, write_cluster

NODES = 32

# It only meets the others and sums once.
SUM = """
import os, time
import torch
import torch.distributed as dist
from datetime import timedelta
loaded = time.time()
dist.init_process_group("gloo", timeout=timedelta(minutes=8))
met = time.time()
one = torch.ones(1)
dist.all_reduce(one)
dist.destroy_process_group()
print(f"{loaded} {met} {time.time()} {int(one)}", flush=True)
"""


@pytest.mark.slow
def test_32_nodes_of_a_rank_each(needs_slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in set(os.environ) - set(outside(os.environ)):
        monkeypatch.delenv(name)
    (tmp_path / "work.py").write_text(SUM)
    write_cluster(tmp_path, gpus_per_node=None, cpus_per_node=1)
    began = time.time()
    with cluster(nodes=NODES, gpus=0, cpus=1) as slurm:
        up = time.time()
        launch = LoginCommand(tmp_path, slurm)
        done = launch("work.py", "--procs", NODES, "--cluster", "here", "--json", "run.max_restarts=0")
        assert done.returncode == 0, done.stderr
        submitted, said = time.time(), json.loads(done.stdout)
        run = Path(said["path"])
        wait_until(lambda: record(run)["state"] in ("finished", "failed"), timeout_s=480)
        ended = time.time()
        first = attempt(run, 1)
        assert record(run)["state"] == "finished", first["failure"]
        slurm.wait(said["jobs"][0], "COMPLETED", timeout_s=60)
        gone = time.time()
    assert first["nodes"] == [f"n{i + 1}" for i in range(NODES)] and record(run)["attempt"] == 1
    ranks = [[float(word) for word in (run / f"attempts/1/logs/{rank}.log").read_text().split()[-4:]] for rank in range(NODES)]
    assert [rank[3] for rank in ranks] == [NODES] * NODES
    loaded, met, summed = (max(rank[i] for rank in ranks) for i in range(3))
    times = {"its job's id was said": submitted, "all node processes had met": datetime.fromisoformat(first["began"]).timestamp(),
             "every rank had loaded torch": loaded, "all ranks had met": met, "all had summed": summed,
             "the run was finished": ended, "its job was over": gone}
    print(f"{NODES} nodes were up in {up - began:.1f} s. After the command")
    for what, when in times.items():
        print(f"{when - up:6.1f} s  {what}")
