"""A weight of which each rank of a group holds some rows, gathered for the operation that uses it.

Shards are those of FSDP2's ``fully_shard``: of n rows over r ranks, ⌈n/r⌉ on each, fewer or none on the last. A gather
moves whole shards, padded, by one collective on raw tensors.

Every rank of the group must use the same weights in the same order; the batches it uses them on are its own
(``lockstep.py`` sees to unequal numbers of them). That order, once seen, says which weight comes next, and its gather
is begun while the one in hand is used. It also lets a rank take part in a batch's gathers that has nothing to compute.
"""

from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from funcattrib.errors import FuncattribError

_MOST_AHEAD = 16
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.13 on


class Sharded:
    """Some rows of a weight.

    Args:
        rows: this rank's, wherever they are kept.
        shape: of the whole weight.
        gathers: of the group that holds it.
        device: where the whole weight is made; by default where the rows are.
    """

    def __init__(
        self, rows: Tensor, shape: tuple[int, ...], gathers: "Gathers", device: torch.device | None = None
    ) -> None:
        self.rows, self.shape, self.gathers = rows, tuple(shape), gathers
        self.dtype, self.device = rows.dtype, device or rows.device
        gathers.offloaded |= self.device.type != rows.device.type

    def dense(self) -> Tensor:
        """Gather the whole weight: every rank of the group calls this together."""
        return self.gathers.take(self)

    def padded(self) -> Tensor:
        """Return as many rows as every rank sends, on the device of the operation."""
        rows = self.rows.to(self.device, non_blocking=True)
        short = chunk_rows(self.shape[0], self.gathers.size) - rows.shape[0]
        return torch.cat([rows, rows.new_zeros(short, *self.shape[1:])]) if short else rows.contiguous()


def divided(whole: Tensor, like: Sharded, dtype: torch.dtype) -> Sharded:
    """Copy this rank's rows of a tensor that every rank can read, to where those of ``like`` are kept.

    Example:
        >>> divided(torch.ones(3, 2), Sharded(torch.zeros(3, 2), (3, 2), Gathers(None)), torch.float32).dense().sum()
        tensor(6.)
    """
    rows = whole[slice(*row_range(whole.shape[0], like.gathers.size, like.gathers.rank))]
    rows = rows.to(like.rows.device, dtype, copy=True)
    rows = rows.pin_memory() if like.rows.is_pinned() else rows
    return Sharded(rows, tuple(whole.shape), like.gathers, like.device)


