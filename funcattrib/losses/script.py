"""Losses that are defined in a script: another program cannot import them, and finds another script as ``__main__``."""

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

from funcattrib.errors import FuncattribError

_SCRIPT = "__main__:"


def in_script(name: str) -> bool:
    """Return whether a loss, by its manifest's name, is defined in the script that runs.

    Example:
        >>> in_script("__main__:margin"), in_script("my_losses:margin")
        (True, False)
    """
    return name.startswith(_SCRIPT)


def code_digest(function: Callable[..., Any]) -> str:
    """Compute the SHA-256 of a function's compiled code, by which a later script's function is known to be the same.

    Comments and the function's place in the file do not count.

    Example:
        >>> code_digest(lambda a: a + 1) == code_digest(lambda a: a + 1)
        True
        >>> code_digest(lambda a: a + 1) == code_digest(lambda a: a + 2)
        False
    """
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return hashlib.sha256(repr(_parts(code)).encode()).hexdigest()


def find_in_script(name: str, digest: str | None) -> Callable[..., Any]:
    """Return the loss of a store from the script that runs, where it is the function that made the store.

    Args:
        name: as in the manifest, ``__main__:function``.
        digest: of the function that made the store.

    Raises:
        FuncattribError: the script has no such function, or another of the same name.
    """
    attribute = name.removeprefix(_SCRIPT)
    found: Any = sys.modules["__main__"]
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if callable(found) and code_digest(found) == digest:
        loss: Callable[..., Any] = found
        return loss
    another = ", and the function of that name in this one is another" if callable(found) else ""
    raise FuncattribError(
        f"the store's loss `{attribute}` was defined in a script (__main__){another}\n"
        "move it to a module, or ask from Python with Attributor, in that script"
    )


def _parts(value: Any) -> Any:
    """Return what of compiled code decides what it computes, in an order that every process has."""
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, value.co_varnames, value.co_freevars, _parts(value.co_consts)
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    return tuple(map(_parts, value)) if isinstance(value, tuple) else value
