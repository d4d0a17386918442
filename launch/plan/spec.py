"""Task specs: found by name, merged from layers, validated. Each value keeps a note of where it came from."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.checkpoints.averaging import mean_of
from trainers.config.nearest import nearest_keys
from trainers.config.spec import config_class, holds, mapping, read_run, read_text, validate
from trainers.contract.errors import UserError
from trainers.contract.files import replace_json
from trainers.contract.text import either

if TYPE_CHECKING:
    from launch.cluster.config import ClusterConfig
    from trainers.config.schema import RunConfig, ScriptConfig, SearchConfig, TaskConfig
    from trainers.config.yaml12 import Key
    from trainers.contract.paths import RunPaths

    KeyPath = tuple[str, ...]               # ("optim", "lr") for `optim.lr`
    Layer = dict[KeyPath, tuple[Any, str]]  # (value, origin) by key, for the values that are not mappings

# Keys that set the same thing in different ways. A later layer's key replaces the other key of an earlier layer.
ALTERNATIVES = (("train.epochs", "train.steps"), ("train.batch_size", "train.batch_tokens"),
                ("eval.batch_size", "eval.batch_tokens"))

# WANDB_DISABLED is wandb's older form of WANDB_MODE=disabled.
WANDB_VARIABLES = {"WANDB_MODE": "mode", "WANDB_PROJECT": "project", "WANDB_ENTITY": "entity", "WANDB_DISABLED": "mode"}
WANDB_MODES = {"disabled": "off", "dryrun": "offline", "run": "online"}  # wandb's other words for the same
YES = ("1", "true", "yes", "on", "t", "y")


@dataclass(frozen=True)
class Weights:
    """The place of the weights that a run starts from."""

    path: str                # absolute
    run: str | None = None   # the id of the run that wrote the checkpoint, if known
    step: int | None = None  # the checkpoint's step; None: not a checkpoint
    warnings: tuple[str, ...] = ()  # one for each broken checkpoint that was passed over
    older: tuple[int, ...] = ()     # the steps of the checkpoints beside it, newest first, with which it is averaged

    def __str__(self) -> str:
        if self.run and self.step is not None and self.older:
            return f"run {self.run}, {mean_of(self.step, self.older)}"
        return f"run {self.run}, step {self.step}" if self.run else self.path


@dataclass(frozen=True)
class Spec:
    """The resolved spec of a run, and where each value came from."""

    name: str
    config: RunConfig | SearchConfig | ScriptConfig
    values: dict[str, Any]   # the config as plain values, defaults included
    origins: dict[str, str]  # by dotted key: "default", "cifar10.yaml:12", "cluster local", "command line", ...
    text: str                # the text of run.yaml; `trainers.config.spec.read_spec` reads the same config from it
    weights: Weights | None = None  # the weights that `init.source` names, after they were found


def tasks() -> dict[str, Path]:
    """Return the files of the built-in specs, by name."""
    files = (Path(__file__).parents[2] / "trainers").glob("*/*.yaml")
    return dict(sorted((path.stem, path) for path in files))


def description(path: Path) -> str:
    """Return the comment in a spec's first line; "" if there is none."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").rstrip(" .") if first.startswith("#") else ""


def is_spec(word: str | Path) -> bool:
    """Return whether a file is a spec, by its name; any other file is a script."""
    return Path(word).suffix in (".yaml", ".yml")


def load_spec(word: str | Path, overrides: Sequence[str] = (), *, cluster: ClusterConfig,
              environment: Mapping[str, str], config_file: str | Path | None = None) -> Spec:
    """Load the spec of a built-in task or of a user's file.

    The spec is merged from layers, and later layers override earlier ones: the schema's defaults, the task's YAML, the
    cluster's defaults, W&B's environment variables, `config_file`, and `overrides`, each of the form `key.sub=value`.

    Raises:
        UserError: a file does not exist or is not YAML, a key is unknown, a value has the wrong type, or a module cannot
            be imported.
    """
    built_in = tasks().get(str(word))
    path = built_in or Path(word)
    layers = [_file(path, path.name if built_in else str(path)), *_cluster(cluster), _wandb(environment)]
    if config_file is not None:
        layers.append(_file(Path(config_file), str(config_file)))
    layers.append(_command_line(overrides))
    merged: Layer = {("name",): (_name(path), "default"), **_merge(layers)}
    folders = [Path(file).absolute().parent for file in (config_file, None if built_in else word) if file is not None]
    _find_modules(merged, [*folders, Path.cwd()])
    cls = config_class(_nest(merged))
    _check_free_keys(cls, layers[0], merged, lambda section: f"the task's file must give a default for each key of `{section}`, "
                                                             f"or `{section}: {{}}` to take any key")
    return _spec(cls, merged)


