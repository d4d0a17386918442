"""The private parts of libraries that this project uses, each with what needs it. pyproject.toml keeps these libraries below
the next release that may change them; a test that fails here says what a newer release broke."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


@pytest.mark.parametrize("name", ["accelerate", "deepspeed", "submitit", "wandb", "scikit-learn"])
def test_a_library_whose_private_parts_are_used_has_an_upper_bound(name: str) -> None:
    (need,) = re.findall(rf'^ *"({name}[^"]*)"', PYPROJECT.read_text(), re.MULTILINE)
    bounds = {specifier.operator for specifier in Requirement(need).specifier}
    assert bounds == {">=", "<"} and Requirement(need).specifier.contains(metadata.version(name))


def test_submitit_renders_a_job_script() -> None:
    """launch/plan/job_script.py renders with `_make_sbatch_string`."""
    from submitit.slurm.slurm import _make_sbatch_string

    takes = inspect.signature(_make_sbatch_string).parameters
    for name in ("command", "folder", "job_name", "time", "wckey", "nodes", "ntasks_per_node", "signal_delay_s",
                 "stderr_to_stdout", "map_count", "additional_parameters", "setup", "teardown", "srun_args"):
        assert name in takes, f"submitit's `_make_sbatch_string` has no parameter `{name}` any more"
    script = _make_sbatch_string(command="run", folder="/runs", job_name=None, time=None, wckey=None, signal_delay_s=90,
                                 additional_parameters={"requeue": True}, srun_args=["--mpi=none"], stderr_to_stdout=True)
    for line in ("#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=USR2@90"):
        assert line in script.splitlines(), f"submitit's script has no line `{line}` any more"
    assert re.search(r"^srun .*--mpi=none run$", script, re.MULTILINE), "submitit's script does not end with srun any more"


def test_accelerate_computes_the_environment_of_a_script() -> None:
    """trainers/accelerate_env.py does what accelerate's `launch_command` does before it starts a script."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    assert list(inspect.signature(launch._validate_launch_command).parameters) == ["args"]
    assert hasattr(launch, "launch_command_parser")
    for prepare in (prepare_deepspeed_cmd_env, prepare_multi_gpu_env):
        assert list(inspect.signature(prepare).parameters) == ["args"], f"accelerate's `{prepare.__name__}` takes other arguments"


def test_wandb_keeps_its_file_format(tmp_path: Path) -> None:
    """trainers/engine/tracking/wandb_run.py reads W&B's own offline files, to know which steps it has written."""
    from wandb.proto.wandb_internal_pb2 import Record

    kinds = {field.name for field in Record.DESCRIPTOR.oneofs_by_name["record_type"].fields}
    assert {"history", "run"} <= kinds, "a record of W&B's file is no `history` or `run` any more"
    history = Record().history
    assert hasattr(history.step, "num"), "W&B's history has no `step.num` any more"
    code = ("import sys, wandb\nrun = wandb.init(mode='offline', dir=sys.argv[1], id='r', project='p', resume='allow',\n"
            "    settings=wandb.Settings(console='off', silent=True, init_timeout=30))\n"
            "[run.log({'loss': float(step)}, step=step) for step in range(1, 6)]\nrun.mark_preempting()\n"
            "run.finish(exit_code=75)")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, timeout=120)
    from trainers.engine.tracking.wandb_run import offline_records

    (file,) = tmp_path.glob("wandb/offline-run-*/run-r.wandb")
    steps = [record.history.step.num for record in offline_records(file) if record.WhichOneof("record_type") == "history"]
    assert steps == [1, 2, 3, 4, 5], "W&B's offline file cannot be read as LevelDB's log format any more"


DEEPSPEED = """
import os, sys, torch
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
from torch import distributed, nn
from trainers.config import RunConfig
from trainers.engine.groups import grouped
from trainers.engine.parallel.strategy import make_strategy
from trainers.engine.world import World
distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=0, world_size=1)
started = []
sys.addaudithook(lambda event, args: started.append(str(args[0])) if event == "subprocess.Popen" else None)
config = RunConfig(name="r", task="m:T", train={"steps": 1, "batch_size": 2, "strategy": sys.argv[1]}, optim={"name": "adamw"})
strategy = make_strategy(World(0, 1, 0, 1, torch.device("cpu")), config)
model = nn.Linear(4, 2)
sharded = strategy.shard(strategy.place(model), config.optim, grouped(model, config.optim, ()))
optimizer, parameter = sharded.engine.optimizer, next(model.parameters())
parts = {
    1: (("optimizer", "single_partition_of_fp32_groups", "bit16_groups", "update_lp_params", "_update_model_bit16_weights",
         "_global_grad_norm", "loss_scaler", "overflow"), ("_hp_mapping",)),
    3: (("optimizer", "fp32_partitioned_groups_flat", "grad_position", "get_param_id", "persistent_parameters",
         "_reassign_or_swap_out_partitioned_parameters", "checkpoint_event_prologue", "_global_grad_norm", "loss_scaler",
         "overflow"),
        ("ds_numel", "ds_shape", "ds_tensor")),
}[int(sys.argv[1][-1])]
missing = [f"optimizer.{name}" for name in parts[0] if not hasattr(optimizer, name)]
missing += [f"parameter.{name}" for name in parts[1] if not hasattr(parameter, name)]
missing += ["loss_scaler.cur_scale"] * (not hasattr(optimizer.loss_scaler, "cur_scale"))
missing += ["engine.set_gradient_accumulation_boundary"] * (not hasattr(sharded.engine, "set_gradient_accumulation_boundary"))
missing += ["engine.tput_timer"] * (not hasattr(sharded.engine, "tput_timer"))
print("missing:", *missing)
print("started:", *started)
print("timer:", sharded.engine.tput_timer.config.enabled)
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_deepspeed_keeps_its_partitions_where_they_are(strategy: str, tmp_path: Path) -> None:
    """trainers/engine/parallel/zero.py reads and writes the flat partitions of DeepSpeed's optimizers, for checkpoints."""
    done = subprocess.run([sys.executable, "-c", DEEPSPEED, strategy, str(tmp_path / "store")], capture_output=True, text=True,
                          timeout=180)
    assert done.returncode == 0, done.stderr
    missing, started, timer = done.stdout.splitlines()[-3:]
    version = metadata.version("deepspeed")
    assert missing == "missing:", f"DeepSpeed {version} has no such part any more: {missing}"
    assert started == "started:", f"DeepSpeed {version} starts programs (a compiler, if there is a GPU): {started}"
    assert timer == "timer: False", f"the throughput timer of DeepSpeed {version} is on, and waits for the GPU"


@pytest.mark.parametrize("module, names, used_by", [
    ("sklearn.model_selection._validation", ["_fit_and_score", "_score"], "fitting.py"),
    ("sklearn.model_selection._search", ["_insert_error_scores", "_warn_or_raise_about_fit_failures"], "search.py"),
    ("sklearn.utils.validation", ["_check_method_params", "_num_samples"], "search.py"),
    ("sklearn.metrics._scorer", ["_BaseScorer", "_MultimetricScorer", "_PassthroughScorer"], "equivalence.py"),
    ("sklearn.utils", ["_safe_indexing"], "folds.py"),
    ("sklearn.base", ["_fit_context"], "search.py"),
])
def test_scikit_learn_keeps_the_parts_that_the_forest_search_uses(module: str, names: list[str], used_by: str) -> None:
    found = vars(import_module(module))
    missing = [name for name in names if name not in found]
    assert not missing, f"`{module}` has no {missing} any more, which trainers/forest/{used_by} uses"
