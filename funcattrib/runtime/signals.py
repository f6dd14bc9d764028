"""SIGTERM, as schedulers send it before they kill: work in progress is finished first.

The command line turns the signal into ``Terminated``. A block that ``defer_sigterm`` guards (one shard) is not broken
off: the signal waits for its end.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

EXIT_CODE = 143
"""128 + SIGTERM, what a shell gives for it."""


class Terminated(BaseException):
    """The exception of a SIGTERM that was received."""


@contextmanager
def terminating() -> Iterator[None]:
    """Raise ``Terminated`` where SIGTERM arrives inside the block, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def defer_sigterm() -> Iterator[None]:
    """Defer SIGTERM to the end of the block; where nobody handles it, it ends the process at once as ever."""
    handler = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    heard: list[Any] = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
    if heard:
        signal.raise_signal(signal.SIGTERM)


def _terminate(number: int, frame: Any) -> NoReturn:
    raise Terminated
