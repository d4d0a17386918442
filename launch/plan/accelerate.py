"""Settings of accelerate for a script: its config file, and the variables and the DeepSpeed file that a script gets from them.

A script that uses accelerate takes these settings only from its environment, as `accelerate launch` sets it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.contract.errors import UserError
from trainers.contract.home import expanded

if TYPE_CHECKING:
    from launch.cluster.resources import Resources
    from trainers.config.schema import ScriptConfig

# Keys of accelerate's config that say which processes run where, and the option of launch that says it instead. The values in a
# config file are ignored.
PLACEMENT = {
    **dict.fromkeys(("num_processes", "use_cpu"), "--gpus N or --procs N"), "num_machines": "--nodes N",
    "gpu_ids": "the variable CUDA_VISIBLE_DEVICES",
    **dict.fromkeys(("machine_rank", "main_process_ip", "main_process_port", "rdzv_backend", "same_network"), "--nodes N"),
}
# How accelerate spreads a model. Of the other types, launch starts no ranks (TPUs, for example).
PLAIN, SHARDED = ("NO", "MULTI_GPU", "MULTI_CPU"), ("DEEPSPEED", "FSDP", "MEGATRON_LM")
DEEPSPEED_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"


def has_settings(config: ScriptConfig) -> bool:
    """Return whether a script gets settings of accelerate."""
    return bool(config.accelerate) or config.train.strategy is not None or config.train.precision is not None


def check_words(overrides: Sequence[str]) -> None:
    """Check the keys of a command line that set something of accelerate.

    Raises:
        UserError: a key is launch's to set, or two keys set the same thing.
    """
    keys = [override.partition("=")[0] for override in overrides]
    for key in keys:
        if option := PLACEMENT.get(key.removeprefix("accelerate.")) if key.startswith("accelerate.") else None:
            raise UserError(f"`{key}` is for launch to set", f"use {option}")
    for ours, theirs in (("train.precision", "accelerate.mixed_precision"), ("train.strategy", "accelerate.distributed_type"),
                         ("train.strategy", "accelerate.deepspeed_config.zero_stage")):
        if ours in keys and theirs in keys:
            raise UserError(f"`{ours}` and `{theirs}` set the same thing", "keep one")


def settings(config: ScriptConfig) -> dict[str, Any]:
    """Return the settings as the content of accelerate's config file, without the keys that say which processes run where."""
    values = {key: value for key, value in config.accelerate.items() if key not in PLACEMENT}
    values.setdefault("distributed_type", "MULTI_GPU")
    if config.train.precision is not None:
        values["mixed_precision"] = {"fp32": "no"}.get(config.train.precision, config.train.precision)
    match config.train.strategy:
        case "ddp":
            values["distributed_type"] = "MULTI_GPU"
        case "fsdp":
            values |= {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, **values.get("fsdp_config", {})}}
        case str(zero):
            deepspeed = {"deepspeed_multinode_launcher": "standard", **values.get("deepspeed_config", {})}
            values |= {"distributed_type": "DEEPSPEED",
                       "deepspeed_config": {**deepspeed, "zero_stage": int(zero.removeprefix("zero"))}}
    return values


def resolve(config: ScriptConfig) -> dict[str, Any]:
    """Return the variables that accelerate sets from the settings, and its DeepSpeed file, as values of the script's spec.

    Raises:
        UserError: accelerate does not take the settings, or launch cannot start what they describe.
    """
    values = settings(config)
    kind = values["distributed_type"]
    if kind not in PLAIN + SHARDED:
        raise UserError(f"`accelerate.distributed_type` is `{kind}`: launch starts ranks on NVIDIA GPUs and CPUs",
                        f"use one of {', '.join(PLAIN + SHARDED)}")
    if (where := values.get("compute_environment", "LOCAL_MACHINE")) != "LOCAL_MACHINE":
        raise UserError(f"`accelerate.compute_environment` is `{where}`, where launch starts nothing", "use LOCAL_MACHINE")
    if config.accelerate.get("gpu_ids", "all") not in ("all", None):
        raise UserError(f"`gpu_ids` in accelerate's config is `{config.accelerate['gpu_ids']}`: launch takes GPUs from the "
                        "environment", "remove it there, and set CUDA_VISIBLE_DEVICES")
    env = dict(_environment(config_file(values, 2, 1)))
    deepspeed = None
    if kind == "DEEPSPEED" and (file := env.get(DEEPSPEED_FILE)):
        try:  # now, while relative paths are still right
            deepspeed = json.loads(expanded(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"`{file}`, which `deepspeed_config_file` names, cannot be read: {error}",
                            "give the path of a JSON file") from None
    if kind == "DEEPSPEED" and config.path is None:  # accelerate adds the working folder to PYTHONPATH, for DeepSpeed only
        return {"accelerate_env": env, "deepspeed": deepspeed, "path": str(Path.cwd())}
    return {"accelerate_env": env, "deepspeed": deepspeed}


def config_file(values: Mapping[str, Any], ranks: int, nodes: int) -> str:
    """Return the text of a config file of accelerate's with these settings, for this number of ranks and nodes."""
    kind = values["distributed_type"]
    values = {
        "compute_environment": "LOCAL_MACHINE",
        **values,
        "distributed_type": kind if kind in SHARDED else "MULTI_GPU" if ranks > 1 else "NO",
        "num_machines": nodes,
        "num_processes": ranks,
        "machine_rank": 0,
        "use_cpu": False,
        "main_training_function": "main",
        "rdzv_backend": "static",
        "same_network": True,
    }
    if nodes > 1 and kind == "DEEPSPEED":  # other launchers of DeepSpeed's need ssh
        values["deepspeed_config"] = {**values.get("deepspeed_config", {}), "deepspeed_multinode_launcher": "standard"}
    # JSON values are YAML.
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())


def check_device(config: ScriptConfig, resources: Resources) -> None:
    """Check that the ranks can work with the settings.

    Raises:
        UserError: they need GPUs, and the ranks have none; or the ranks have GPUs and the settings say `use_cpu`.
    """
    if resources.device != "cpu":
        if config.accelerate.get("use_cpu") is True:
            raise UserError("`use_cpu` in accelerate's config is true, but the ranks get GPUs",
                            "use --procs N, or remove it there")
        return
    values = settings(config)
    needs = None
    if values["distributed_type"] in SHARDED:
        needs = f"accelerate's {values['distributed_type']} needs"
    elif values.get("mixed_precision") in ("fp16", "fp8"):
        needs = f"accelerate's {values['mixed_precision']} needs"
    if needs:
        raise UserError(f"{needs} GPUs, and these ranks run on CPUs",
                        "use --gpus N; on CPUs, accelerate has train.strategy=ddp, and train.precision=fp32 or bf16")


@lru_cache
def _environment(config_text: str) -> Mapping[str, str]:
    """Ask accelerate which variables it sets. Raises: UserError."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "accelerate.yaml"
        file.write_text(config_text, encoding="utf-8")
        asked = subprocess.run([sys.executable, "-P", "-m", "trainers.accelerate_env", str(file)], capture_output=True, text=True)
    try:
        result = json.loads(asked.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (asked.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise UserError(f"accelerate cannot be asked for its environment: {last}",
                        f"is accelerate installed for {sys.executable}?") from None
    if error := result.get("error"):
        raise UserError(error["message"], error["hint"])
    return result["env"]
