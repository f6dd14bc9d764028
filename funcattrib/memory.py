"""Giving freed memory back to the operating system.

Batches of many shapes leave glibc's heap in pieces: what a process holds grows with the number of batches although what
it uses does not. ``trim`` returns the free pages; elsewhere than on glibc it does nothing.
"""

import ctypes
from functools import cache
from typing import Any


def trim() -> None:
    """Return free pages of the heap (``malloc_trim``)."""
    if (release := _malloc_trim()) is not None:
        release(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None
