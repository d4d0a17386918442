"""The environment that `accelerate launch` gives a script, computed by accelerate itself, in a separate process.

    python -P -m trainers.accelerate_env CONFIG

CONFIG is a config file of accelerate's. The process starts nothing. It prints one JSON object on its last line:

    env      the variables that `accelerate launch --config_file CONFIG` would add
    error    instead: what is wrong with the config, with `message` and `hint`
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace

from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import check_cuda_p2p_ib_support, is_deepspeed_available
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from trainers.config.nearest import nearest_keys
from trainers.config.yaml12 import read
from trainers.contract import exit_codes
from trainers.contract.errors import UserError

# What accelerate puts before the keys of these sections of a config file to find its options.
PREFIXES = {"fsdp_config": "fsdp", "fp8_config": "fp8", "dynamo_config": "dynamo", "megatron_lm_config": "megatron_lm",
            "parallelism_config": "parallelism_config"}
OLD_KEYS = ("fp16", "dynamo_backend")  # accelerate still takes these, although its config class has no such fields
OWN = ("OMP_NUM_THREADS", "PYTHONPATH")  # launch sets these itself


def environment(file: str) -> dict[str, str]:
    """Return the variables that `accelerate launch --config_file FILE` would add to the environment of a script.

    Raises:
        UserError: a key is unknown, or accelerate refuses the values.
    """
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_"))]:
        del os.environ[name]  # accelerate would read some of them, and what it sets to the same value would not count as added
    parser = launch_command_parser()
    options = parser.parse_args(["--config_file", file, "script.py"])
    _check_keys(file, options)
    try:
        args, defaults, precision_from_file = _validate_launch_command(options)
        args.main_process_port = 0  # no port is opened: only the check whether a port is free is passed over
        if args.use_deepspeed:
            if not is_deepspeed_available():
                raise ValueError("DeepSpeed is not installed")
            fields = [*defaults.deepspeed_config, *(["mixed_precision"] if precision_from_file else [])]
            args.deepspeed_fields_from_accelerate_config = ",".join(fields)
            _, env = prepare_deepspeed_cmd_env(args)
        else:
            env = prepare_multi_gpu_env(args)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"accelerate refuses its settings: {' '.join(str(error).split())}") from error
    if not check_cuda_p2p_ib_support():
        env = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1", **env}
    return {key: value for key, value in env.items() if os.environ.get(key) != value and key not in OWN}


def _check_keys(file: str, options: Namespace) -> None:
    """Refuse keys that accelerate does not have. Accelerate itself ignores unknown keys inside a section.

    Raises:
        UserError: a key is unknown.
    """
    with open(file, encoding="utf-8") as text:
        values = read(text.read(), file).value
    fields = [*ClusterConfig.__dataclass_fields__, *OLD_KEYS]
    for section, value in values.items():
        if section not in fields:
            raise _unknown(section, fields)
        if isinstance(value, dict) and section != "mpirun_config":
            prefix = PREFIXES.get(section, "")
            others = tuple(other for other in PREFIXES.values() if other != prefix)  # options of other sections
            names = [name for name in vars(options) if name.startswith(prefix) and not name.startswith(others)]
            for key in value:
                if key not in names and f"{prefix}_{key}" not in names:
                    raise _unknown(f"{section}.{key}", [f"{section}.{name}" for name in names])


def _unknown(key: str, known: list[str]) -> UserError:
    near = nearest_keys(key, known)
    return UserError(f"`accelerate.{key}` is not a key of accelerate's config",
                     f"did you mean `accelerate.{near[0]}`?" if near else "`accelerate config` asks for all of them")


def main(argv: list[str]) -> int:
    try:
        result: dict[str, object] = {"env": environment(argv[0])}
    except UserError as error:
        result = {"error": {"message": error.message, "hint": error.hint}}
    print(json.dumps(result))
    return exit_codes.FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
