"""Ranks that hold one model together compute batch by batch together, each on batches of its own.

A gather needs all ranks of a group, and they may have different numbers of batches. Before every batch they tell each
other whether somebody has work (one number added up); who has none left computes a batch of its own choice, whose rows
it forgets, until nobody has any. So no rank waits for another that is not there.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from funcattrib.errors import FuncattribError
from funcattrib.lift.sharded import Gathers
from funcattrib.memory import is_short
from funcattrib.per_example import Batch
from funcattrib.signals import Terminated, undisturbed

T = TypeVar("T")
W = TypeVar("W")
Compute = Callable[[Batch], Any]


class Lockstep:
    """Passes over work in which ranks compute together: at the end of one, each goes on while another has work.

    Args:
        gathers: of the group that holds the model; None where each process has all of it, and nothing is to be done.
        idle: makes the batch that is computed when there is no work.

    Example:
        >>> step = Lockstep()
        >>> compute = step.of(lambda batch: batch["x"] + 1)
        >>> [compute(batch) for batch in step.through([{"x": torch.tensor(1)}])]
        [tensor(2)]
    """

    def __init__(self, gathers: Gathers | None = None, idle: Callable[[], Batch] | None = None) -> None:
        self._gathers = None if gathers is None or gathers.size == 1 else gathers
        self._idle = idle
        self._compute: Compute | None = None

    @property
    def shared(self) -> bool:
        """Whether there are other ranks to go together with."""
        return self._gathers is not None

    def of(self, compute: Callable[[Batch], T]) -> Callable[[Batch], T]:
        """``compute`` of a batch, together with the other ranks; in the next pass, idle ranks compute it as well."""
        if self._gathers is None:
            return compute
        self._compute = compute
        return partial(self._together, compute)

    def through(self, work: Iterable[W]) -> Iterator[W]:
        """The items of ``work``; then, while another rank has some, batches that are forgotten.

        Also where SIGTERM ends this rank's work, but not after an error.
        """
        try:
            yield from work
        except Terminated:
            self._drain()
            raise
        self._drain()

    def _drain(self) -> None:
        if self._gathers is None:
            return
        assert self._compute is not None, "a pass begins with what is computed in it"
        assert self._idle is not None, "ranks that share a model have something to compute"
        while self._somebody(0):
            self._compute(self._idle())
        self._gathers.settle()

    def _together(self, compute: Compute, batch: Batch) -> Any:
        with undisturbed():  # SIGTERM in the middle of a batch would leave the others waiting for its gathers
            self._somebody(1)
            try:
                return compute(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_short(error):
                    raise
                raise FuncattribError(
                    "expected memory for a batch, found too little on one of the processes that hold the model together"
                    "\nuse a smaller --token-batch-size: they cannot halve a batch alone; what is finished is kept"
                ) from error

    def _somebody(self, here: int) -> bool:
        """Whether any rank of the group has work, ``here`` being 1 where this one has."""
        assert self._gathers is not None
        count = torch.tensor([here], device=self._gathers.device)
        dist.all_reduce(count, group=self._gathers.group)
        return bool(count.item())
