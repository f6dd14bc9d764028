"""Short texts and counts shared by the processes of a run, by names that mean the same to all of them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from funcattrib.errors import FuncattribError

FAILED = "failed"
"""Key under which a process that stops writes its message."""


class KeyValueStore:
    """Short texts and counts shared by the processes of a run: torch's key-value store, with names given out in order.

    Every process asks for the same names in the same order, so that a name means the same to all of them.
    """

    def __init__(self, store: Any) -> None:
        self._store, self._given = store, 0

    def name(self, what: str) -> str:
        """Return a name that was not given before."""
        self._given += 1
        return f"{self._given}/{what}"

    def add(self, key: str, amount: int) -> int:
        """Add to a count and return its sum."""
        return int(self._asked(lambda: self._store.add(key, amount)))

    def set(self, key: str, text: str) -> None:
        """Write a text."""
        self._asked(lambda: self._store.set(key, text))

    def get(self, key: str) -> str:
        """Read a text that is there."""
        return str(self._asked(lambda: self._store.get(key)).decode())

    def has(self, key: str) -> bool:
        """Return whether a text is there."""
        return bool(self._asked(lambda: self._store.check([key])))

    def until(self, done: Callable[["KeyValueStore"], bool], waiting: Callable[[], object] = lambda: None) -> None:
        """Poll, up to half a second apart, until ``done``."""
        pause = 0.001
        while not done(self):
            self.check()
            waiting()
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def check(self) -> None:
        """Raise the message of another process that stopped."""
        if self.has(FAILED):
            raise FuncattribError(
                f"another process of this run stopped with an error\n{self.get(FAILED)}\n"
                "run the same command again: finished shards are kept"
            )

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Raise, for collectives that fail inside because another process is gone, that it is, and why where known.

        Raises:
            FuncattribError: the other's own words, or that the connection is lost.
        """
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
                raise
            self.check()
            raise _lost(error) from error

    def _asked(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except (RuntimeError, dist.DistNetworkError) as error:  # whoever keeps the store is gone
            raise _lost(error) from error


def _lost(error: Exception) -> FuncattribError:
    return FuncattribError(
        f"the connection to the other processes of this run was lost ({str(error).splitlines()[0][:80]})\n"
        "run the same command again: finished shards are kept"
    )
