"""Read the resolved spec of a run, and say what is wrong with a spec. Imports no torch."""

from __future__ import annotations

import difflib
import importlib
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from trainers.config.nearest import nearest_keys
from trainers.contract.errors import UserError
from trainers.contract.text import either

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

    from trainers.config.schema import RunConfig, ScriptConfig, SearchConfig, Section, TaskConfig
    from trainers.config.yaml12 import Key
    from trainers.contract.paths import RunPaths

OLD_CHANGES = "spread.json"  # the name that older versions gave to changes.json


def read_spec(path: Path) -> RunConfig | SearchConfig | ScriptConfig:
    """Return the config in a run.yaml.

    Raises:
        UserError: the file is missing, is not YAML, or has values that its config class does not allow.
    """
    from trainers.config import yaml12
    from trainers.config.schema import ScriptConfig

    document = yaml12.read(read_text(path), path.name)
    values = mapping(document.value, path.name)
    cls = ScriptConfig if "script" in values else config_class(values)
    return validate(cls, values, lambda key: f"{path.name}:{document.lines[key]}")


def read_run(paths: RunPaths) -> RunConfig | SearchConfig | ScriptConfig:
    """Return the config of a run directory: run.yaml, with the strategy, the limits and the place of the data that a resumption
    has chosen (changes.json).

    Raises:
        UserError: a file is missing or wrong.
    """
    config = read_spec(paths.spec)
    file = next((file for file in (paths.changes, paths.root / OLD_CHANGES) if file.exists()), None)
    if file is None:
        return config
    values = config.model_dump(mode="json")
    try:
        changes = mapping(json.loads(read_text(file)), file.name)
    except ValueError as error:
        raise UserError(f"`{file}` is not JSON: {error}",
                        "delete it: the run then continues with the settings of its run.yaml") from None
    if file.name == OLD_CHANGES and "strategy" in changes:  # all its keys are keys of `train`
        changes = {"train": changes}
    # A section that this version does not know, of a newer version, changes nothing.
    changed = {section: {**values[section], **mapping(keys, file.name)} for section, keys in changes.items() if section in values}
    return validate(type(config), {**values, **changed}, lambda key: file.name)


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        UserError: the file does not exist, cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no file `{path}`") from None
    except UnicodeDecodeError as error:
        raise UserError(f"`{path}` is not valid UTF-8 text: byte {error.start}") from None
    except OSError as error:
        raise UserError(f"cannot read `{path}`: {error.strerror}") from None


def mapping(value: Any, name: str) -> dict[str, Any]:
    """Return a document's value as a mapping; of an empty document, an empty mapping.

    Raises:
        UserError: the value is not a mapping.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{name}: this is not a mapping of keys to values", "write lines such as `train: {epochs: 1}`")
    return value


def config_class(values: Mapping[str, Any]) -> type[TaskConfig]:
    """Return the config class of a task's values: the class that `config` names, otherwise RunConfig.

    Raises:
        UserError: the named class cannot be imported, or is not a config class.
    """
    from trainers.config.schema import RunConfig, TaskConfig

    reference, folder = values.get("config"), values.get("path")
    if not isinstance(reference, str) or ":" not in reference:
        return RunConfig  # if `config` is wrong, validation by RunConfig says so
    cls = resolve(reference, folder)
    if not (isinstance(cls, type) and issubclass(cls, TaskConfig)):
        raise UserError(f"`config` is `{reference}`, which is not a subclass of trainers.config.RunConfig",
                        f"write `class {reference.partition(':')[2]}(RunConfig)`")
    return cls


def resolve(reference: str, folder: str | Path | None = None) -> Any:
    """Import and return what `module:Class` names. `folder`, if given, is added at the end of sys.path and stays there.

    Raises:
        UserError: there is no such module or class, or the import fails.
    """
    module_name, _, name = reference.partition(":")
    if folder is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))
        importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"`{module_name}` imports `{error.name}`, which is not installed",
                            "install it in the environment of `launch`") from error
        raise UserError(f"there is no module `{error.name}`, which `{reference}` needs",
                        _hidden(module_name, folder) or _where(folder)) from error
    except (Exception, SystemExit) as error:
        reason = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
        raise UserError(f"importing `{module_name}` fails: {reason}", _place(error, folder)) from error
    if hint := _hidden(module_name, folder):
        raise UserError(f"`{module_name}` was imported from `{module.__file__}`, not from `{folder}`", hint)
    if not hasattr(module, name):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        near = difflib.get_close_matches(name, classes, n=1)
        raise UserError(f"`{module_name}` has no `{name}` ({module.__file__})",
                        f"did you mean `{module_name}:{near[0]}`?" if near else None)
    return getattr(module, name)


def holds(folder: str | Path, module_name: str) -> bool:
    """Return whether the folder contains the module, or the top package of a dotted name."""
    top = Path(folder, module_name.partition(".")[0])
    return top.is_dir() or top.with_name(f"{top.name}.py").is_file()


def _hidden(module_name: str, folder: str | Path | None) -> str | None:
    """Return a hint if Python has imported another module in place of the folder's module; otherwise None."""
    top = module_name.partition(".")[0]
    module = sys.modules.get(top)
    if folder is None or module is None or not holds(folder, top):
        return None
    file = getattr(module, "__file__", None)
    places = [file] if file else list(getattr(module, "__path__", []))
    if any(Path(place).resolve().is_relative_to(Path(folder).resolve()) for place in places):
        return None
    return f"rename `{top}` in `{folder}`: Python finds an installed module of the same name first"


