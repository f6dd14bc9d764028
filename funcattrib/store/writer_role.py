"""A process's place among those that write one store, and what they all read of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from funcattrib.runtime.world import ALONE, World
from funcattrib.store.tensors import load_tensors, save_tensors


class Place(NamedTuple):
    """A writer's place among those of one store.

    Attributes:
        world: the processes that write it.
        leads: whether this one holds the lock, and writes what there is one of.
        todo: numbers of the shards to compute, the same list for all of them; None takes all that are not finished.
        part: the folder is this machine's own, and the others' shards lie in theirs.
    """

    world: World = ALONE
    leads: bool = True
    todo: Sequence[int] | None = None
    part: bool = False


def kept(file: Path, place: Place) -> dict[str, Tensor] | None:
    """The tensors of a file that rank 0 may have written, mapped on every process; None where there is none.

    A machine with a folder of its own gets a copy there.
    """
    world = place.world
    if not world.tell(file.exists() if world.leads else None):
        return None
    if any(world.gather(place.part)):
        tensors = world.share(load_tensors(file) if world.leads else None)
        if place.leads and not world.leads and tensors is not None:
            save_tensors(file, tensors)
        world.meet()
    return load_tensors(file)