def chunk_rows(rows: int, ranks: int) -> int:
    """Return the rows of all shards but the last ones.

    Example:
        >>> [row_range(7, 4, rank) for rank in range(4)]
        [(0, 2), (2, 4), (4, 6), (6, 7)]
    """
    return -(-rows // ranks)


def row_range(rows: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return the first row of a rank's shard, and the first after it."""
    chunk = chunk_rows(rows, ranks)
    return min(rank * chunk, rows), min((rank + 1) * chunk, rows)


_Uses = tuple[ref[Sharded] | None, ref[Sharded] | None]
"""The last two; they keep no weight alive."""


class _Flying(NamedTuple):
    """A gather that has begun; ``sent`` is kept alive until it ends."""

    weight: Sharded
    whole: Tensor
    sent: Tensor
    work: Any


class Gathers:
    """The gathers of one group of ranks, each weight's begun while the one before it is used.

    At most one matrix (and the vectors used before it) is gathered ahead. A gather is begun when its memory is there:
    one that memory was short for can be taken again.

    Args:
        group: the ranks that hold one copy together; None for a single process, which holds all rows.
        device: where the group's collectives run; the CPU by default.

    Attributes:
        offloaded: whether a weight's rows are kept elsewhere than where it is used.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device | None = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.device = device or torch.device("cpu")
        self.rank = 0 if group is None else dist.get_rank(group)
        self.offloaded = False
        self._ahead: deque[_Flying] = deque()
        self._last: _Uses = (None, None)
        self._next: dict[_Uses, ref[Sharded]] = {}  # what followed two uses, last time
        self._taken: list[Sharded] | None = None  # in this round
        self._order: Sequence[Sharded] | None = None

    def take(self, weight: Sharded) -> Tensor:
        """Return the whole weight, and begin the gathers that will follow."""
        if self.size == 1:
            return weight.rows.to(weight.device)
        with temporarily_clear_interpreter_stack():  # what is begun under one transform may be used under another
            return self._take(weight)

    def start(self, order: Sequence[Sharded] | None) -> None:
        """Begin a round: what is taken is recorded, and follows ``order`` where that is known."""
        self._taken, self._order = [], order

    def finish(self) -> list[Sharded]:
        """End a round: take and drop what of its order is still to come, and return all that was taken in it."""
        taken, order = self._taken, self._order
        assert taken is not None, "a round was started"
        for weight in () if order is None else order[len(taken) :]:
            self.take(weight)
        if self.size > 1:
            self._foresee()  # what the others have begun for the next round, where memory was short for that
        self._taken = self._order = None
        return taken

    def _take(self, weight: Sharded) -> Tensor:
        self._check(weight)
        if not self._ahead or self._ahead[0].weight is not weight:
            self.settle()
            self._ahead.append(self._begin(weight))
        flying = self._ahead.popleft()
        flying.work.wait()
        if self._taken is not None:
            self._taken.append(weight)
        self._next[self._last] = ref(weight)
        self._last = (self._last[1], ref(weight))
        self._foresee()
        return flying.whole[: weight.shape[0]]

    def _check(self, weight: Sharded) -> None:
        """Refuse a weight that the other ranks are not about to use."""
        if self._order is None or self._taken is None:
            return
        at = len(self._taken)
        if at >= len(self._order) or self._order[at] is not weight:
            raise FuncattribError(
                f"this batch uses the model's weights in another order than earlier ones: first a weight of shape "
                f"{weight.shape}\nleave out `shard_params`, or make the model's forward the same for every batch"
            )

    def settle(self) -> None:
        """Wait for the gathers that were begun, and drop them."""
        while self._ahead:
            self._ahead.popleft().work.wait()

    def _foresee(self) -> None:
        """Begin the gathers up to the next matrix, as far as they are known."""
        at = self._last
        for flying in self._ahead:
            at = (at[1], ref(flying.weight))
        while len(self._ahead) < _MOST_AHEAD and not any(len(each.weight.shape) > 1 for each in self._ahead):
            known = self._next.get(at)
            following = None if known is None else known()
            if following is None:
                return
            self._ahead.append(self._begin(following))
            at = (at[1], known)

    def _begin(self, weight: Sharded) -> _Flying:
        sent = weight.padded()
        whole = sent.new_empty(self.size * sent.shape[0], *weight.shape[1:])
        return _Flying(weight, whole, sent, _all_gather(whole, sent, group=self.group, async_op=True))


@cache
def gathers_of(group: dist.ProcessGroup, device: torch.device) -> Gathers:
    """Return the gathers of a group, which has one queue: all models that it holds share them."""
    return Gathers(group, device)


def from_dtensor(name: str, tensor: Any) -> Sharded:
    """Return the rows of a parameter that ``fully_shard`` gave this rank.

    Raises:
        FuncattribError: a parameter that is not divided along its rows, over one axis of the mesh.
    """
    mesh = tensor.device_mesh
    divided = [axis for axis, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(divided) != 1 or not tensor.placements[divided[0]].is_shard(0):
        raise FuncattribError(
            f"expected {name} sharded along its rows (Shard(0), or Replicate() and Shard(0)), found "
            f"{tuple(tensor.placements)}\nshard the model with fully_shard and its default placements"
        )
    group = mesh.get_group(divided[0])
    rows = tensor.detach().to_local()
    device = rows.device
    if device.type != mesh.device_type:  # offloaded
        device = torch.device(mesh.device_type, torch.accelerator.current_device_index())
    return Sharded(rows, tuple(tensor.shape), gathers_of(group, device), device)