def _where(folder: str | Path | None) -> str:
    return f"looked in `{folder}` and in the installed packages" if folder else "looked in the installed packages"


def _place(error: BaseException, folder: str | Path | None) -> str | None:
    """Return a hint with the line that failed: the last line in the user's folder, or the last line of all."""
    if isinstance(error, SyntaxError):
        return f"see {error.filename}, line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    own = [frame for frame in frames if folder is not None and Path(frame.filename).is_relative_to(folder)]
    return f"see {(own or frames)[-1].filename}, line {(own or frames)[-1].lineno}" if frames else None


def validate(cls: type[Section], values: Mapping[str, Any], origin: Callable[[Key], str | None]) -> Any:
    """Return the config of class `cls` with these plain values.

    Args:
        origin: returns where a key of the values was given (`my.yaml:3`, `command line`), or None if that is not one place.

    Raises:
        UserError: a value is wrong; the message describes the first problem and counts the others.
    """
    from pydantic import ValidationError

    try:
        # Validate as JSON: there a strict Path accepts text and a strict tuple accepts a list, which is what YAML gives.
        return cls.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise _explained(error, cls, values, origin) from error


def _explained(error: ValidationError, cls: type[Section], values: Mapping[str, Any],
               origin: Callable[[Key], str | None]) -> UserError:
    by_key: dict[Key, list[Any]] = {}  # several errors for a key: pydantic gives an error for each member of a union
    for item in error.errors(include_url=False):
        by_key.setdefault(_key(item, values), []).append(item)
    unknown = [key for key, items in by_key.items() if items[0]["type"] == "extra_forbidden"]
    first = unknown[0] if unknown else next(iter(by_key))
    errors = by_key[first]
    known = known_keys(cls)
    dotted, types = ".".join(map(str, first)), {item["type"] for item in errors}
    value, given = _at(values, first)
    place = origin(first) if first and given else None
    where = f" ({place})" if place else ""
    more = f", and {len(by_key) - 1} more" if len(by_key) > 1 else ""
    unnumbered = ".".join(part for part in first if isinstance(part, str))  # keys in lists are known without their place
    description = known.get(unnumbered)
    hint = f"`{dotted}`: {description}" if description else None
    if "extra_forbidden" in types:
        message = f"`{dotted}` is not a key of this spec"
        sections = [key for key in known if isinstance(value, dict) and "." not in key]  # a mapping may be a misspelled section
        near = nearest_keys(unnumbered, sections) or nearest_keys(unnumbered, list(known))
        section, numbered = unnumbered.rpartition(".")[0], dotted.rpartition(".")[0]
        near = [numbered + key.removeprefix(section) if key.startswith(f"{section}.") else key for key in near]
        hint = _did_you_mean(near) or _keys_of(section, known)
    elif "missing" in types:
        message, hint = f"`{dotted}` is missing", description
    elif errors[0]["type"] == "value_error" and isinstance(value, dict):
        message, hint = str(errors[0]["ctx"]["error"]), None  # an error about several keys, whose text names the keys
    else:
        message = f"`{dotted}` is `{_shown(value)}`, but must be {_wanted(errors)}"
        if "literal_error" in types and isinstance(value, str):
            words = [word.strip("' ") for item in errors if item["type"] == "literal_error"
                     for word in item["ctx"]["expected"].replace(" or ", ",").split(",")]
            hint = _did_you_mean(difflib.get_close_matches(value, words, n=1)) or hint
        elif types == {"string_type"} and isinstance(value, (int, float)):
            hint = f"quote it, as '\"{_shown(value)}\"' on the command line and \"{_shown(value)}\" in a file"
    return UserError(message + where + more, hint)


