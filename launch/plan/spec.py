"""Task specs: found by name, merged layer by layer, validated. Each value knows where it came from."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.config.spec import config_class, holds, mapping, read_run, read_text, validate
from trainers.contract.errors import UserError
from trainers.contract.files import replace_json

if TYPE_CHECKING:
    from launch.cluster.config import ClusterConfig
    from launch.plan.initial_weights import Weights
    from trainers.config.schema import RunConfig, ScriptConfig, SearchConfig, TaskConfig
    from trainers.config.yaml12 import Key
    from trainers.contract.paths import RunPaths

    Layer = dict[Key, tuple[Any, str]]  # a value, and where it was given, by place

# Keys that say the same thing in other words: a later layer's takes the place of an earlier one's.
ALTERNATIVES = (("train.epochs", "train.steps"),)

# WANDB_DISABLED is wandb's older way to say WANDB_MODE=disabled.
WANDB_VARIABLES = {"WANDB_MODE": "mode", "WANDB_PROJECT": "project", "WANDB_ENTITY": "entity", "WANDB_DISABLED": "mode"}
WANDB_MODES = {"disabled": "off"}
YES = ("1", "true", "yes", "on", "t", "y")


@dataclass(frozen=True)
class Spec:
    """What a run is, and why."""

    name: str
    config: RunConfig | SearchConfig | ScriptConfig
    values: dict[str, Any]   # the config as plain values, defaults included
    origins: dict[str, str]  # by dotted key: "default", "cifar10.yaml:12", "cluster local", "command line", ...
    text: str                # run.yaml: `trainers.config.spec.read_spec` makes the same config of it
    weights: Weights | None = None  # what `init.source` is, once that was looked up


def tasks() -> dict[str, Path]:
    """The built-in specs, by name."""
    found = (Path(__file__).parents[2] / "trainers").glob("*/*.yaml")
    return dict(sorted((path.stem, path) for path in found))


def description(path: Path) -> str:
    """The first comment of a spec."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").rstrip(" .") if first.startswith("#") else ""


def is_spec(word: str | Path) -> bool:
    """Whether a file's name is that of a spec; any other file is a script."""
    return Path(word).suffix in (".yaml", ".yml")


def load_spec(word: str | Path, overrides: Sequence[str] = (), *, cluster: ClusterConfig,
              environment: Mapping[str, str], config_file: str | Path | None = None) -> Spec:
    """The spec of a built-in task or of a user's file.

    Layers, later wins: the schema's defaults, the task's YAML, the cluster's defaults, W&B's environment
    variables, `config_file`, and `overrides`, each `key.sub=value`.

    Raises:
        UserError: no such file, no YAML, an unknown key, a value of the wrong kind, a module that fails.
    """
    built_in = tasks().get(str(word))
    path = built_in or Path(word)
    layers = [_file(path, path.name if built_in else str(path)), *_cluster(cluster), _wandb(environment)]
    if config_file is not None:
        layers.append(_file(Path(config_file), str(config_file)))
    layers.append(_command_line(overrides))
    merged = {("name",): (_name(path), "default"), **_merge(layers)}
    own = [Path(file).absolute().parent for file in (config_file, None if built_in else word) if file is not None]
    _find_modules(merged, [*own, Path.cwd()])
    return _spec(config_class(_nest(merged)), merged)


def script_spec(path: str | Path, args: Sequence[str] = (), overrides: Sequence[str] = (), *,
                cluster: ClusterConfig) -> Spec:
    """The spec of a user's own script. Of the cluster's defaults, those of `run` apply.

    Raises:
        UserError: there is no such file, or an override is wrong.
    """
    from trainers.config.schema import ScriptConfig

    path = Path(path)
    if not path.is_file():
        raise UserError(f"`{path}` is a folder" if path.is_dir() else f"there is no file `{path}`",
                        "give a script, a spec (.yaml) or a task's name")
    given: Layer = {("name",): (_name(path), "default"), ("script",): (str(path.absolute()), "command line")}
    if args:
        given["args",] = list(args), "command line"
    defaults = [{key: value for key, value in layer.items() if key[0] == "run"} for layer in _cluster(cluster)]
    return _spec(ScriptConfig, _merge([given, *defaults, _command_line(overrides)]))


def spec_of(paths: RunPaths) -> Spec:
    """The spec that a run directory holds. Raises: UserError."""
    config = read_run(paths)
    return Spec(name=config.name, config=config, values=config.model_dump(mode="json"), origins={},
                text=paths.spec.read_text(encoding="utf-8"))


SPREAD = ("strategy", "offload", "checkpoint_activations")  # keys of `train` that change no number


def spread_anew(spec: Spec, words: Sequence[str]) -> Spec:
    """The spec of a run whose models are to be spread otherwise from now on.

    Raises:
        UserError: a word is another key's, which no resumption may change, or its value is wrong.
    """
    for word in words:
        if word.partition("=")[0] not in [f"train.{key}" for key in SPREAD] or "train" not in spec.values:
            raise UserError(f"`{word}`: a run's spec never changes",
                            "start a new run for that; resume takes sbatch.KEY=VALUE, and how models are spread: --strategy, "
                            "train.offload and train.checkpoint_activations")
    changed = with_overrides(spec, words)
    if not changed.config.train.strategy.startswith("zero"):
        changed = with_values(changed, {"train": {**changed.values["train"], "deepspeed": {}}})
    return replace(changed, text=spec.text)


def record_spread(paths: RunPaths, spec: Spec) -> None:
    """For this attempt's ranks and those to come. Raises: OSError."""
    replace_json(paths.spread, {key: spec.values["train"][key] for key in (*SPREAD, "deepspeed")})


