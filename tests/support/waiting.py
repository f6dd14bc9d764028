"""Waiting for an event, and never for a clock that a busy machine can miss."""

import time
from collections.abc import Callable

OUTER_LIMIT = 900
"""Seconds after which a test gives up: ten times what the slowest takes on two busy cores."""


def until(happened: Callable[[], bool], pause: float = 0.01) -> None:
    """Return once ``happened()`` is true."""
    end = time.monotonic() + OUTER_LIMIT
    while not happened():
        assert time.monotonic() < end, "gave up waiting"
        time.sleep(pause)