# pydantic's type of an error -> what the value must be.
WANTED = {
    "int_type": "a whole number", "int_from_float": "a whole number", "int_parsing": "a whole number",
    "float_type": "a number", "float_parsing": "a number", "finite_number": "a finite number",
    "bool_type": "true or false", "bool_parsing": "true or false",
    "string_type": "text", "path_type": "a path",
    "list_type": "a list", "tuple_type": "a list", "set_type": "a list",
    "dict_type": "a mapping of keys", "model_type": "a mapping of keys",
    "greater_than": "greater than {gt:g}", "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}", "less_than_equal": "at most {le:g}",
    "too_short": "a list of at least {min_length}", "too_long": "a list of at most {max_length}",
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
}


def _wanted(errors: list[Any]) -> str:
    """Return what a value must be, in words: 'a whole number, or one of `epoch` or `never`'."""
    wanted = []
    for error in errors:
        context = error.get("ctx", {})
        if error["type"] in WANTED:
            wanted.append(WANTED[error["type"]].format(**context))
        elif error["type"] in ("literal_error", "enum"):
            words = context["expected"].replace("'", "`")
            wanted.append(f"one of {words}" if " or " in words else words)
        elif error["type"] == "value_error":
            wanted.append(str(context["error"]).removeprefix("must be "))
        else:
            wanted.append(error["msg"].removeprefix("Input should be "))
    return ", or ".join(dict.fromkeys(wanted))


def _key(error: Any, values: Mapping[str, Any]) -> Key:
    """Return the key that an error is about: pydantic's location without the names of the members of unions."""
    key: list[str | int] = []
    value: Any = values
    for part in error["loc"]:
        if isinstance(value, dict) and part in value or isinstance(value, list) and isinstance(part, int):
            key.append(part)
            value = value[part]
    if error["type"] == "missing":
        key.append(error["loc"][-1])
    return tuple(key)


def _at(values: Any, key: Key) -> tuple[Any, bool]:
    """Return (the value at a key, whether the key exists)."""
    for part in key:
        if isinstance(values, dict) and part not in values:
            return None, False
        values = values[part]
    return values, True


def _shown(value: Any, most: int = 60) -> str:
    from trainers.config.yaml12 import inline

    text = value if isinstance(value, str) and value.isprintable() and value else inline(value)
    return text if len(text) <= most else text[:most - 1] + "…"


def known_keys(cls: type[BaseModel], prefix: str = "") -> dict[str, str | None]:
    """Return every dotted key of a config class, with its description."""
    descriptions: dict[str, str | None] = {}
    for name, field in cls.model_fields.items():
        descriptions[prefix + name] = field.description
        for section in _sections(field.annotation):
            descriptions.update(known_keys(section, f"{prefix}{name}."))
    return descriptions


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the config classes in a type annotation."""
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _keys_of(section: str, known: Mapping[str, Any]) -> str | None:
    prefix = section + "." if section else ""
    keys = [key[len(prefix):] for key in known if key.startswith(prefix) and "." not in key[len(prefix):]]
    return f"{f'`{section}`' if section else 'the spec'} has {', '.join(f'`{key}`' for key in keys)}" if keys else None


def _did_you_mean(words: list[str]) -> str | None:
    return f"did you mean {either(f'`{word}`' for word in words)}?" if words else None
