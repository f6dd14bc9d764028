"""Ranks that hold one model together compute batch by batch together, each on its batches.

A gather needs all ranks of a group, and they may have different numbers of batches. So they go in rounds. Before each
they tell each other whether somebody has work (one number added up); in it every rank makes the same gathers, in the
order that all learn from a small batch before the first:

    work              the gathers are those of computing a batch
    none remaining    they are gone through, and what comes is dropped
    memory short      the remaining ones are gone through; the batch is then computed in parts, a round each

So no rank waits for another that is not there.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from funcattrib.errors import FuncattribError
from funcattrib.runtime.key_value_store import KeyValueStore
from funcattrib.runtime.memory import is_short, release
from funcattrib.runtime.signals import Terminated, defer_sigterm
from funcattrib.runtime.world import world
from funcattrib.types import Batch
from funcattrib.weights.sharded import Gathers, Sharded

T = TypeVar("T")
W = TypeVar("W")

_LOOK_UP = 1.0  # seconds of waiting for the others, after which one asks whether they are still there


class Lockstep:
    """Passes over work in which ranks compute together: at the end of one, each goes on while another has work.

    Args:
        gathers: of the group that holds the model; None where each process has all of it, and nothing is to be done.
        small: makes a batch that shows the order of the gathers.

    Example:
        >>> step = Lockstep()
        >>> compute = step.of(lambda batch: batch["x"] + 1)
        >>> [compute(batch) for batch in step.through([{"x": torch.tensor(1)}])]
        [tensor(2)]
    """

    def __init__(self, gathers: Gathers | None = None, small: Callable[[], Batch] | None = None) -> None:
        self._rounds = None if gathers is None or gathers.size == 1 else _Rounds(gathers, small)
        self._function: _Function | None = None
        self._passing = False  # inside ``through``

    @property
    def shared(self) -> bool:
        """Return whether there are other ranks to go together with."""
        return self._rounds is not None

    @property
    def storage(self) -> dict[str, Any] | None:
        """Return how the model is held: by how many ranks, and whether apart from where it is used."""
        if self._rounds is None:
            return None
        return {"ranks": self._rounds.gathers.size, "offloaded": self._rounds.gathers.offloaded}

    def of(self, compute: Callable[[Batch], T]) -> Callable[[Batch], T]:
        """Return ``compute`` of a batch, together with the other ranks, all of which call this.

        In the next pass, ranks that have no remaining work go through its gathers.

        Raises:
            torch.OutOfMemoryError: from what is given back: memory is short for the batch; the others have gone on.
        """
        if self._rounds is None:
            return compute
        self._function = _Function(compute)
        return partial(self._together, self._rounds, self._function)

    def through(self, work: Iterable[W]) -> Iterator[W]:
        """Yield the items of ``work``; then go through rounds without any, while another rank has some.

        Also where SIGTERM ends this rank's work, but not after an error.
        """
        self._passing = True
        try:
            yield from work
            self._drain()
        except Terminated:
            self._end()
            raise
        finally:
            self._passing = False

    def _end(self) -> None:
        """Finish, for the others, a pass that SIGTERM ends here: once, as it may be met in batch and work."""
        if self._passing:
            self._passing = False
            self._drain()

    def _together(self, rounds: "_Rounds", function: "_Function", batch: Batch) -> Any:
        try:
            with defer_sigterm():  # SIGTERM in the middle of a round would leave the others waiting for its gathers
                return rounds.compute(function, batch)
        except Terminated:
            self._end()
            raise

    def _drain(self) -> None:
        if self._rounds is None:
            return
        assert self._function is not None, "a pass begins with what is computed in it"
        with defer_sigterm():
            self._rounds.drain(self._function)


class _Function:
    """A computation of a batch, and the order of its gathers once that is known."""

    def __init__(self, compute: Callable[[Batch], Any]) -> None:
        self.compute = compute
        self.order: Sequence[Sharded] | None = None

    def learn(self, gathers: Gathers, small: Callable[[], Batch]) -> None:
        """Record the order of the gathers, once: of the second call, as the first may look at how a batch is read."""
        if self.order is not None:
            return
        with _fitting():
            for _ in range(2):
                gathers.start(None)
                self.compute(small())
                self.order = gathers.finish()


class _Rounds:
    """The rounds of one group."""

    def __init__(self, gathers: Gathers, small: Callable[[], Batch] | None) -> None:
        assert small is not None, "ranks that share a model have something to compute"
        self.gathers, self._small = gathers, small

    def compute(self, function: _Function, batch: Batch) -> Any:
        """Compute a round with work."""
        with _key_value_store().connected():
            self._somebody(1)
            function.learn(self.gathers, self._small)
            return self._computed(function, batch)

    def drain(self, function: _Function) -> None:
        """Go through rounds without work, until nobody has any."""
        with _key_value_store().connected():
            while self._somebody(0):
                function.learn(self.gathers, self._small)
                self.gathers.start(function.order)
                self._go_through()
            self.gathers.settle()

    def _computed(self, function: _Function, batch: Batch) -> Any:
        self.gathers.start(function.order)
        try:
            result = function.compute(batch)
        except Exception as error:
            if not is_short(error):
                self._go_through()
                raise
            said = str(error)
        else:
            self._go_through()
            return result
        # Outside of the handler, whose error holds all that the batch has taken.
        release(self.gathers.device)
        self._go_through()
        raise torch.OutOfMemoryError(said)

    def _go_through(self) -> list[Sharded]:
        """Go through the remaining gathers of a round."""
        with _fitting():
            return self.gathers.finish()

    def _somebody(self, here: int) -> bool:
        """Return whether any rank of the group has work, ``here`` being 1 where this one has."""
        count = torch.tensor([here], device=self.gathers.device)
        reduction = dist.all_reduce(count, group=self.gathers.group, async_op=True)
        _key_value_store().until(lambda _: _ended(reduction))  # another may have stopped with an error
        reduction.wait()
        return bool(count.item())


def _key_value_store() -> KeyValueStore:
    store = world().key_value_store
    assert store is not None, "the ranks of a group are processes of the run"
    return store


@contextmanager
def _fitting() -> Iterator[None]:
    """Raise that memory is too small, where it is short inside: nothing smaller is computed."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_short(error):
            raise
        raise FuncattribError(
            "the shortest document and two weights do not fit in the memory of one process that holds the model\n"
            "use more processes, a lower `precision`, or `offload_params`; finished work is kept"
        ) from error


def _ended(reduction: dist.Work) -> bool:
    """Return whether a sum is made, after waiting for it a while."""
    begin = time.monotonic()
    while not reduction.is_completed():
        if (waited := time.monotonic() - begin) > _LOOK_UP:
            return False
        time.sleep(min(max(waited / 16, 1e-4), 1e-2))
    return True
