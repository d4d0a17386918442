"""The same scripts under torchrun, `accelerate launch` and `launch`: the same environment, and the same training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Command, environment

from launch.cluster.config import load_cluster
from launch.cluster.resources import Resources
from launch.plan.accelerate import DEEPSPEED_FILE
from launch.plan.plan import Plan, make_plan
from launch.plan.spec import script_spec
from launch.supervise.port import reserved_port

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
NOTE = "import json, os\njson.dump(dict(os.environ), open(f\"{os.environ['SEEN']}.{os.environ['RANK']}.json\", 'w'))\n"

MODEL = """
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = torch.utils.data.TensorDataset(torch.randn(64, 16), torch.randint(4, (64,)))
"""
SCRIPTS = {
    "plain": NOTE + MODEL + """
import torch.distributed as dist
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(model)
sampler = torch.utils.data.DistributedSampler(data, seed=3)
loader, backward, first = torch.utils.data.DataLoader(data, 8, sampler=sampler), torch.Tensor.backward, dist.get_rank() == 0
""",
    "accelerate": NOTE + MODEL + """
from accelerate import Accelerator
accelerator = Accelerator()
model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(data, 8, shuffle=True))
backward, first = accelerator.backward, accelerator.is_main_process
print("precision", accelerator.mixed_precision, accelerator.num_processes, accelerator.distributed_type)
""",
}
TRAIN = """
for step, (x, y) in enumerate(loader):
    loss = torch.nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    backward(loss)
    optimizer.step()
    if first:
        print("step", step, loss.item().hex(), flush=True)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""

# What `launch` sets differently from torchrun, or not at all, and why.
DIFFERENT = {
    "TORCHELASTIC_RUN_ID": "the run's id instead of a random one",
    "TORCHELASTIC_USE_AGENT_STORE": "False: rank 0 opens the store, because launch has none",
    "MASTER_ADDR": "an address instead of a name that might not resolve",
    "MASTER_PORT": "any free port",
}
MISSING = {
    "TORCHELASTIC_ERROR_FILE": "launch reads a rank's traceback from its log",
    "TORCHELASTIC_SIGNALS_TO_HANDLE": "for torchrun's agent",
}
ADDED = {
    "LAUNCH_RUN_DIR": "the run's folder, for checkpoints", "LAUNCH_ATTEMPT": "which attempt this is",
    "GLOO_SOCKET_IFNAME": "on one node gloo needs no name of the host, which might not resolve",
    "ACCELERATE_USE_CPU": "CPU ranks were asked for, also where there is a GPU",
}
# What `accelerate launch` adds without any settings: accelerate's own defaults.
DEFAULTS = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default",
            "ACCELERATE_DYNAMO_USE_DYNAMIC": "False", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
            "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False"}


def seen(folder: Path, name: str, rank: int = 1) -> dict[str, str]:
    return json.loads((folder / f"{name}.{rank}.json").read_text())


def run(folder: Path, *words: str, **env: str) -> str:
    """Run another launcher and return its output. A rank of these now and then aborts as it exits: then the run is repeated."""
    for attempt in range(3):
        done = subprocess.run(words, cwd=folder, env=environment(**env), capture_output=True, text=True, timeout=200)
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_script_sees_and_trains_the_same_under_every_launcher(launch: Command, kind: str) -> None:
    folder = launch.folder
    (folder / "train.py").write_text(SCRIPTS[kind] + TRAIN)
    common = {"OMP_NUM_THREADS": "1"}  # otherwise launch gives a rank its share of the cores, and the others one thread
    outputs = {
        "torchrun": run(folder, *TORCHRUN, "--nproc-per-node", "2", "train.py", SEEN="torchrun", **common,
                        ACCELERATE_USE_CPU="true"),
        # accelerate starts several CPU ranks itself only through MPI.
        "accelerate": run(folder, *ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "train.py",
                          SEEN="accelerate", **common, ACCELERATE_USE_CPU="true"),
    }
    done = launch("train.py", "--procs", 2, SEEN="launch", **common)
    assert done.returncode == 0, done.stderr
    outputs["launch"] = done.stdout
    lines = {name: [line for line in text.splitlines() if line.startswith(("step", "precision"))][-4:]
             for name, text in outputs.items()}
    assert len(lines["launch"]) == 4 and lines["launch"] == lines["torchrun"] == lines["accelerate"]

    ours, torchrun, accelerate = (seen(folder, name) for name in ("launch", "torchrun", "accelerate"))
    torchrun.pop("ACCELERATE_USE_CPU")
    assert torchrun.keys() - ours.keys() == MISSING.keys()
    assert ours.keys() - torchrun.keys() == ADDED.keys()
    assert {name for name in ours.keys() & torchrun.keys() if ours[name] != torchrun[name]} == DIFFERENT.keys() | {"SEEN"}
    assert {name: accelerate[name] for name in accelerate.keys() - torchrun.keys() - {"ACCELERATE_USE_CPU"}} == DEFAULTS


