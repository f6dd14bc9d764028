"""Memory that is short at a chosen gather of a batch, on one of the processes that hold a model together."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from funcattrib.weights import lockstep
from funcattrib.weights.sharded import Gathers, Sharded


class Short:
    """Memory that is short on this rank: for batches above ``most`` tokens, at one of their gathers.

    Args:
        at: ``use`` fails after the gather, for the operation; ``gather`` before it, for the gathered weight itself.
        moment: which of the batch's gathers, from 0; beyond the last, none fails.
    """

    def __init__(self, most: int, at: str, moment: int) -> None:
        self.most, self.at, self.moment = most, at, moment
        self.failed, self.kept = 0, 0
        self._left: int | None = None  # gathers until this batch fails
        self._held: weakref.ref | None = None  # what the batch in hand has taken
        self._fallen = False  # and that it has failed

    @contextmanager
    def __call__(self) -> Iterator["Short"]:
        take, padded, made = Gathers.take, Sharded.padded, lockstep._Function.__init__

        def used(gathers: Gathers, weight: Sharded) -> torch.Tensor:
            self._look()
            whole = take(gathers, weight)
            self._count("use")
            return whole

        def sent(weight: Sharded) -> torch.Tensor:
            self._look()
            self._count("gather")
            return padded(weight)

        def init(function: lockstep._Function, compute: Callable) -> None:
            made(function, lambda batch: self._compute(compute, batch))

        with (
            mock.patch.object(Gathers, "take", used),
            mock.patch.object(Sharded, "padded", sent),
            mock.patch.object(lockstep._Function, "__init__", init),
        ):
            yield self

    def _compute(self, compute: Callable, batch: dict) -> object:
        held = torch.zeros(1)
        self._left = self.moment if batch["input_ids"].numel() > self.most else None
        self._held, self._fallen = weakref.ref(held), False
        result = compute(batch)
        self._left = None
        return result

    def _count(self, at: str) -> None:
        if at != self.at or self._left is None:
            return
        self._left -= 1
        if self._left < 0:
            self._left, self._fallen = None, True
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def _look(self) -> None:
        """After a failure nothing of the batch is held any more."""
        if self._fallen and self._held is not None:
            self.kept += self._held() is not None
