"""One stage's maps behind those of the stages before it."""

from collections.abc import Mapping

from funcattrib.lift.lifting import Lowered, Lowering
from funcattrib.lift.split import each


def extend(maps: Mapping[str, Lowering], stage: Lowered) -> dict[str, Lowering] | None:
    """Every parameter's map with a stage's behind it; None where the two do not combine.

    Args:
        maps: parameter → its map so far.
        stage: leaf → its map; parameters none of whose leaves are in it are left out.
    """
    extended = {}
    for name, how in maps.items():
        if how.probe != name:
            return None
        seconds = {leaf: stage[leaf] for leaf in how.leaves if leaf in stage}
        if len(how.leaves) == 1:
            for leaf, second in seconds.items():
                probe = name if second.probe == leaf else second.probe
                extended[name] = second._replace(reading=second.reading.after(how.reading), probe=probe)
        elif any(second.probe != leaf or second.leaves != (leaf,) for leaf, second in seconds.items()):
            return None
        elif seconds:
            behind = [seconds[leaf].reading if leaf in seconds else None for leaf in how.leaves]
            extended[name] = Lowering(each(how.reading, behind), name, tuple(seconds))
    return extended