def script_spec(word: str | Path, args: Sequence[str] = (), overrides: Sequence[str] = (), *, cluster: ClusterConfig,
                module: bool = False, accelerate_file: str | Path | None = None) -> Spec:
    """Return the spec of a user's own script or module. Only the `run` keys of the cluster's defaults apply.

    Args:
        word: the script's file, or with `module` the name of a module.
        accelerate_file: a config file of accelerate's, whose keys come below those of `overrides`.

    Raises:
        UserError: the script does not exist or is no Python script, there is no such module, an override is wrong, or
            accelerate does not take its settings.
    """
    from launch.plan import accelerate
    from launch.plan.script_file import check_keys, check_script, find_module
    from trainers.config.schema import ScriptConfig

    given: Layer
    check_keys(str(word), [override.partition("=")[0] for override in overrides], args, ScriptConfig.model_fields)
    if module:
        found = find_module(str(word), Path.cwd())
        if found is None:
            raise UserError(f"there is no module `{word}` that can be run",
                            f"looked for it in `{Path.cwd()}` and among the installed packages")
        file, home = found
        given = {("name",): (_name(Path(f"{word}.py")), "default"), ("script",): (str(file), "command line"),
                 ("module",): (str(word), "command line")}
        if home:
            given["path",] = str(home), "command line"
    else:
        check_script(path := Path(word))
        given = {("name",): (_name(path), "default"), ("script",): (str(path.absolute()), "command line")}
    if args:
        given["args",] = list(args), "command line"
    layers = [{key: value for key, value in layer.items() if key[0] == "run"} for layer in _cluster(cluster)]
    if accelerate_file is not None:
        layers.append({("accelerate", *key): value for key, value in _file(Path(accelerate_file), str(accelerate_file)).items()})
    accelerate.check_words(overrides)
    spec = _spec(ScriptConfig, _merge([given, *layers, _command_line(overrides)]))
    assert isinstance(spec.config, ScriptConfig)
    return with_values(spec, accelerate.resolve(spec.config)) if accelerate.has_settings(spec.config) else spec


def spec_of(paths: RunPaths) -> Spec:
    """Return the spec of an existing run, as its directory holds it.

    Raises:
        UserError: run.yaml cannot be read.
    """
    config = read_run(paths)
    return Spec(name=config.name, config=config, values=config.model_dump(mode="json"), origins={},
                text=paths.spec.read_text(encoding="utf-8"))


STRATEGY_KEYS = ("strategy", "offload", "checkpoint_activations")  # keys of `train` that do not change the results of training
EVALUATION_KEYS = ("report_s", "batch_size", "batch_tokens")  # keys of `eval` that change measures by rounding at most
PATIENCE = "train.patience"  # changes when training ends, not what it computes until then
# Keys of `data` that change no sample: where the data lies (the ranks compare the numbers of samples, and what the task's `facts`
# returns), and how many worker processes read it.
DATA_KEYS = ("source", "root", "path", "workers")


def with_changes(spec: Spec, words: Sequence[str]) -> Spec:
    """Return the spec of a run that continues with another strategy, offload or activation checkpointing, with other limits,
    with more or less patience, or on data that has moved.

    The text of run.yaml stays the same: the changes go into a separate file, see `record_changes`.

    Raises:
        UserError: a word sets a key that cannot change when a run is resumed, or its value is wrong.
    """
    is_task = hasattr(spec.config, "model")  # a script has settings for accelerate under `train`
    trains = is_task and "train" in spec.values
    allowed = [*(["data", *(f"data.{key}" for key in DATA_KEYS)] if is_task else []),
               *((*(f"train.{key}" for key in STRATEGY_KEYS), *(f"eval.{key}" for key in EVALUATION_KEYS), PATIENCE)
                 if trains else ())]
    for word in words:
        key = word.partition("=")[0]
        if key not in allowed and not key.startswith("run."):
            raise UserError(f"`{word}` cannot be set: a run's spec never changes",
                            "start a new run for that; resume takes run.KEY=VALUE, sbatch.KEY=VALUE, --strategy, train.offload, "
                            f"train.checkpoint_activations, {PATIENCE}, {', '.join(f'eval.{key}' for key in EVALUATION_KEYS)}, "
                            "data.workers, and data=PATH for data that has moved")
    changed = with_overrides(spec, words)
    if trains and not changed.values["train"]["strategy"].startswith("zero"):
        changed = with_values(changed, {"train": {**changed.values["train"], "deepspeed": {}}})
    return replace(changed, text=spec.text)


