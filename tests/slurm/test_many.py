"""A job on 32 nodes. All nodes are on this host."""

from __future__ import annotations

import json
import os
import time
from datetime import datetime
from pathlib import Path

import pytest
from conftest import attempt, record, wait_until
from slurm.cluster import cluster, without_slurm_variables
from slurm.conftest import LoginCommand, write_cluster

NODES = 32

# Each rank joins the process group and does one all-reduce.
SUM = """
import os, time
import torch
import torch.distributed as dist
from datetime import timedelta
loaded = time.time()
dist.init_process_group("gloo", timeout=timedelta(minutes=8))
joined = time.time()
summed = torch.ones(1)
dist.all_reduce(summed)
dist.destroy_process_group()
print(f"{loaded} {joined} {time.time()} {int(summed)}", flush=True)
"""


@pytest.mark.slow
def test_32_nodes_with_one_rank_each(needs_slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in set(os.environ) - set(without_slurm_variables(os.environ)):
        monkeypatch.delenv(name)
    (tmp_path / "work.py").write_text(SUM)
    write_cluster(tmp_path, gpus_per_node=None, cpus_per_node=1)
    started = time.time()
    with cluster(nodes=NODES, gpus=0, cpus=1) as slurm:
        up = time.time()
        launch = LoginCommand(tmp_path, slurm)
        done = launch("work.py", "--procs", NODES, "--cluster", "here", "--json", "run.max_restarts=0")
        assert done.returncode == 0, done.stderr
        submitted, output = time.time(), json.loads(done.stdout)
        run = Path(output["path"])
        wait_until(lambda: record(run)["state"] in ("finished", "failed"), timeout_s=480)
        ended = time.time()
        first = attempt(run, 1)
        assert record(run)["state"] == "finished", first["failure"]
        slurm.wait(output["jobs"][0], "COMPLETED", timeout_s=60)
        job_ended = time.time()
    assert first["nodes"] == [f"n{i + 1}" for i in range(NODES)] and record(run)["attempt"] == 1
    ranks = [[float(word) for word in (run / f"attempts/1/logs/{rank}.log").read_text().split()[-4:]] for rank in range(NODES)]
    assert [rank[3] for rank in ranks] == [NODES] * NODES
    loaded, joined, summed = (max(rank[i] for rank in ranks) for i in range(3))
    times = {"the command had printed the job id": submitted,
             "all node processes had joined": datetime.fromisoformat(first["began"]).timestamp(),
             "all ranks had loaded torch": loaded, "all ranks had joined the process group": joined,
             "all ranks had done the all-reduce": summed, "the run had finished": ended, "the job had ended": job_ended}
    print(f"{NODES} nodes were up in {up - started:.1f} s. After the start of the command:")
    for event, moment in times.items():
        print(f"{moment - up:6.1f} s  {event}")
