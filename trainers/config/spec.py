"""Reads the resolved spec of a run, and says what is wrong with one. Imports no torch."""

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

if TYPE_CHECKING:
    from pydantic import ValidationError

    from trainers.config.schema import RunConfig, ScriptConfig, SearchConfig, Section, TaskConfig
    from trainers.config.yaml12 import Key
    from trainers.contract.paths import RunPaths


def read_spec(path: Path) -> RunConfig | SearchConfig | ScriptConfig:
    """The config that a run.yaml holds.

    Raises:
        UserError: it is missing, no YAML, or not what its config class allows.
    """
    from trainers.config import yaml12
    from trainers.config.schema import ScriptConfig

    document = yaml12.read(read_text(path), path.name)
    values = mapping(document.value, path.name)
    cls = ScriptConfig if "script" in values else config_class(values)
    return validate(cls, values, lambda key: f"{path.name}:{document.lines[key]}")


def read_run(paths: RunPaths) -> RunConfig | SearchConfig | ScriptConfig:
    """What a run directory says of its run: run.yaml, and how a resumption has spread its models anew.

    Raises:
        UserError: a file is missing or wrong.
    """
    config = read_spec(paths.spec)
    if not paths.spread.exists():
        return config
    values = config.model_dump(mode="json")
    anew = mapping(json.loads(read_text(paths.spread)), paths.spread.name)
    return validate(type(config), {**values, "train": {**values["train"], **anew}}, lambda key: paths.spread.name)


def read_text(path: Path) -> str:
    """Raises: UserError."""
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no file `{path}`") from None
    except UnicodeDecodeError as error:
        raise UserError(f"`{path}` is no text in UTF-8: byte {error.start}") from None
    except OSError as error:
        raise UserError(f"cannot read `{path}`: {error.strerror}") from None


def mapping(value: Any, name: str) -> dict[str, Any]:
    """A document's value as a mapping; nothing is an empty one. Raises: UserError."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{name}: it is no mapping of keys to values", "write lines such as `train: {epochs: 1}`")
    return value


def config_class(values: Mapping[str, Any]) -> type[TaskConfig]:
    """The class that a task's values must satisfy: the one named by `config`, else RunConfig.

    Raises:
        UserError: the named class cannot be had, or is none.
    """
    from trainers.config.schema import RunConfig, TaskConfig

    reference, folder = values.get("config"), values.get("path")
    if not isinstance(reference, str) or ":" not in reference:
        return RunConfig  # which says what is wrong, if something is
    found = resolve(reference, folder)
    if not (isinstance(found, type) and issubclass(found, TaskConfig)):
        raise UserError(f"`config` is `{reference}`, which is no subclass of trainers.config.RunConfig",
                        f"write `class {reference.partition(':')[2]}(RunConfig)`")
    return found


def resolve(reference: str, folder: str | Path | None = None) -> Any:
    """What `module:Class` names. `folder`, if any, becomes the last on sys.path, and stays there.

    Raises:
        UserError: no such module or class, or the import fails.
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
        if error.name is None or f"{module_name}.".find(f"{error.name}.") != 0:
            raise UserError(f"`{module_name}` imports `{error.name}`, which is not installed",
                            "install it in the environment of `launch`") from error
        raise UserError(f"there is no module `{error.name}`, which `{reference}` needs",
                        _hidden(module_name, folder) or _where(folder)) from error
    except (Exception, SystemExit) as error:
        said = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
        raise UserError(f"importing `{module_name}` fails: {said}", _place(error, folder)) from error
    if hidden := _hidden(module_name, folder):
        raise UserError(f"`{module_name}` is taken from `{module.__file__}`", hidden)
    if not hasattr(module, name):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        near = difflib.get_close_matches(name, classes, n=1)
        raise UserError(f"`{module_name}` has no `{name}` ({module.__file__})",
                        f"did you mean `{module_name}:{near[0]}`?" if near else None)
    return getattr(module, name)


def holds(folder: str | Path, module_name: str) -> bool:
    """Whether the folder has the (top) module."""
    top = Path(folder, module_name.partition(".")[0])
    return top.is_dir() or top.with_name(f"{top.name}.py").is_file()


def _hidden(module_name: str, folder: str | Path | None) -> str | None:
    """Advice, if the folder's module is not the one that Python finds."""
    top = module_name.partition(".")[0]
    module = sys.modules.get(top)
    if folder is None or module is None or not holds(folder, top):
        return None
    places = [module.__file__] if getattr(module, "__file__", None) else list(getattr(module, "__path__", []))
    if any(Path(place).resolve().is_relative_to(Path(folder).resolve()) for place in places):
        return None
    return f"rename `{top}` in `{folder}`: an installed one of this name comes before it"


def _where(folder: str | Path | None) -> str:
    return f"looked in `{folder}` and in what is installed" if folder else "looked in what is installed"


