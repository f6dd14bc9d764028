"""The role of a process among those that write one store, and the files that they all read of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from funcattrib.runtime.world import SINGLE_PROCESS, World
from funcattrib.store.tensors import load_tensors, save_tensors


class WriterRole(NamedTuple):
    """The role of a writer among those of one store.

    Attributes:
        world: the processes that write it.
        holds_lock: whether this one holds the lock, and writes what there is one of.
        todo: numbers of the shards to compute, the same list for all of them; None takes all that are not finished.
        part: the folder is this machine's own, and the others' shards lie in theirs.
    """

    world: World = SINGLE_PROCESS
    holds_lock: bool = True
    todo: Sequence[int] | None = None
    part: bool = False


def kept(file: Path, role: WriterRole) -> dict[str, Tensor] | None:
    """Load the tensors of a file that rank 0 may have written, mapped on every process; None where there is none.

    A machine that does not share the folder gets a copy there.
    """
    world = role.world
    if not world.broadcast_object(file.exists() if world.is_rank_zero else None):
        return None
    if any(world.all_gather_object(role.part)):
        tensors = world.broadcast(load_tensors(file) if world.is_rank_zero else None)
        if role.holds_lock and not world.is_rank_zero and tensors is not None:
            save_tensors(file, tensors)
        world.barrier()
    return load_tensors(file)
