"""Losses that are defined in a script: another program cannot import them, and finds another script as ``__main__``."""

import sys
from collections.abc import Callable
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


def find_in_script(name: str, is_same: Callable[[Callable[..., Any]], bool]) -> Callable[..., Any]:
    """Return the loss of a store from the script that runs, where it is the function that made the store.

    Args:
        name: as in the manifest, ``__main__:function``.
        is_same: whether a function is the one that made the store.

    Raises:
        FuncattribError: the script has no such function, or another of the same name.
    """
    attribute = name.removeprefix(_SCRIPT)
    found: Any = sys.modules["__main__"]
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if callable(found) and is_same(found):
        loss: Callable[..., Any] = found
        return loss
    another = ", and the function of that name in this one is another" if callable(found) else ""
    raise FuncattribError(
        f"the store's loss `{attribute}` was defined in a script (__main__){another}\n"
        "move it to a module, or ask from Python with Attributor, in that script"
    )
