"""The processes of one run, under torchrun or srun: which one this is, who takes what, sums over all of them.

Work is taken, not dealt: a counter that all processes share gives each number to one of them, so that none waits for a
slower one, and no collective operation stands inside a loop over data. Sums are made between loops, when all have met.
A process that waits looks up at short intervals, so that signals and the failure of another are heard.

``SINGLE_PROCESS`` is a run of one process: everything is its own, and torch.distributed is not asked.
"""

import itertools
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from funcattrib.errors import FuncattribError
from funcattrib.runtime.key_value_store import FAILED, KeyValueStore
from funcattrib.runtime.launcher import launched, local_rank, set_up_from_slurm
from funcattrib.runtime.signals import defer_sigterm

T = TypeVar("T")

_COLLECTIVE_TIMEOUT = timedelta(days=7)  # of a sum: processes may come to it hours apart
_EXIT_GRACE_SECONDS = 5.0  # seconds
_EXITED = "exited"


class World(NamedTuple):
    """One process among those of a run.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        local_rank: its number on its machine.
        board: what they all read and write; None where there is one process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    key_value_store: KeyValueStore | None = None

    @property
    def is_rank_zero(self) -> bool:
        """Return whether this is rank 0."""
        return self.rank == 0

    def claims(self, count: int) -> Iterator[int]:
        """Yield numbers below ``count``, in order, each on one process: whichever asks next.

        SIGTERM waits until what was given is done, and the next one is asked for.

        Example:
            >>> list(SINGLE_PROCESS.claims(3))
            [0, 1, 2]
        """
        for number in self._numbers():
            if number >= count:
                return
            with defer_sigterm():
                yield number

    def _numbers(self) -> Iterator[int]:
        if self.key_value_store is None:
            yield from itertools.count()
            return
        key = self.key_value_store.name("claim")
        while True:
            yield self.key_value_store.add(key, 1) - 1

    def counter(self) -> Callable[[int, int], tuple[int, int]]:
        """Return a function that adds to two counts and returns the sums over all processes."""
        if self.key_value_store is None:
            total = [0, 0]

            def add(first: int, second: int) -> tuple[int, int]:
                total[0] += first
                total[1] += second
                return total[0], total[1]

            return add
        key_value_store, keys = (
            self.key_value_store,
            (self.key_value_store.name("first"), self.key_value_store.name("second")),
        )
        return lambda first, second: (key_value_store.add(keys[0], first), key_value_store.add(keys[1], second))

    def barrier(self, waiting: Callable[[], object] = lambda: None) -> None:
        """Wait until all processes are here; ``waiting`` is called now and then.

        Raises:
            FuncattribError: another process failed.
        """
        if self.key_value_store is not None:
            key = self.key_value_store.name("meet")
            self.key_value_store.add(key, 1)
            self.key_value_store.until(lambda key_value_store: key_value_store.add(key, 0) >= self.size, waiting)

    def broadcast_object(self, value: Any = None, source: int = 0) -> Any:
        """Return one process's value, a JSON one, on every process; the values of the others are ignored."""
        if self.key_value_store is None:
            return value
        key = self.key_value_store.name("tell")
        if self.rank == source:
            self.key_value_store.set(key, json.dumps(value))
            return value
        self.key_value_store.until(lambda key_value_store: key_value_store.has(key))
        return json.loads(self.key_value_store.get(key))

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return every process's value, JSON ones, by rank."""
        if self.key_value_store is None:
            return [value]
        key = self.key_value_store.name("gather")
        self.key_value_store.set(f"{key}/{self.rank}", json.dumps(value))
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        self.key_value_store.until(lambda key_value_store: all(map(key_value_store.has, keys)))
        return [json.loads(self.key_value_store.get(each)) for each in keys]

    def on_rank_zero(self, function: Callable[[], T]) -> T | None:
        """Return the result of ``function``, called on rank 0; the others wait for it and have None.

        Raises:
            FuncattribError: that of rank 0, on every process.
        """
        if not self.is_rank_zero:
            if (error := self.broadcast_object()) is not None:
                raise FuncattribError(error)
            return None
        try:
            result = function()
        except FuncattribError as error:
            self.broadcast_object(str(error))
            raise
        self.broadcast_object(None)
        return result

    def all_reduce(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum over all processes, name → tensor of the same shape, equal to the bit on each of them."""
        return self._added(tensors, dist.all_reduce)

    def reduce(self, owner: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Sum over all processes, on one of them alone; the others have None."""
        sums = self._added(tensors, partial(dist.reduce, dst=owner))
        return sums if self.rank == owner else None

    def _added(self, tensors: Mapping[str, Tensor], add: Callable[[Tensor], object]) -> dict[str, Tensor]:
        """Apply ``add``, a collective in place, to a copy of each tensor."""
        if self.key_value_store is None:
            return dict(tensors)
        self.barrier()
        sums = {}
        for name, tensor in tensors.items():
            total = tensor.detach().to("cpu", copy=True).contiguous()
            with self.key_value_store.connected():
                add(total)
            sums[name] = total.to(tensor.device)
        return sums

    def broadcast(self, tensors: Mapping[str, Tensor] | None, source: int = 0) -> dict[str, Tensor] | None:
        """Return one process's tensors, or its None, on every process; on the CPU where they are another's."""
        if self.key_value_store is None:
            return None if tensors is None else dict(tensors)
        sent = tensors if self.rank == source else None
        metadata = None
        if sent is not None:
            metadata = [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in sent.items()]
        metadata = self.broadcast_object(metadata, source)
        if metadata is None:
            return None
        self.barrier()
        shared = {}
        for name, shape, dtype in metadata:
            shared[name] = torch.empty(shape, dtype=getattr(torch, dtype)) if sent is None else sent[name]
            with self.key_value_store.connected():
                dist.broadcast(shared[name].detach().cpu().contiguous(), source)
        return shared

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return every process's tensor, by rank; their last axes may differ in length."""
        if self.key_value_store is None:
            return [tensor]
        lengths = self.all_gather_object(tensor.shape[-1])
        padded = tensor.new_zeros(*tensor.shape[:-1], max(lengths), device="cpu")
        padded[..., : tensor.shape[-1]] = tensor.cpu()
        self.barrier()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with self.key_value_store.connected():
            dist.all_gather(parts, padded)
        return [part[..., :length].to(tensor.device) for part, length in zip(parts, lengths, strict=True)]

    def report_failure(self, message: str) -> bool:
        """Report to the other processes that this one stops; return whether it is the first to report."""
        if self.key_value_store is None:
            return True
        with suppress(FuncattribError):  # the connection is lost: nobody hears it
            if self.key_value_store.add(f"{FAILED}/count", 1) > 1:
                return False
            self.key_value_store.set(FAILED, f"rank {self.rank}: {message}")
        return True


SINGLE_PROCESS = World()
"""A run of one process."""


def world() -> World:
    """Return this process's place in torch.distributed's default group; ``SINGLE_PROCESS`` where none was set up."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return SINGLE_PROCESS
    return World(dist.get_rank(), dist.get_world_size(), local_rank(), _key_value_store(dist.group.WORLD))


@contextmanager
def init_distributed() -> Iterator[World]:
    """Join the processes that torchrun or srun started, if one did, and part from them at the end.

    A group that the caller has set up is taken as it is.
    """
    if not launched() or dist.is_initialized():
        yield world()
        return
    set_up_from_slurm()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"funcattrib/{agreed(store, rank, size)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_COLLECTIVE_TIMEOUT)
    here = world()
    try:
        yield here
    finally:
        _part(here)
        dist.destroy_process_group()


def agreed(store: Any, rank: int, size: int) -> str:
    """Agree on a name for this attempt, the same on all processes.

    torchrun starts a killed run again on the store of the attempt before, with all that was written there: rank 0
    makes a name, and the others take it when what they wrote under it comes back.
    """
    mine = secrets.token_hex(8)
    if rank == 0:
        store.set("attempt", mine)
        for other in range(1, size):
            store.set(f"{mine}/back/{other}", store.get(f"{mine}/{other}"))  # get waits for it
        return mine
    while True:
        name = store.get("attempt").decode()
        store.set(f"{name}/{rank}", mine)
        for _ in range(50):
            if store.check([f"{name}/back/{rank}"]):
                if store.get(f"{name}/back/{rank}").decode() == mine:
                    return str(name)
                break  # another attempt's
            time.sleep(0.01)


def _part(here: World) -> None:
    """Leave the group, rank 0 last, as it may hold the key-value store; it waits shortly for one that was killed."""
    with suppress(FuncattribError):
        assert here.key_value_store is not None, "a group of one process is not set up"
        if not here.is_rank_zero:
            here.key_value_store.add(_EXITED, 1)
            return
        until = time.monotonic() + _EXIT_GRACE_SECONDS
        while here.key_value_store.add(_EXITED, 0) < here.size - 1 and time.monotonic() < until:
            time.sleep(0.01)


@cache
def _key_value_store(group: Any) -> KeyValueStore:
    """Return a group's key-value store: it outlives a process, but not an attempt of ``--max-restarts``."""
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    return KeyValueStore(PrefixStore("funcattrib", _get_default_store()))