def _place(error: BaseException, folder: str | Path | None) -> str | None:
    """The line that failed: the last one in the user's folder, if any is."""
    if isinstance(error, SyntaxError):
        return f"see {error.filename}, line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    own = [frame for frame in frames if folder is not None and Path(frame.filename).is_relative_to(folder)]
    return f"see {(own or frames)[-1].filename}, line {(own or frames)[-1].lineno}" if frames else None


def validate(cls: type[Section], values: Mapping[str, Any], origin: Callable[[Key], str | None]) -> Any:
    """The config that plain values make.

    Args:
        origin: where a key that is in the values was given (`my.yaml:3`, `command line`), if one place was.

    Raises:
        UserError: the first thing that is wrong, and how many more there are.
    """
    from pydantic import ValidationError

    try:
        # As JSON, because plain values are what YAML gives: also a strict Path or tuple takes text or a list.
        return cls.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise _explained(error, cls, values, origin) from error


def _explained(error: ValidationError, cls: type[Section], values: Mapping[str, Any],
               origin: Callable[[Key], str | None]) -> UserError:
    found: dict[Key, list[Any]] = {}  # a union gives an error for each of its members
    for one in error.errors(include_url=False):
        found.setdefault(_key(one, values), []).append(one)
    unknown = [key for key, errors in found.items() if errors[0]["type"] == "extra_forbidden"]
    first = unknown[0] if unknown else next(iter(found))
    known = known_keys(cls)
    dotted, types = ".".join(map(str, first)), {one["type"] for one in found[first]}
    value, given = _at(values, first)
    place = origin(first) if first and given else None
    where = f" ({place})" if place else ""
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    description = known.get(dotted)
    hint = f"`{dotted}`: {description}" if description else None
    if "extra_forbidden" in types:
        message = f"`{dotted}` is no key of this spec"
        hint = _did_you_mean(nearest_keys(dotted, list(known))) or _keys_of(dotted.rpartition(".")[0], known)
    elif "missing" in types:
        message, hint = f"`{dotted}` is missing", description
    elif found[first][0]["type"] == "value_error" and isinstance(value, dict):
        message, hint = str(found[first][0]["ctx"]["error"]), None  # of several keys, which it names itself
    else:
        message = f"`{dotted}` is `{_shown(value)}`, which must be {_wanted(found[first])}"
        if "literal_error" in types and isinstance(value, str):
            words = [word.strip("' ") for one in found[first] if one["type"] == "literal_error"
                     for word in one["ctx"]["expected"].replace(" or ", ",").split(",")]
            hint = _did_you_mean(difflib.get_close_matches(value, words, n=1)) or hint
        elif types == {"string_type"} and isinstance(value, (int, float)):
            hint = f"quote it, as '\"{_shown(value)}\"' on the command line and \"{_shown(value)}\" in a file"
    return UserError(message + where + more, hint)


# By pydantic's type of an error: what the value must be.
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
    """'a whole number, or one of `epoch`, `never`'"""
    said = []
    for error in errors:
        context = error.get("ctx", {})
        if error["type"] in WANTED:
            said.append(WANTED[error["type"]].format(**context))
        elif error["type"] in ("literal_error", "enum"):
            words = context["expected"].replace("'", "`")
            said.append(f"one of {words}" if " or " in words else words)
        elif error["type"] == "value_error":
            said.append(str(context["error"]).removeprefix("must be "))
        else:
            said.append(error["msg"].removeprefix("Input should be "))
    return ", or ".join(dict.fromkeys(said))


def _key(error: Any, values: Mapping[str, Any]) -> Key:
    """The key that an error is about: its place, without the names that pydantic gives a union's members."""
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
    """(the value at a key, whether there is one)"""
    for part in key:
        if isinstance(values, dict) and part not in values:
            return None, False
        values = values[part]
    return values, True


def _shown(value: Any, most: int = 60) -> str:
    from trainers.config.yaml12 import inline

    text = value if isinstance(value, str) and value.isprintable() and value else inline(value)
    return text if len(text) <= most else text[:most - 1] + "…"


def known_keys(cls: type[Section], prefix: str = "") -> dict[str, str | None]:
    """Every dotted key that a config class knows, with its description."""
    found: dict[str, str | None] = {}
    for name, field in cls.model_fields.items():
        found[prefix + name] = field.description
        for section in _sections(field.annotation):
            found.update(known_keys(section, f"{prefix}{name}."))
    return found


def _sections(annotation: Any) -> list[type[Section]]:
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _keys_of(section: str, known: Mapping[str, Any]) -> str | None:
    prefix = section + "." if section else ""
    keys = [key[len(prefix):] for key in known if key.startswith(prefix) and "." not in key[len(prefix):]]
    return f"{f'`{section}`' if section else 'it'} has {', '.join(f'`{key}`' for key in keys)}" if keys else None


def _did_you_mean(words: list[str]) -> str | None:
    return f"did you mean {' or '.join(f'`{word}`' for word in words)}?" if words else None