def with_values(spec: Spec, changes: Mapping[str, Any]) -> Spec:
    """The spec with other values of some top-level keys."""
    from trainers.config import yaml12

    values = {**spec.values, **changes}
    return replace(spec, config=validate(type(spec.config), values, lambda key: None), values=values,
                   text=yaml12.dump(values))


def with_overrides(spec: Spec, overrides: Sequence[str]) -> Spec:
    """The spec with `key.sub=value` words over what it is. Raises: UserError."""
    merged = _merge([_layer(spec.values, lambda key: "run.yaml"), _command_line(overrides)])
    return _spec(type(spec.config), merged)


def for_debugging(word: str | Path, overrides: Sequence[str]) -> list[str]:
    """The overrides of a run of this task under a debugger: a few steps, each logged, unless they say otherwise.

    Raises:
        UserError: no such task or file, or its config class cannot be had.
    """
    if "train" not in _class_of(word).model_fields:  # it has no steps
        return list(overrides)
    said = {word.partition("=")[0] for word in overrides}
    more = [] if said & {"train.steps", "train.epochs"} else ["train.steps=3"]
    return [*overrides, *more, *([] if "log.every" in said else ["log.every=1"])]


def show(spec: Spec) -> str:
    """The merged spec as YAML, each value with a comment that says where it came from."""
    from trainers.config import yaml12

    shown = [(line, spec.origins.get(".".join(key))) for key, line in yaml12.lines(spec.values)]
    width = max(len(line) for line, origin in shown if len(line) <= 60)
    return "\n".join(f"{line:<{width}}  # {origin}" if origin else line for line, origin in shown)


def schema(word: str | Path | None = None) -> dict[str, Any]:
    """The JSON Schema of spec files: of a task's, or of what all tasks share.

    Nothing is required in it at the top, since a file is one layer of several.

    Raises:
        UserError: no such task or file, or its config class cannot be had.
    """
    from trainers.config.schema import RunConfig

    cls: Any = RunConfig
    if word is not None:
        cls = _class_of(word)
    found = cls.model_json_schema()
    found.pop("required", None)
    data = found["properties"]["data"]
    found["properties"]["data"] = {"anyOf": [data, {"type": "string", "description": "short for data.source"}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def _class_of(word: str | Path) -> type[TaskConfig]:
    """The config class of a task. Raises: UserError."""
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


def _origin(key: Key, merged: Layer) -> str | None:
    """Where the value at a key was given, or all that is inside it, or the list that it is in."""
    inside = {place for other, (_, place) in merged.items() if other[:len(key)] == key}
    if not inside:
        inside = {place for other, (_, place) in merged.items() if key[:len(other)] == other}
    return inside.pop() if len(inside) == 1 else None


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
            raise UserError(f"`{word}` is no key=value", "write, for instance, optim.lr=1e-3")
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise UserError(f"`{key}` is no text in UTF-8 (command line)")
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
    """Nested values as a layer. At the top a key may be dotted, and `data: WORD` is short for `data.source`."""
    layer: Layer = {}
    for name, value in values.items():
        key = tuple(name.split("."))
        if key == ("data",) and value is not None and not isinstance(value, (dict, list)):
            key = ("data", "source")
        place = origin((name,))
        _add(layer, {(*key, *rest): (leaf, origin((name, *rest)) if rest else place) for rest, leaf in _leaves(value)})
    return _checked(layer)


def _add(layer: Layer, more: Layer) -> None:
    """Within one layer a key is given once."""
    for key, (value, place) in more.items():
        if key in layer and layer[key][0] != value:
            before, where = layer[key]
            places = place if place == where else f"{where}, {place}"
            raise UserError(f"`{'.'.join(key)}` is both `{before}` and `{value}` ({places})", "keep one")
        layer[key] = value, place


def _checked(layer: Layer) -> Layer:
    for group in ALTERNATIVES:
        given = [key for key in group if layer.get(tuple(key.split(".")), (None,))[0] is not None]
        if len(given) > 1:
            places = dict.fromkeys(layer[tuple(key.split("."))][1] for key in given)
            raise UserError(f"both `{given[0]}` and `{given[1]}` are given ({', '.join(places)})", "keep one")
    return layer


def _merge(layers: Sequence[Layer]) -> Layer:
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
                    raise UserError(f"`{name}={{}}` changes nothing: what `{name}` holds is merged key by key",
                                    f"`launch show` lists its keys; say what each is to be: {'.'.join(inside[0])}=...")
                continue  # an empty mapping takes nothing away
            for other in inside + [key[:length] for length in range(1, len(key))]:
                merged.pop(other, None)
            merged[key] = value, place
    return merged


def _leaves(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(item, (*key, name))
    else:
        yield key, value


def _nest(merged: Layer) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, (value, _) in merged.items():
        inner = values
        for part in key[:-1]:
            inner = inner.setdefault(part, {})
        inner[key[-1]] = value
    return values


# A user's modules


def _find_modules(merged: Layer, folders: Sequence[Path]) -> None:
    """Note in `path` the first folder that has a module which `task` or `config` names.

    Raises:
        UserError: such a module is nowhere.
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
            continue  # validation says so
        top = module.partition(".")[0]
        ours = top in ("trainers", "launch")
        home = next((folder for folder in folders if holds(folder, top)), None)
        if home is not None and not ours:
            merged.setdefault(("path",), (str(home), place))
        elif not _importable(module if ours else top):
            looked = " and ".join(f"`{folder}`" for folder in dict.fromkeys(folders))
            raise UserError(f"there is no module `{module}`, which `{key}` names ({place})",
                            f"rename `{home / top}`: launch's own `{top}` comes before it" if home and ours
                            else f"looked in {looked}")


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
