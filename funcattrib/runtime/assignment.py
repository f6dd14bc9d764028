"""Assignment of blocks to processes: a block's second moments are summed, decomposed and applied by its owner alone."""

from collections.abc import Mapping

from funcattrib.runtime.world import World


def owners(sizes: Mapping[str, int], processes: int) -> dict[str, int]:
    """Assign each block the rank of its owner: the largest first, each to the process that has least.

    Args:
        sizes: block → what it takes, in any unit.

    Example:
        >>> owners({"a": 9, "b": 4, "c": 4}, 2)
        {'a': 0, 'b': 1, 'c': 1}
    """
    held = [0] * processes
    rank = {}
    for block in sorted(sizes, key=lambda block: -sizes[block]):
        rank[block] = held.index(min(held))
        held[rank[block]] += sizes[block]
    return {block: rank[block] for block in sizes}


def owned(sides: Mapping[str, int], world: World) -> list[str]:
    """Return the blocks of this process, in their order.

    Args:
        sides: block → D; what it takes is D × D.

    Example:
        >>> [owned({"a": 3, "b": 2, "c": 2}, World(rank, 2)) for rank in range(2)]
        [['a'], ['b', 'c']]
    """
    rank = owners({block: side**2 for block, side in sides.items()}, world.size)
    return [block for block in sides if rank[block] == world.rank]
