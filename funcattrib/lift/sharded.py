"""A weight of which each rank of a group holds some rows, gathered for the operation that uses it.

Shards are those of FSDP2's ``fully_shard``: of n rows over r ranks, ⌈n/r⌉ on each, fewer or none on the last. A gather
moves whole shards, padded, by one collective on raw tensors.

Every rank of the group must use the same weights in the same order; the batches it uses them on are its own
(``lockstep.py`` sees to unequal numbers of them). That order, once seen, says which weight comes next, and its gather
is begun while the one in hand is used.
"""

from collections import deque
from typing import Any, NamedTuple

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

    def dense(self) -> Tensor:
        """The whole weight, gathered: every rank of the group calls this together."""
        return self.gathers.take(self)

    def padded(self) -> Tensor:
        """As many rows as every rank sends, on the device of the operation."""
        rows = self.rows.to(self.device, non_blocking=True)
        short = chunk_rows(self.shape[0], self.gathers.size) - rows.shape[0]
        return torch.cat([rows, rows.new_zeros(short, *self.shape[1:])]) if short else rows.contiguous()


def divided(whole: Tensor, like: Sharded, dtype: torch.dtype) -> Sharded:
    """This rank's rows of a tensor that every rank can read, as a copy, kept where those of ``like`` are.

    Example:
        >>> divided(torch.ones(3, 2), Sharded(torch.zeros(3, 2), (3, 2), Gathers(None)), torch.float32).dense().sum()
        tensor(6.)
    """
    rows = whole[slice(*row_range(whole.shape[0], like.gathers.size, like.gathers.rank))]
    rows = rows.to(like.rows.device, dtype, copy=True)
    rows = rows.pin_memory() if like.rows.is_pinned() else rows
    return Sharded(rows, tuple(whole.shape), like.gathers, like.device)


def chunk_rows(rows: int, ranks: int) -> int:
    """Rows of all shards but the last ones.

    Example:
        >>> [row_range(7, 4, rank) for rank in range(4)]
        [(0, 2), (2, 4), (4, 6), (6, 7)]
    """
    return -(-rows // ranks)


def row_range(rows: int, ranks: int, rank: int) -> tuple[int, int]:
    """First row of a rank's shard, and the first after it."""
    chunk = chunk_rows(rows, ranks)
    return min(rank * chunk, rows), min((rank + 1) * chunk, rows)


class _Flying(NamedTuple):
    """A gather that has begun; ``sent`` is kept alive until it ends."""

    weight: Sharded
    whole: Tensor
    sent: Tensor
    work: Any


class Gathers:
    """The gathers of one group of ranks, each weight's begun while the one before it is used.

    At most one matrix (and the vectors used before it) is gathered ahead.

    Args:
        group: the ranks that hold one copy together; None for a single process, which holds all rows.
        device: where the group's collectives run; the CPU by default.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device | None = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.device = device or torch.device("cpu")
        self.rank = 0 if group is None else dist.get_rank(group)
        self._ahead: deque[_Flying] = deque()
        self._last: tuple[Sharded | None, Sharded | None] = (None, None)
        self._next: dict[tuple[Sharded | None, Sharded | None], Sharded] = {}  # what followed two uses, last time

    def take(self, weight: Sharded) -> Tensor:
        """The whole weight; the gathers that will follow are begun."""
        if self.size == 1:
            return weight.rows.to(weight.device)
        with temporarily_clear_interpreter_stack():  # what is begun under one transform may be used under another
            return self._take(weight)

    def _take(self, weight: Sharded) -> Tensor:
        if not self._ahead or self._ahead[0].weight is not weight:
            self.settle()
            self._ahead.append(self._begin(weight))
        flying = self._ahead.popleft()
        flying.work.wait()
        self._next[self._last] = weight
        self._last = (self._last[1], weight)
        self._foresee()
        return flying.whole[: weight.shape[0]]

    def settle(self) -> None:
        """Wait for what was begun, and let it go."""
        while self._ahead:
            self._ahead.popleft().work.wait()

    def _foresee(self) -> None:
        """Begin the gathers up to the next matrix, as far as they are known."""
        at = self._last
        for flying in self._ahead:
            at = (at[1], flying.weight)
        while len(self._ahead) < _MOST_AHEAD and not any(len(each.weight.shape) > 1 for each in self._ahead):
            following = self._next.get(at)
            if following is None:
                return
            self._ahead.append(self._begin(following))
            at = (at[1], following)

    def _begin(self, weight: Sharded) -> _Flying:
        sent = weight.padded()
        whole = sent.new_empty(self.size * sent.shape[0], *weight.shape[1:])
        return _Flying(weight, whole, sent, _all_gather(whole, sent, group=self.group, async_op=True))


def from_dtensor(name: str, tensor: Any, gathers: dict[Any, Gathers]) -> Sharded:
    """What ``fully_shard`` left of a parameter on this rank.

    Args:
        gathers: by group, filled here: the weights of one group share theirs.

    Raises:
        FuncattribError: a parameter that is not divided along its rows, over one axis of the mesh.
    """
    mesh = tensor.device_mesh
    divided = [axis for axis, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(divided) != 1 or not tensor.placements[divided[0]].is_shard(0):
        raise FuncattribError(
            f"expected {name} sharded along its rows (Shard(0), or Replicate() and Shard(0)), found "
            f"{tuple(tensor.placements)}\nshard the model with fully_shard and no placements of your own"
        )
    group = mesh.get_group(divided[0])
    rows = tensor.detach().to_local()
    device = rows.device
    if device.type != mesh.device_type:  # offloaded
        device = torch.device(mesh.device_type, torch.accelerator.current_device_index())
    if group not in gathers:
        gathers[group] = Gathers(group, device)
    return Sharded(rows, tuple(tensor.shape), gathers[group], device)