# Settings of accelerate

FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: bf16
num_processes: 2
num_machines: 1
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: Block,Head
  fsdp_state_dict_type: SHARDED_STATE_DICT
"""
DEEPSPEED = """
distributed_type: DEEPSPEED
num_processes: 2
num_machines: {nodes}
same_network: true
deepspeed_config:
  deepspeed_config_file: ds.json
  deepspeed_multinode_launcher: standard
  zero3_init_flag: true
"""
DS = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}


def plan_of(folder: Path, nodes: int, file: str | None, *overrides: str) -> Plan:
    cluster = load_cluster("local")
    spec = script_spec("show.py", [], overrides, cluster=cluster, accelerate_file=file)
    return make_plan("run", spec, cluster, Resources("cuda", 2, nodes), runs=folder / "runs", python=sys.executable, cwd=folder)


def compare(plan: Plan, node: int, local_rank: int, theirs: dict[str, str]) -> None:
    """Compare variable by variable what a rank gets from the plan and from `accelerate launch`."""
    ours = {**plan.env, **plan.rank_env(node, local_rank, theirs["MASTER_ADDR"], theirs["MASTER_PORT"])}
    if DEEPSPEED_FILE in theirs:
        name = Path(ours[DEEPSPEED_FILE]).relative_to(plan.folder)
        assert json.loads(plan.files[str(name)]) == DS
        theirs[DEEPSPEED_FILE] = ours[DEEPSPEED_FILE]
    settings = [{name: env[name] for name in env if name.startswith(("ACCELERATE_", "FSDP_", "NCCL_"))} for env in (ours, theirs)]
    assert settings[0] == settings[1]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK")
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


@pytest.mark.slow
def test_accelerates_settings_reach_a_script_as_under_accelerate_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "show.py").write_text(NOTE)
    (tmp_path / "ds.json").write_text(json.dumps(DS))
    (tmp_path / "fsdp.yaml").write_text(FSDP)
    (tmp_path / "two.yaml").write_text(DEEPSPEED.format(nodes=2))

    # On one node, by a key of ours: the config file of the plan gives the same.
    plan = plan_of(tmp_path, 1, None, "train.strategy=zero2", "train.precision=bf16",
                   "accelerate.deepspeed_config.gradient_clipping=0.5")
    (text,) = [text for name, text in plan.files.items() if name.endswith("accelerate.yaml")]
    (tmp_path / "plan.yaml").write_text(text)
    run(tmp_path, *ACCELERATE, "--config_file", "plan.yaml", "--main_process_port", "0", "show.py", SEEN="plan")
    assert plan.env["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2" and plan.env["ACCELERATE_GRADIENT_CLIPPING"] == "0.5"
    assert plan.path == seen(tmp_path, "plan")["PYTHONPATH"].split(":")[-1] == str(tmp_path)
    for rank in (0, 1):
        compare(plan, 0, rank, seen(tmp_path, "plan", rank))

    # On one node, by a file, one key of which the command line overrides.
    run(tmp_path, *ACCELERATE, "--config_file", "fsdp.yaml", "--fsdp_offload_params", "true", "--main_process_port", "0",
        "show.py", SEEN="fsdp")
    plan = plan_of(tmp_path, 1, "fsdp.yaml", "accelerate.fsdp_config.fsdp_offload_params=true")
    assert plan.env["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "Block,Head" and plan.env["FSDP_OFFLOAD_PARAMS"] == "true"
    compare(plan, 0, 1, seen(tmp_path, "fsdp"))

    # On two nodes, by a file that names a DeepSpeed file.
    with reserved_port() as port:
        words = [*ACCELERATE, "--config_file", "two.yaml", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    nodes = [subprocess.Popen([*words, "--machine_rank", str(node), "show.py"], cwd=tmp_path, env=environment(SEEN="two"))
             for node in (0, 1)]
    assert [process.wait(timeout=200) for process in nodes] == [0, 0]
    plan = plan_of(tmp_path, 2, "two.yaml")
    for node in (0, 1):
        compare(plan, node, 0, seen(tmp_path, "two", node))
