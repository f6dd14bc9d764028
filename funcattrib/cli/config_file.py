"""config.yaml: the settings of a run, flat, by the names of their flags.

    command: build
    run: runs/a
    model: EleutherAI/pythia-14m
    token_batch_size: 4096

`settings` writes what `load_defaults` reads.
"""

import dataclasses
import difflib
import reprlib
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from funcattrib.cli.flags import in_python_alone
from funcattrib.errors import FuncattribError
from funcattrib.runtime.yaml_mapping import read_mapping

_Config = TypeVar("_Config")

_NOT_REPEATED = {"overwrite": False}  # to repeat a run must not wipe it


def settings(config: object, *, command: str) -> dict[str, Any]:
    """Return every setting of a configuration, its groups flattened, as plain YAML values.

    Args:
        config: The dataclass a command was run with.
        command: The command's name.

    Returns:
        `{"command": command, field: value, …}`; paths are strings and tuples lists, and `overwrite` is false.

    Raises:
        ValueError: Two groups have a field of the same name (a mistake in the dataclass).

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Model:
        ...     model: str = "gpt2"
        >>> @dataclasses.dataclass(frozen=True)
        ... class Build:
        ...     run: Path
        ...     source: Model = Model()
        >>> settings(Build(Path("runs/a")), command="build")
        {'command': 'build', 'run': 'runs/a', 'model': 'gpt2'}
    """
    flat: dict[str, Any] = {"command": command}
    for name, value in _leaves(config):
        if name in flat:
            raise ValueError(f"two settings of {type(config).__name__} are named {name!r}")
        flat[name] = _plain(value)
    return {**flat, **{name: value for name, value in _NOT_REPEATED.items() if name in flat}}


def load_defaults(config_type: type[_Config], path: Path, *, command: str) -> _Config:
    """Read a config.yaml into a carrier of defaults for `tyro.cli(..., default=…)`.

    Args:
        config_type: The dataclass of the command.
        path: The file.
        command: The command's name; a file that another command wrote is refused.

    Returns:
        An object of type `config_type` whose missing required fields are `tyro.MISSING`; its `__post_init__` has not
        run, so it is not yet a configuration.

    Raises:
        FuncattribError: No such file, no YAML mapping, another command's, an unknown setting, or a value of the
            wrong type.
    """
    values = _read(path)
    writer = values.pop("command", command)
    if writer != command:
        raise FuncattribError(f"{path}: this file holds the settings of `{writer}`, not of `{command}`.")
    defaults = _carrier(config_type, values, path)
    if values:
        raise FuncattribError(_unknown(path, command, sorted(values), sorted(name for name, _ in _leaves(defaults))))
    return defaults


def _read(path: Path) -> dict[str, Any]:
    return {key.replace("-", "_"): value for key, value in read_mapping(path).items()}


def _carrier(config_type: type[_Config], values: dict[str, Any], path: Path) -> _Config:
    """Take this dataclass' fields out of `values`, around `__init__`: its checks expect a whole configuration."""
    carrier = object.__new__(config_type)
    hints = get_type_hints(config_type)
    for field in dataclasses.fields(config_type):  # type: ignore[arg-type]  # a dataclass, by the table's contract
        value: Any = tyro.MISSING
        if dataclasses.is_dataclass(hints[field.name]):
            value = _carrier(hints[field.name], values, path)
        elif field.name in values and not in_python_alone(config_type, field.name):
            value = _typed(hints[field.name], values.pop(field.name), f"{path}: {field.name}")
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        object.__setattr__(carrier, field.name, value)
    return carrier


def _leaves(config: object) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if in_python_alone(type(config), field.name):
            continue
        if dataclasses.is_dataclass(value):
            yield from _leaves(value)
        else:
            yield field.name, value


def _plain(value: object) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _typed(hint: Any, value: Any, where: str) -> Any:
    """Check a YAML value against a field's type, and turn lists into tuples and strings into paths."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _first_that_fits(args, value, where)
    if origin is Literal:
        fits, result = value in args, value
    elif origin in (tuple, list) and isinstance(value, list):
        items = args if origin is tuple and args[-1] is not Ellipsis else args[:1] * len(value)
        fits = len(items) == len(value)
        result = origin(_typed(item, entry, where) for item, entry in zip(items, value, strict=False))
    elif origin is dict and isinstance(value, dict):
        fits, result = True, {_typed(args[0], k, where): _typed(args[1], v, where) for k, v in value.items()}
    elif hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        fits, result = _as_float(value)
    elif hint is type(None):
        fits, result = value is None, None
    elif hint is Path:
        fits, result = isinstance(value, str), value if not isinstance(value, str) else Path(value)
    else:
        # bool is an int to Python, but `token_batch_size: yes` is a slip.
        fits = isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool))
        result = value
    if not fits:
        raise FuncattribError(f"{where}: expected {_name(hint)}, found {reprlib.repr(value)}.")
    return result


def _first_that_fits(hints: Sequence[Any], value: Any, where: str) -> Any:
    for hint in hints:
        try:
            return _typed(hint, value, where)
        except FuncattribError:
            continue
    raise FuncattribError(f"{where}: expected {' or '.join(map(_name, hints))}, found {reprlib.repr(value)}.")


def _as_float(value: int | str) -> tuple[bool, float]:
    """Convert to a number, also `1e-5`, which YAML reads as a string, having no point."""
    try:
        return True, float(value)
    except ValueError:
        return False, 0.0


def _name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if hint is type(None):
        return "null"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _unknown(path: Path, command: str, found: list[str], known: list[str]) -> str:
    near = difflib.get_close_matches(found[0], known, n=1)
    cure = f"did you mean `{near[0]}`?" if near else f"its settings are {', '.join(known)}."
    return f"{path}: `{command}` has no setting {', '.join(f'`{name}`' for name in found)}; {cure}"