def record_changes(paths: RunPaths, spec: Spec) -> None:
    """Write the keys that `with_changes` may change, for the ranks of this attempt and of later attempts.

    Raises:
        OSError: the file cannot be written.
    """
    changes: dict[str, Any] = {"run": spec.values["run"]}
    if hasattr(spec.config, "model"):  # not a script
        if train := spec.values.get("train"):
            changes["train"] = {key: train[key] for key in (*STRATEGY_KEYS, "patience", "deepspeed")}
            changes["eval"] = {key: spec.values["eval"][key] for key in EVALUATION_KEYS}
        if isinstance(data := spec.values["data"], dict):
            changes["data"] = {key: data[key] for key in DATA_KEYS if key in data}
    replace_json(paths.changes, changes)


def with_values(spec: Spec, changes: Mapping[str, Any]) -> Spec:
    """Return the spec with new values for some top-level keys.

    Raises:
        UserError: a value is wrong.
    """
    from trainers.config import yaml12

    values = {**spec.values, **changes}
    return replace(spec, config=validate(type(spec.config), values, lambda key: None), values=values,
                   text=yaml12.dump(values))


def with_overrides(spec: Spec, overrides: Sequence[str]) -> Spec:
    """Return the spec with the overrides applied, each of the form `key.sub=value`.

    Raises:
        UserError: an override is wrong.
    """
    own = _layer(spec.values, lambda key: "run.yaml")
    merged = _merge([own, _command_line(overrides)])
    # No section of an existing run takes any key: whether the run's code reads a new key is not known.
    known = {key: given for key, given in own.items() if given[0] != {}}
    _check_free_keys(type(spec.config), known, merged, lambda section: f"use the keys that the run has under `{section}`")
    return _spec(type(spec.config), merged)


def seed_keys(word: str | Path) -> tuple[str, ...]:
    """Return the keys that hold a task's seed.

    Raises:
        UserError: the task or file does not exist, its config class cannot be imported, or the task has no seed.
    """
    keys = _class_of(word).seed_keys
    if not keys:
        raise UserError(f"`{word}` has no key for a seed, so `--seeds` cannot set it",
                        "name the key in the task's config class: seed_keys = (\"search.seed\",)")
    return keys


def for_debugging(word: str | Path, overrides: Sequence[str]) -> list[str]:
    """Return the overrides with defaults for a debugger added: 3 steps, each logged.

    Raises:
        UserError: the task or file does not exist, or its config class cannot be imported.
    """
    if "train" not in _class_of(word).model_fields:  # a search has no steps
        return list(overrides)
    given = {override.partition("=")[0] for override in overrides}
    more = [] if given & {"train.steps", "train.epochs"} else ["train.steps=3"]
    return [*overrides, *more, *([] if "log.every" in given else ["log.every=1"])]


def show(spec: Spec) -> str:
    """Return the merged spec as YAML, with a comment on each value that says where it came from."""
    from trainers.config import yaml12

    lines = [(line, spec.origins.get(".".join(map(str, key)))) for key, line in yaml12.lines(spec.values)]
    width = max(len(line) for line, origin in lines if len(line) <= 60)
    return "\n".join(f"{line:<{width}}  # {origin}" if origin else line for line, origin in lines)


