"""Settings of accelerate for scripts: how they are merged, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cluster.config import load_cluster
from launch.cluster.resources import Resources
from launch.plan import accelerate
from launch.plan.plan import make_plan
from launch.plan.show import show
from launch.plan.spec import Spec, script_spec, spec_of, with_changes
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths

FILE = """
distributed_type: DEEPSPEED
mixed_precision: 'no'
num_processes: 5
deepspeed_config: {zero_stage: 3, zero3_init_flag: true}
"""


@pytest.fixture
def spec_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make the spec of a script. Accelerate is not asked: its variable holds the config file that it would get."""
    (tmp_path / "train.py").touch()
    (tmp_path / "file.yaml").write_text(FILE)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(accelerate, "_environment", lambda text: {
        "ACCELERATE_TEST": text, **({accelerate.DEEPSPEED_FILE: "ds.json"} if "ds.json" in text else {})})

    def make(*overrides: str, file: str | None = None) -> Spec:
        return script_spec("train.py", [], overrides, cluster=load_cluster("local"), accelerate_file=file)

    return make


def plan(spec: Spec, resources: Resources):
    return make_plan("run", spec, load_cluster("local"), resources, runs=Path("/runs"), python="python", cwd=Path.cwd())


def yaml_of(made) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in made.files["attempts/1/plan/accelerate.yaml"].splitlines())


def test_a_script_without_settings_gets_none(spec_with):
    made = plan(spec_with(), Resources("cuda", 2))
    assert not any(name.startswith("ACCELERATE_") for name in made.env) and made.path is None
    assert yaml_of(made)["distributed_type"] == '"MULTI_GPU"'


def test_the_file_comes_below_the_command_line_and_placement_is_launchs(spec_with):
    made = plan(spec_with("train.strategy=zero2", "train.precision=bf16", file="file.yaml"), Resources("cuda", 8, 2))
    content = yaml_of(made)
    assert json.loads(content["deepspeed_config"]) == {"deepspeed_multinode_launcher": "standard", "zero_stage": 2,
                                                       "zero3_init_flag": True}
    assert (content["mixed_precision"], content["num_processes"], content["num_machines"]) == ('"bf16"', "8", "2")
    assert made.env["ACCELERATE_TEST"] in show(made) and made.path == str(Path.cwd())
    assert "accelerate launch --config_file" in made.equivalent


def test_precision_that_is_not_given_stays_out_of_the_file(spec_with):
    """A DeepSpeed file may set it, and accelerate refuses a precision that is set twice."""
    spec = spec_with("train.strategy=zero2", "accelerate.deepspeed_config.deepspeed_config_file=ds.json")
    made = plan(spec, Resources("cuda", 2))
    assert "mixed_precision" not in yaml_of(made)


def test_a_deepspeed_file_becomes_part_of_the_run(spec_with, tmp_path):
    spec = spec_with("train.strategy=zero2", "accelerate.deepspeed_config.deepspeed_config_file=ds.json")
    (tmp_path / "ds.json").unlink()
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    paths.spec.write_text(spec.text)
    for again in (spec, spec_of(paths)):
        made = plan(again, Resources("cuda", 2))
        name = Path(made.env[accelerate.DEEPSPEED_FILE]).relative_to(made.folder)
        assert json.loads(made.files[str(name)]) == {"zero_optimization": {"stage": 2}}
        assert made.env[accelerate.DEEPSPEED_FILE] in yaml_of(made)["deepspeed_config"]


@pytest.mark.parametrize("overrides, message", [
    (["train.seed=3"], "`train.seed` is a key of tasks, and `train.py` is a script"),
    (["train.precision=tf32"], "`train.precision` is `tf32`, but must be one of"),
    (["accelerate.num_processes=3"], "`accelerate.num_processes` is for launch to set"),
    (["train.precision=bf16", "accelerate.mixed_precision=no"], "`train.precision` and `accelerate.mixed_precision` set the"),
    (["train.strategy=zero2", "accelerate.deepspeed_config.zero_stage=3"], "`train.strategy` and `accelerate.deepspeed_config."),
    (["accelerate.distributed_type=XLA"], "`accelerate.distributed_type` is `XLA`: launch starts ranks on NVIDIA GPUs and CPUs"),
    (["accelerate.compute_environment=AMAZON_SAGEMAKER"], "`accelerate.compute_environment` is `AMAZON_SAGEMAKER`"),
    (["train.strategy=zero2", "accelerate.deepspeed_config.deepspeed_config_file=no/ds.json"], "`ds.json`, which"),
])
def test_what_a_script_cannot_take_is_refused(spec_with, tmp_path, overrides, message):
    (tmp_path / "ds.json").unlink()
    with pytest.raises(UserError) as error:
        spec_with(*overrides)
    assert error.value.message.startswith(message)


@pytest.mark.parametrize("overrides, resources, message", [
    (["train.strategy=zero2"], Resources("cpu", 2), "accelerate's DEEPSPEED needs GPUs"),
    (["train.strategy=fsdp"], Resources("cpu", 2), "accelerate's FSDP needs GPUs"),
    (["train.precision=fp16"], Resources("cpu", 2), "accelerate's fp16 needs GPUs"),
])
def test_settings_that_need_gpus_are_refused_on_cpus(spec_with, overrides, resources, message):
    spec = spec_with(*overrides)
    with pytest.raises(UserError) as error:
        plan(spec, resources)
    assert error.value.message.startswith(message)
    assert plan(spec, Resources("cuda", 2)).env["ACCELERATE_TEST"]


def test_bf16_reaches_cpu_ranks(spec_with):
    made = plan(spec_with("train.precision=bf16"), Resources("cpu", 2))
    assert 'mixed_precision: "bf16"' in made.env["ACCELERATE_TEST"] and made.env["ACCELERATE_USE_CPU"] == "true"


def test_a_scripts_settings_cannot_change_when_it_is_resumed(spec_with):
    with pytest.raises(UserError, match="cannot be set"):
        with_changes(spec_with("train.strategy=zero2"), ["train.strategy=zero3"])


@pytest.mark.slow
def test_accelerate_refuses_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    for word, message, hint in [
        ("accelerate.fsdp_config.fsdp_verion=2", "`accelerate.fsdp_config.fsdp_verion` is not a key of accelerate's config",
         "did you mean `accelerate.fsdp_config.fsdp_version`?"),
        ("accelerate.deepspeed_config.fsdp_offload_params=1",
         "`accelerate.deepspeed_config.fsdp_offload_params` is not a key of accelerate's config",
         "did you mean `accelerate.deepspeed_config.offload_param_device`?"),
        ("accelerate.mixed_precision=bf15", "accelerate refuses its settings: Unknown mixed_precision mode: bf15", None),
    ]:
        with pytest.raises(UserError) as error:
            script_spec("train.py", [], [word], cluster=load_cluster("local"))
        assert error.value.message.startswith(message) and error.value.hint == hint
