"""Rows of a store that hold NaN or infinity: they say nothing, and are found by what each shard counted of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from funcattrib.store.reader import GradientStore

_ROWS = 1024  # looked at together
_NAMED = 5


def nonfinite_rows(store: "GradientStore") -> np.ndarray:
    """Return the numbers of the rows that hold NaN or infinity, ascending, int64; shards without any are not read.

    Example:
        >>> import tempfile, torch
        >>> from funcattrib.runs.collect import collect_gradients
        >>> loss = lambda params, example: (params["w"] * example["x"]).sum() ** 2
        >>> data = [{"x": [1.0, 3.0]}, {"x": [float("nan"), 1.0]}]
        >>> with tempfile.TemporaryDirectory() as run:
        ...     nonfinite_rows(collect_gradients((loss, {"w": torch.ones(2)}), data, path=run, quiet=True))
        array([1])
    """
    found, first, matrix = [np.empty(0, np.int64)], 0, store.matrix()
    for shard in store.shards:
        stop = first + shard.stop - shard.start
        for start in range(first, stop if shard.nonfinite else first, _ROWS):
            block = matrix.tensor(start, min(start + _ROWS, stop))
            found.append(start + (~block.isfinite().all(1)).nonzero().flatten().numpy())
        first = stop
    return np.concatenate(found)


def named_rows(store: "GradientStore", rows: Sequence[int] | np.ndarray) -> str:
    """Format the number of rows, and the first of them with their ids where those are not the numbers.

    Example:
        >>> from types import SimpleNamespace
        >>> named_rows(SimpleNamespace(examples=[{"id": "0"}, {"id": "doc-7"}]), [0, 1])
        '2 rows: 0, 1 (doc-7)'
    """
    names = []
    for row in map(int, rows[:_NAMED]):
        name = str(store.examples[row].get("id", row))
        names.append(str(row) if name == str(row) else f"{row} ({name})")
    count = f"{len(rows):,} row{'' if len(rows) == 1 else 's'}"
    return f"{count}: {', '.join(names)}{', …' if len(rows) > _NAMED else ''}"