def schema(word: str | Path | None = None) -> dict[str, Any]:
    """Return the JSON Schema of spec files: for one task, or by default for the keys that all tasks share.

    No top-level key is required, because a file is only one of several layers.

    Raises:
        UserError: the task or file does not exist, or its config class cannot be imported.
    """
    from trainers.config.schema import RunConfig

    cls: type[TaskConfig] = RunConfig
    if word is not None:
        cls = _class_of(word)
    result = cls.model_json_schema()
    result.pop("required", None)
    data = result["properties"]["data"]
    result["properties"]["data"] = {"anyOf": [data, {"type": "string", "description": "short for data.source"}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **result}


def _class_of(word: str | Path) -> type[TaskConfig]:
    """Return the config class of a task.

    Raises:
        UserError: the task or file does not exist, or its config class cannot be imported.
    """
    path = tasks().get(str(word)) or Path(word)
    merged = _file(path, path.name)
    _find_modules(merged, [path.absolute().parent, Path.cwd()])
    return config_class(_nest(merged))


def _spec(cls: type[TaskConfig | ScriptConfig], merged: Layer) -> Spec:
    from trainers.config import yaml12

    config = validate(cls, _nest(merged), lambda key: _origin(key, merged))
    values = config.model_dump(mode="json")
    origins = {".".join(key): _origin(key, merged) or "default" for key, _ in _leaves(values)}
    return Spec(config.name, config, values, origins, yaml12.dump(values))


def _check_free_keys(cls: type[TaskConfig | ScriptConfig], own: Layer, merged: Layer, hint: Callable[[str], str]) -> None:
    """Check the keys of the sections for which the config class declares no type.

    Args:
        own: the layer of the task's own file. It has all known keys. An empty mapping in it takes any key.
        hint: returns what to do if no known key is similar, for the name of a section.

    Raises:
        UserError: a later layer sets an unknown key.
    """
    for key, (value, place) in merged.items():
        section, name = key[0], ".".join(key)
        field = cls.model_fields.get(section)
        if field is None or field.annotation is not Any or value in (None, {}) and len(key) == 1:
            continue
        if not any(key == other[:len(key)] or key[:len(other)] == other and own[other][0] == {} for other in own):
            near = nearest_keys(name, [".".join(other) for other in own if other[0] == section])
            raise UserError(f"`{name}` is not a key of this task ({place})",
                            f"did you mean {either(f'`{word}`' for word in near)}?" if near else hint(section))


def _origin(key: Key, merged: Layer) -> str | None:
    """Return where a key's value was given; None if it is a default, or if its parts were given in several places.

    A key inside a list (`optim.betas.1`) has the origin of the list.
    """
    origins = {origin for other, (_, origin) in merged.items() if other[:len(key)] == key}
    if not origins:
        origins = {origin for other, (_, origin) in merged.items() if key[:len(other)] == other}
    return origins.pop() if len(origins) == 1 else None


def _name(path: Path) -> str:
    return re.sub(r"[^\w.-]+", "-", path.stem).lstrip(".-")[:80] or "run"


# Layers


def _file(path: Path, name: str) -> Layer:
    from trainers.config import yaml12

    document = yaml12.read(read_text(path), name)
    return _layer(mapping(document.value, name), lambda key: f"{name}:{document.lines[key]}")


def _cluster(cluster: ClusterConfig) -> list[Layer]:
    return [_layer(layer, lambda key: f"cluster {cluster.name}") for layer in cluster.layers]


def _command_line(overrides: Sequence[str]) -> Layer:
    from trainers.config import yaml12

    layer: Layer = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not re.fullmatch(r"[^\W\d][\w-]*(\.[\w-]+)*", key):
            raise UserError(f"`{word}` is not of the form key=value", "write, for instance, optim.lr=1e-3")
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise UserError(f"`{key}` is not valid UTF-8 text (command line)")
        _add(layer, _layer({key: yaml12.argument(text)}, lambda _: "command line"))
    return _checked(layer)


def _wandb(environment: Mapping[str, str]) -> Layer:
    layer: Layer = {}
    for variable, key in WANDB_VARIABLES.items():
        text = environment.get(variable, "")
        if variable == "WANDB_DISABLED":
            text = "disabled" if text.lower() in YES else ""
        if text:
            value = WANDB_MODES.get(text, text) if key == "mode" else text
            layer["wandb", key] = value, f"environment {variable}"
    return layer


def _layer(values: Mapping[str, Any], origin: Callable[[Key], str]) -> Layer:
    """Turn nested values into a layer. A top-level key may be dotted, and `data: WORD` is short for `data.source`.

    Args:
        origin: returns where the value at a key of `values` was given.
    """
    layer: Layer = {}
    for name, value in values.items():
        key = tuple(name.split("."))
        if key == ("data",) and value is not None and not isinstance(value, (dict, list)):
            key = ("data", "source")
        place = origin((name,))
        _add(layer, {(*key, *rest): (leaf, origin((name, *rest)) if rest else place) for rest, leaf in _leaves(value)})
    return _checked(layer)


def _add(layer: Layer, more: Layer) -> None:
    """Add values to a layer. Two different values for one key in the same layer are an error."""
    for key, (value, place) in more.items():
        if key in layer and layer[key][0] != value:
            earlier_value, earlier_place = layer[key]
            places = place if place == earlier_place else f"{earlier_place}, {place}"
            raise UserError(f"`{'.'.join(key)}` is both `{earlier_value}` and `{value}` ({places})", "keep one")
        layer[key] = value, place


def _checked(layer: Layer) -> Layer:
    """Return the layer if it sets at most one key of each group of `ALTERNATIVES`."""
    for group in ALTERNATIVES:
        given = [key for key in group if layer.get(tuple(key.split(".")), (None,))[0] is not None]
        if len(given) > 1:
            places = dict.fromkeys(layer[tuple(key.split("."))][1] for key in given)
            raise UserError(f"both `{given[0]}` and `{given[1]}` are given ({', '.join(places)})", "keep one")
    return layer


def _merge(layers: Sequence[Layer]) -> Layer:
    """Merge layers key by key; later layers override earlier ones."""
    merged: Layer = {}
    for layer in layers:
        for group in ALTERNATIVES:
            keys = [tuple(key.split(".")) for key in group]
            if any(layer.get(key, (None,))[0] is not None for key in keys):
                for key in keys:
                    merged.pop(key, None)
        for key, (value, place) in layer.items():
            inside = [other for other in merged if other[:len(key)] == key]
            if value == {} and inside:
                if place == "command line":
                    name = ".".join(key)
                    raise UserError(f"`{name}={{}}` changes nothing: the keys of `{name}` are merged one by one",
                                    f"set each key: {'.'.join(inside[0])}=...; `launch show` lists the keys")
                continue  # an empty mapping removes nothing
            for other in inside + [key[:length] for length in range(1, len(key))]:
                merged.pop(other, None)
            merged[key] = value, place
    return merged


def _leaves(value: Any, key: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield the key and value of everything in nested mappings that is not itself a mapping with keys."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(item, (*key, name))
    else:
        yield key, value


def _nest(merged: Layer) -> dict[str, Any]:
    """Turn a layer back into nested values."""
    values: dict[str, Any] = {}
    for key, (value, _) in merged.items():
        inner = values
        for part in key[:-1]:
            inner = inner.setdefault(part, {})
        inner[key[-1]] = value
    return values


# A user's modules


def _find_modules(merged: Layer, folders: Sequence[Path]) -> None:
    """Set `path` to the first folder that holds a module named by `task` or `config`, unless `path` is given.

    Raises:
        UserError: a module is in none of the folders, and cannot be imported.
    """
    if ("path",) in merged:
        value, place = merged["path",]
        if isinstance(value, str):
            merged["path",] = str((folders[0] / value).resolve()), place
        return
    for key in ("task", "config"):
        reference, place = merged.get((key,), (None, ""))
        module = reference.partition(":")[0] if isinstance(reference, str) else ""
        if not re.fullmatch(r"[^\W\d]\w*(\.\w+)*", module):
            continue  # validation reports this
        top = module.partition(".")[0]
        built_in = top in ("trainers", "launch")
        home = next((folder for folder in folders if holds(folder, top)), None)
        if home is not None and not built_in:
            merged.setdefault(("path",), (str(home), place))
        elif not _importable(module if built_in else top):
            searched = " and ".join(f"`{folder}`" for folder in dict.fromkeys(folders))
            raise UserError(f"the module `{module}` that `{key}` names was not found ({place})",
                            f"rename `{home / top}`: launch's own `{top}` hides it" if home and built_in
                            else f"looked in {searched}")


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
