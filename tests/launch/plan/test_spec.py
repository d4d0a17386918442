"""Specs: their layers, the origins of values, the errors in wrong specs, and a user's own modules."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

import pytest
from made import make_run

from launch.cluster.config import ClusterConfig, load_cluster
from launch.plan import spec as specs
from launch.plan.spec import Spec, load_spec, schema, script_spec, show
from trainers.config import yaml12
from trainers.config.schema import RunConfig
from trainers.config.spec import read_run, read_spec, resolve
from trainers.contract.errors import UserError
from trainers.contract.paths import RunPaths

HERE = ClusterConfig(name="here")
TASK = """\
# A task
task: trainers.engine.task:Task
train:
  epochs: 2
optim:
  lr: 1e-2
"""
FREE = "model: {}\ndata: {}\n"  # sections that take any key
names = (f"user_module_{number}" for number in count())  # a process imports a module of one name only once


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, which contains a task."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "my.yaml").write_text(TASK)
    return tmp_path


def load(*overrides: str, file: str = "my.yaml", cluster: ClusterConfig = HERE, config_file: str | None = None,
         **environment: str) -> Spec:
    return load_spec(file, overrides, cluster=cluster, environment=environment, config_file=config_file)


def error_of(*overrides: str, **more) -> str:
    """Return the error that a wrong spec gives."""
    with pytest.raises(UserError) as caught:
        load(*overrides, **more)
    text = str(caught.value)
    assert len(text.splitlines()) <= 2
    return text


# Layers


def test_a_later_layer_wins_and_is_the_origin(folder: Path) -> None:
    def project(**more) -> tuple[str, str]:
        spec = load(*more.pop("overrides", ()), **more)
        assert spec.config.wandb.project == spec.values["wandb"]["project"]
        return spec.config.wandb.project, spec.origins["wandb.project"]

    assert project() == ("launch", "default")
    (folder / "my.yaml").write_text(TASK + "wandb: {project: a}\n")
    assert project() == ("a", "my.yaml:7")
    layers = {"cluster": ClusterConfig(name="c", defaults={"wandb": {"project": "b"}})}
    assert project(**layers) == ("b", "cluster c")
    layers["WANDB_PROJECT"] = "c"
    assert project(**layers) == ("c", "environment WANDB_PROJECT")
    (folder / "over.yaml").write_text("wandb:\n  project: d\n")
    layers["config_file"] = "over.yaml"
    assert project(**layers) == ("d", "over.yaml:2")
    assert project(**layers, overrides=["wandb.project=e"]) == ("e", "command line")


def test_layers_merge_key_by_key(folder: Path) -> None:
    (folder / "my.yaml").write_text(TASK + FREE)
    (folder / "over.yaml").write_text("optim: {name: sgd}\nmodel: {a: {b: 1, c: 2}}\noptim.momentum: 0.5\ntrain: {}\n")
    spec = load("model.a.b=3", "model.d={e: [1, x]}", config_file="over.yaml")
    assert spec.config.model == {"a": {"b": 3, "c": 2}, "d": {"e": [1, "x"]}}
    assert (spec.config.optim.name, spec.config.optim.lr, spec.config.optim.momentum) == ("sgd", 0.01, 0.5)
    assert spec.origins["model.a.c"] == "over.yaml:2"
    assert load("model.a=1", config_file="over.yaml").config.model == {"a": 1}
    assert "`optim={}` changes nothing" in error_of("optim={}")


def test_a_later_layer_may_set_the_alternative_key(folder: Path) -> None:
    spec = load("train.steps=5")
    assert (spec.config.train.steps, spec.config.train.epochs) == (5, None)
    (folder / "over.yaml").write_text("train.steps: 7\n")
    assert load("train.epochs=0.5", config_file="over.yaml").config.train.epochs == 0.5
    assert (load("train.batch_tokens=9").config.train.batch_size, load().config.train.batch_tokens) == (None, None)
    assert "both `train.epochs` and `train.steps`" in error_of("train.steps=1", "train.epochs=1")
    (folder / "over.yaml").write_text("train:\n  steps: 7\n  epochs: 1\n")
    assert "(over.yaml:3, over.yaml:2)" in error_of(config_file="over.yaml")


@pytest.mark.parametrize("environment, mode", [
    ({"WANDB_MODE": "online"}, "online"), ({"WANDB_MODE": "disabled"}, "off"), ({"WANDB_DISABLED": "true"}, "off"),
    ({"WANDB_DISABLED": "false"}, "offline"), ({"WANDB_MODE": "online", "WANDB_DISABLED": "1"}, "off"),
    ({"WANDB_MODE": ""}, "offline"), ({"WANDB_MODE": "dryrun"}, "offline"), ({"WANDB_MODE": "run"}, "online"),
])
def test_wandb_variables(folder: Path, environment: dict[str, str], mode: str) -> None:
    (folder / "my.yaml").write_text(TASK + "wandb: {mode: offline}\n")
    assert load(**environment).config.wandb.mode == mode


def test_an_alias_of_a_mapping_is_a_value_like_any_other(folder: Path) -> None:
    (folder / "my.yaml").write_text("task: trainers.engine.task:Task\ntrain: {steps: 3}\n"
                                    "model: &same {a: 1, b: {c: 2}}\ndata: *same\n")
    spec = load()
    assert spec.config.data == spec.config.model == {"a": 1, "b": {"c": 2}}
    assert spec.origins["data.b.c"] == "my.yaml:4"


def test_a_word_for_data_is_its_source(folder: Path) -> None:
    (folder / "my.yaml").write_text(TASK + FREE)
    assert load("data=sample").config.data == {"source": "sample"}
    (folder / "my.yaml").write_text(TASK + "data: ./pictures\ndata.size: 2\n")
    spec = load("data.size=3")
    assert (spec.config.data, spec.origins["data.source"]) == ({"source": "./pictures", "size": 3}, "my.yaml:7")
    assert load("data={source: x}", "data=x").config.data == {"source": "x", "size": 2}
    assert "`data.source` is both `a` and `b` (command line)" in error_of("data=a", "data.source=b")


OWN = TASK + "model: {hidden: 64, head: {width: 8}, extra: {}, list: [1]}\n"


@pytest.mark.parametrize("override, error", [
    ("model.hiden=512", "error: `model.hiden` is not a key of this task (command line)\nhint: did you mean `model.hidden`?"),
    ("model={hiden: 512}", "error: `model.hiden` is not a key of this task (command line)\nhint: did you mean `model.hidden`?"),
    ("model.head.wdith=9", "did you mean `model.head.width`?"),
    ("data=other.txt", "error: `data.source` is not a key of this task (command line)\nhint: the task's file must give a default "
                       "for each key of `data`, or `data: {}` to take any key"),
    ("model.hidden.x=1", "`model.hidden.x` is not a key of this task"),
    ("modle.hidden=3", "error: `modle` is not a key of this spec (command line)\nhint: did you mean `model`?"),
])
def test_a_task_without_a_config_class_has_the_keys_of_its_file(folder: Path, override: str, error: str) -> None:
    (folder / "my.yaml").write_text(OWN)
    assert error in error_of(override)


def test_the_keys_of_a_tasks_own_file_may_be_set(folder: Path) -> None:
    (folder / "my.yaml").write_text(OWN)
    (folder / "over.yaml").write_text("model: {hidden: 3}\n")
    spec = load("model.head.width=2", "model.extra.any.thing=1", "model.list=[2, 3]", "data={}", config_file="over.yaml")
    assert spec.config.model == {"hidden": 3, "head": {"width": 2}, "extra": {"any": {"thing": 1}}, "list": [2, 3]}
    assert load("model.head=null").config.model["head"] is None
    (folder / "over.yaml").write_text("model:\n  hiden: 3\n")
    assert "`model.hiden` is not a key of this task (over.yaml:2)" in error_of(config_file="over.yaml")
    misspelled = ClusterConfig(name="c", defaults={"data": {"root": "/x"}})
    assert "`data.root` is not a key of this task (cluster c)" in error_of(cluster=misspelled)


def test_a_config_class_may_allow_any_keys(folder: Path) -> None:
    module = next(names)
    (folder / f"{module}.py").write_text("from typing import Any\nfrom trainers.config import RunConfig\n"
                                         "class Config(RunConfig):\n    data: dict[str, Any] = {}\n")
    (folder / "my.yaml").write_text(OWN + f"config: {module}:Config\n")
    assert load("data.any=1").config.data == {"any": 1}
    assert "`model.any` is not a key of this task" in error_of("model.any=1")


TEXTS = ["a b", "a # b", "a: b", "{seed", "$(touch x)", "%j", "中文", "a,b", "-x", "@x", "*", "&"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_on_the_command_line_arrives_in_the_run(folder: Path, text: str) -> None:
    (folder / "my.yaml").write_text(TASK + FREE)
    spec = load(f"data.note={text}", f"wandb.entity={text}")
    (folder / "run.yaml").write_text(spec.text)
    config = read_spec(folder / "run.yaml")
    assert (config.data["note"], config.wandb.entity) == (text, text)


def test_the_default_name_is_the_files(folder: Path) -> None:
    assert (load().name, load().origins["name"]) == ("my", "default")
    (folder / "我的 task.yaml").write_text(TASK)
    assert load(file="我的 task.yaml").name == "我的-task"
    assert load("name=other").name == "other"
    for bad in ("../x", "a/b", ".x", "-x", '"a b"', '"a\\nb"', "a%j"):
        assert "`name` is" in error_of(f"name={bad}")


# Errors


@pytest.mark.parametrize("override, message, hint", [
    ("optim.lr=fast", "`optim.lr` is `fast`, but must be a number (command line)", "the highest learning rate"),
    ("optim.lr=-1", "`optim.lr` is `-1`, but must be greater than 0 (command line)", ""),
    ("optim.lr=.inf", "`optim.lr` is `.inf`, but must be a finite number (command line)", ""),
    ("optim.lr=", "`optim.lr` is `null`, but must be a number (command line)", ""),
    ("optim.lr='1'", "`optim.lr` is `1`, but must be a number (command line)", ""),
    ("optim.name=adm", "but must be one of `sgd`, `adam` or `adamw` (command line)", "did you mean `adam`?"),
    ("optim.betas=[0.5, x]", "`optim.betas.1` is `x`, but must be a number (command line)", ""),
    ("optim.betas=1", "`optim.betas` is `1`, but must be a list (command line)", ""),
    ("optim.betas=[0.5]", "`optim.betas` is `[0.5]`, but must be a list of at least 2 (command line)", ""),
    ("optim=3", "`optim` is `3`, but must be a mapping of keys (command line)", ""),
    ("train.seed=1.0", "`train.seed` is `1.0`, but must be a whole number (command line)", ""),
    ("train.compile=yes", "`train.compile` is `yes`, but must be true or false (command line)", ""),
    ("train.compile=1", "`train.compile` is `1`, but must be true or false (command line)", ""),
    ("eval.every=fast", "but must be a whole number, or one of `epoch` or `never` (command line)", "steps, `epoch`"),
    ("wandb.project=1", "`wandb.project` is `1`, but must be text (command line)", "quote it, as '\"1\"'"),
    ("optim.lrr=1", "`optim.lrr` is not a key of this spec (command line)", "did you mean `optim.lr`?"),
    ("optim.groups=[{match: a, lr_scal: 2}]", "`optim.groups.0.lr_scal` is not", "did you mean `optim.groups.0.lr_scale`?"),
    ("optim.groups=[{match: a, lr_scale: -1}]", "`optim.groups.0.lr_scale` is `-1`", "`optim.groups.0.lr_scale`: factor on"),
    ("lr=1", "`lr` is not a key of this spec (command line)", "did you mean `optim.lr`?"),
    ("train.lr=1", "`train.lr` is not a key of this spec (command line)", "did you mean `optim.lr`?"),
    ("train.epoch=1", "`train.epoch` is not a key of this spec (command line)", "did you mean `train.epochs`?"),
    ("batchsize=1", "`batchsize` is not a key of this spec (command line)", "did you mean `train.batch_size` or"),
    ("optimizer={lr: 1}", "`optimizer` is not a key of this spec (command line)", "did you mean `optim`?"),
    ("wandb.zzz=1", "`wandb.zzz` is not a key of this spec (command line)", "`wandb` has `mode`, `project`, `entity`"),
    ("train.epochs=null", "give one of train.epochs and train.steps", ""),
    ("task=x", "the module `x` that `task` names was not found (command line)", "looked in"),
    ("task=trainers.task", "the module `trainers.task` that `task` names was not found (command line)", "looked in"),
    ("task=trainers", "`task` is `trainers`, but must be of the form `module:Class` (command line)", ""),
    ("word", "`word` is not of the form key=value", "optim.lr=1e-3"),
    ("=1", "`=1` is not of the form key=value", ""),
    ("a..b=1", "`a..b=1` is not of the form key=value", ""),
    ("wandb.entity=\udcff", "`wandb.entity` is not valid UTF-8 text (command line)", ""),
])
def test_errors_on_the_command_line(folder: Path, override: str, message: str, hint: str) -> None:
    error, *hints = error_of(override).splitlines()
    assert message in error
    assert hint in "".join(hints)


def test_several_errors_are_reported_as_one(folder: Path) -> None:
    assert ", and 2 more\n" in error_of("optim.lr=fast", "train.seed=-1", "optim.lrr=1")
    assert error_of("optim.lr=fast", "optim.lrr=1").startswith("error: `optim.lrr` is not a key")


@pytest.mark.parametrize("text, message", {
    TASK + "  lrr: 1\n": "`optim.lrr` is not a key of this spec (my.yaml:7)",
    TASK + "  name: x\n": "`optim.name` is `x`, but must be one of `sgd`, `adam` or `adamw` (my.yaml:7)",
    TASK + "  lr: 2\n": "my.yaml:7: duplicate key `lr`, first given in line 6",
    TASK + "optim.lr: 2\n": "`optim.lr` is both `0.01` and `2` (my.yaml:6, my.yaml:7)",
    TASK + " x: 1\n": "my.yaml:7: this is not YAML",
    "- 1\n": "my.yaml: this is not a mapping of keys to values",
    "train: {steps: 1}\n": "`task` is missing",
    "task: trainers.engine.task:Task\n": "`train` is missing",
    "": "`task` is missing, and 1 more",
    TASK + "model:\n": "",
}.items())
def test_errors_in_a_file(folder: Path, text: str, message: str) -> None:
    (folder / "my.yaml").write_text(text)
    if message:
        assert message in error_of().splitlines()[0]
    else:
        assert load().config.model is None


def test_files_that_cannot_be_read(folder: Path) -> None:
    assert "there is no file `none.yaml`" in error_of(file="none.yaml")
    assert "there is no file `none.yaml`" in error_of(config_file="none.yaml")
    assert "cannot read `.`" in error_of(file=".")
    (folder / "my.yaml").write_bytes(b"name: \xff")
    assert "`my.yaml` is not valid UTF-8 text: byte 6" in error_of()


def test_errors_name_the_environment_variable_or_cluster(folder: Path) -> None:
    assert "(environment WANDB_MODE)" in error_of(WANDB_MODE="sometimes")
    assert "(cluster c)" in error_of(cluster=ClusterConfig(name="c", defaults={"optim.lr": "x"}))


# The resolved spec


def test_run_yaml_gives_the_same_config(folder: Path) -> None:
    (folder / "my.yaml").write_text(TASK + FREE)
    module = next(names)
    (folder / f"{module}.py").write_text(
        "from pathlib import Path\n"
        "from trainers.config import RunConfig, Section\n"
        "class Data(Section):\n"
        "    where: Path = Path('/x')\n"
        "    shape: tuple[int, int] = (1, 2)\n"
        "class Config(RunConfig):\n"
        "    data: Data = Data()\n")
    spec = load(f"config={module}:Config", "data.where=/a b/中", "data.shape=[3, 4]",
                'model={x: "1e3", y: .inf, z: {}}')
    assert spec.config.data.shape == (3, 4) and spec.config.data.where == Path("/a b/中")
    assert spec.config.path == str(folder)
    (folder / "run.yaml").write_text(spec.text)
    assert read_spec(folder / "run.yaml") == spec.config
    assert yaml12.read(spec.text, "run.yaml").value == spec.values
    # run.yaml can be started again like any spec.
    assert load(file="run.yaml").config == spec.config


def test_errors_of_read_spec(folder: Path) -> None:
    (folder / "run.yaml").write_text(load().text.replace("lr: 0.01", "lr: fast"))
    with pytest.raises(UserError, match=r"`optim.lr` is `fast`, but must be a number \(run.yaml:\d+\)"):
        read_spec(folder / "run.yaml")
    with pytest.raises(UserError, match="there is no file"):
        read_spec(folder / "none.yaml")


def test_show_is_yaml_with_origins(folder: Path) -> None:
    spec = load("wandb.project=中 文")
    text = show(spec)
    assert yaml12.read(text, "show").value == spec.values
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert lines["epochs:"].endswith("# my.yaml:4")
    assert lines["project:"].endswith("# command line")
    assert lines["batch_size:"].endswith("# default")
    assert all("#" in line for line in text.splitlines() if not line.endswith(":"))


def test_built_in_specs_are_complete(folder: Path) -> None:
    assert "cifar10" in specs.tasks()
    for name, path in specs.tasks().items():
        spec = load(file=name)
        assert spec.name == name and specs.description(path)
        assert spec.config.path is None
        assert f"{path.name}:" in spec.origins["task"]


def test_schema(folder: Path) -> None:
    common = schema()
    assert "required" not in common
    assert common["$defs"]["Optim"]["properties"]["lr"]["description"] == "the highest learning rate of the schedule"
    assert "size" in str(schema("cifar10")["$defs"])
    assert schema("my.yaml")["properties"].keys() == common["properties"].keys()


# A user's modules


def user_module(folder: Path, text: str) -> str:
    name = next(names)
    (folder / f"{name}.py").write_text(text)
    return name


def test_a_users_folder_comes_last_on_the_path(folder: Path) -> None:
    (folder / "trainers").mkdir()
    for file in ("trainers/__init__.py", "trainers/config.py", "launch.py", "json.py"):
        (folder / file).write_text("raise SystemExit('shadowed')")
    module = user_module(folder, "from trainers.config import RunConfig\nclass Config(RunConfig): pass\n")
    spec = load(f"config={module}:Config")
    assert isinstance(spec.config, RunConfig) and type(spec.config).__module__ == module
    assert sys.path[-1] == str(folder)
    assert "rename" in error_of("config=trainers.mine:X")


def test_the_module_is_next_to_the_spec_or_in_the_working_folder(folder: Path) -> None:
    (folder / "specs").mkdir()
    module = user_module(folder, "")
    (folder / "specs" / "my.yaml").write_text(TASK.replace("trainers.engine.task", module))
    assert load(file="specs/my.yaml").config.path == str(folder)
    (folder / "specs" / f"{module}.py").touch()
    assert load(file="specs/my.yaml").config.path == str(folder / "specs")
    assert load("path=.", file="specs/my.yaml").config.path == str(folder / "specs")


@pytest.mark.parametrize("text, message, hint", [
    ("x = 1\ny = x / 0\n", "fails: ZeroDivisionError: division by zero", "line 2"),
    ("x = (\n", "fails: SyntaxError", "line 1"),
    ("import sys\nsys.exit(3)\n", "fails: SystemExit: 3", "line 2"),
    ("import there_is_no_such_thing\n", "imports `there_is_no_such_thing`, which is not installed", "install it"),
    ("class Confi: pass\n", "has no `Config`", "did you mean"),
    ("class Config: pass\n", "which is not a subclass of trainers.config.RunConfig", "class Config(RunConfig)"),
    ("def Config(): pass\n", "which is not a subclass of trainers.config.RunConfig", ""),
])
def test_modules_that_fail(folder: Path, text: str, message: str, hint: str) -> None:
    module = user_module(folder, text)
    error, *hints = error_of(f"config={module}:Config").splitlines()
    assert module in error and message in error
    assert hint in "".join(hints)


def test_a_module_that_is_hidden_by_an_installed_one(folder: Path) -> None:
    (folder / "colorsys.py").write_text("class Config: pass\n")
    assert "rename `colorsys`" in error_of("config=colorsys:Config")


def test_resolve(folder: Path) -> None:
    module = user_module(folder, "class Mine: pass\n")
    assert resolve(f"{module}:Mine", folder).__name__ == "Mine"
    assert resolve("trainers.errors:UserError") is UserError
    with pytest.raises(UserError, match="there is no module `nowhere`"):
        resolve("nowhere:X", folder)


# Scripts


def test_a_script(folder: Path) -> None:
    (folder / "my train.py").touch()
    cluster = ClusterConfig(name="c", defaults={"run": {"max_restarts": 3}, "train.precision": "bf16"})
    spec = script_spec("my train.py", ["--lr", "1e-3", "a b", "null"], ["run.grace_s=5"], cluster=cluster)
    assert (spec.name, spec.config.script) == ("my-train", str(folder / "my train.py"))
    assert spec.config.args == ["--lr", "1e-3", "a b", "null"]
    assert (spec.config.run.max_restarts, spec.origins["run.max_restarts"]) == (3, "cluster c")
    (folder / "run.yaml").write_text(spec.text)
    assert read_spec(folder / "run.yaml") == spec.config
    for path, overrides in (("none.py", []), (".", []), ("my train.py", ["optim.lr=1"])):
        with pytest.raises(UserError):
            script_spec(path, [], overrides, cluster=cluster)


# Changes when a run is resumed


def test_the_limits_of_a_run_may_change_when_it_is_resumed(folder: Path) -> None:
    paths = RunPaths(folder / "run-1")
    paths.root.mkdir()
    (folder / "a.py").write_text("")
    for spec in (load(), script_spec("a.py", cluster=HERE)):
        paths.changes.unlink(missing_ok=True)
        paths.spec.write_text(spec.text)
        changed = specs.with_changes(specs.spec_of(paths), ["run.grace_s=5", "run.max_restarts=2"])
        specs.record_changes(paths, changed)
        again = specs.spec_of(paths)
        assert (again.config.run.grace_s, again.config.run.max_restarts) == (5, 2) and again.text == spec.text
        specs.record_changes(paths, specs.with_changes(again, ["run.grace_s=7"]))
        assert (read_run(paths).run.grace_s, read_run(paths).run.max_restarts) == (7, 2)
        for word in ("optim.lr=1", "name=other", "run.grace=5", "run.grace_s=soon", "train.seed=1"):
            with pytest.raises(UserError):
                specs.with_changes(again, [word])


def test_patience_may_change_when_a_run_is_resumed(folder: Path) -> None:
    paths = RunPaths(folder / "run-1")
    paths.root.mkdir()
    paths.spec.write_text(load("checkpoint.metric=loss", "train.patience=2").text)
    for word, patience in (("train.patience=3", 3), ("train.patience=null", None)):
        specs.record_changes(paths, specs.with_changes(specs.spec_of(paths), [word]))
        assert read_run(paths).train.patience == patience


def test_a_strategy_that_an_older_version_has_recorded_still_counts(folder: Path) -> None:
    paths = RunPaths(folder / "run-1")
    paths.root.mkdir()
    paths.spec.write_text(load().text)
    (paths.root / "spread.json").write_text(
        '{"strategy": "fsdp", "offload": "none", "checkpoint_activations": true, "deepspeed": {}}')
    assert (read_run(paths).train.strategy, read_run(paths).train.checkpoint_activations) == ("fsdp", True)


# Clusters


def test_clusters(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    assert load_cluster("local").defaults == {}
    own = folder / "launch" / "clusters"
    own.mkdir(parents=True)
    (own / "local.yaml").write_text("env: {A: b}\ndefaults: {optim: {lr: 2}}\n")
    cluster = load_cluster("local")
    assert (cluster.name, cluster.env) == ("local", {"A": "b"})
    assert load(cluster=cluster).config.optim.lr == 2
    with pytest.raises(UserError, match="there is no cluster `x`"):
        load_cluster("x")
    (own / "local.yaml").write_text("env: {A: 1}\n")
    with pytest.raises(UserError, match=r"`env.A` is `1`, but must be text \(.*local.yaml:1\)"):
        load_cluster("local")


def test_a_resumed_run_may_be_told_where_its_data_lies(tmp_path: Path) -> None:
    paths = make_run(tmp_path / "r", "name: r\ntrain: {steps: 2}\ndata: {source: /old, root: null, size: 3}\n")
    moved = specs.with_changes(specs.spec_of(paths), ["data=/new"])
    specs.record_changes(paths, moved)
    assert specs.spec_of(paths).values["data"] == {"source": "/new", "root": None, "size": 3}
    specs.record_changes(paths, specs.with_changes(specs.spec_of(paths), ["train.strategy=fsdp"]))
    specs.record_changes(paths, specs.with_changes(specs.spec_of(paths), ["eval.report_s=9"]))
    config = read_run(paths)
    assert config.data["source"] == "/new" and config.train.strategy == "fsdp" and config.eval.report_s == 9
    paths.changes.write_text('{"train": {"strategy": "zero1"}, "of a newer version": 1}')
    assert read_run(paths).train.strategy == "zero1"
    for word in ("data.size=4", "model.x=1"):
        with pytest.raises(UserError, match=f"`{word}` cannot be set") as error:
            specs.with_changes(specs.spec_of(paths), [word])
        assert error.value.hint and all(f" {key}," in error.value.hint for key in ("eval.batch_tokens", "data.workers"))
