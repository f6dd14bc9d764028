"""The parts of a manifest: a leaf's place in a row, the contents of a file and of a shard. With their JSON values."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class LeafColumns(NamedTuple):
    """The place of a leaf in a row: columns start to stop (exclusive) hold its entries, flattened row-major."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


class FileFacts(NamedTuple):
    """A file as it was written: its name relative to the store, its size in bytes, the hex SHA-256 of its content."""

    file: str
    bytes: int
    sha256: str


class Shard(NamedTuple):
    """A finished shard: rows start to stop (exclusive) of the data set, and the files that hold them."""

    file: str
    start: int
    stop: int
    bytes: int
    sha256: str
    examples: FileFacts
    scale: FileFacts | None = None
    clipped: int = 0
    nonfinite: int = 0


def lay_out(shapes: Mapping[str, Sequence[int]]) -> list[LeafColumns]:
    """Lay leaves side by side in one row, in the order given.

    Args:
        shapes: leaf name -> shape without the batch axis.

    Example:
        >>> lay_out({"a.weight": (2, 3), "b.bias": (4,)})[1]
        LeafColumns(name='b.bias', shape=(4,), start=6, stop=10)
    """
    leaves, start = [], 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        leaves.append(LeafColumns(name, tuple(shape), start, stop))
        start = stop
    return leaves


def shard_to_json(shard: Shard) -> dict[str, Any]:
    """Convert a shard's facts to JSON values."""
    scale = shard.scale._asdict() if shard.scale else None
    return {**shard._asdict(), "examples": shard.examples._asdict(), "scale": scale}
