"""Which process owns which block: its second moments are summed, decomposed and applied there, and nowhere else."""

from collections.abc import Mapping

from funcattrib.distributed import World


def owned(sides: Mapping[str, int], world: World) -> list[str]:
    """The blocks of this process, in their order: the largest first, each to the process that has least.

    Args:
        sides: block → D; what it takes is D × D.

    Example:
        >>> [owned({"a": 3, "b": 2, "c": 2}, World(rank, 2)) for rank in range(2)]
        [['a'], ['b', 'c']]
    """
    held = [0] * world.size
    mine = set()
    for block in sorted(sides, key=lambda block: -sides[block]):
        least = held.index(min(held))
        held[least] += sides[block] ** 2
        if least == world.rank:
            mine.add(block)
    return [block for block in sides if block in mine]
