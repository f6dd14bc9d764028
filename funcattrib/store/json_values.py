"""JSON values read from a run's folder: checked against the types of what they become, and against a checksum.

A file that was written before files had a checksum is read without one.
"""

import hashlib
import json
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

CHECKSUM = "checksum"
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def with_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON values with their checksum, last.

    Example:
        >>> check_checksum(with_checksum({"rows": 3}))
        >>> check_checksum({**with_checksum({"rows": 3}), "rows": 4})
        Traceback (most recent call last):
        ...
        ValueError: its checksum does not match
    """
    return {**values, CHECKSUM: _digest(values)}


def check_checksum(values: Mapping[str, Any]) -> None:
    """Compare values with the checksum among them, where there is one.

    Raises:
        ValueError: they differ.
    """
    if CHECKSUM in values and values[CHECKSUM] != _digest(values):
        raise ValueError("its checksum does not match")


def typed(hint: Any, value: Any, at: str) -> Any:
    """Return a JSON value as what a type hint says: lists become tuples, and objects named tuples, where it asks so.

    Args:
        at: the value's place, for the error.

    Raises:
        ValueError: the value is of another type, or a part of it is missing.

    Example:
        >>> typed(tuple[int, ...], [3, 4], "shape")
        (3, 4)
        >>> typed(int, "many", "rows")
        Traceback (most recent call last):
        ...
        ValueError: rows: expected a whole number, found 'many'
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else typed(next(one for one in args if one is not type(None)), value, at)
    if origin is Literal:
        _expect(value in args if isinstance(value, str) else False, " or ".join(map(repr, args)), value, at)
        return value
    if origin in (list, tuple):
        _expect(isinstance(value, list), "a list", value, at)
        return origin(typed(args[0], item, f"{at}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        _expect(isinstance(value, dict), "an object", value, at)
        return {key: typed(args[1], item, f"{at}.{key}") for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, tuple):
        _expect(isinstance(value, dict), "an object", value, at)
        hints = get_type_hints(hint)
        if missing := [name for name in hints if name not in value]:
            raise ValueError(f"{at}.{missing[0]} is missing")
        return hint(**{name: typed(one, value[name], f"{at}.{name}") for name, one in hints.items()})
    # to Python, true is a whole number
    fits = type(value) is hint or (hint is float and type(value) is int)
    _expect(fits, _WORDS.get(hint, getattr(hint, "__name__", str(hint))), value, at)
    return value


def _expect(fits: bool, what: str, value: Any, at: str) -> None:
    if not fits:
        text = repr(value)
        raise ValueError(f"{at}: expected {what}, found {text if len(text) <= 40 else f'{text[:39]}…'}")


def _digest(values: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in values.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
