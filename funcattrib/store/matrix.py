"""Rows over many shards as one array that is read on demand: slices are views of the mapped files where they can be.

Every access maps the shards it needs again. That costs microseconds and holds neither file descriptors nor memory, so
a store may have any number of shards.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from funcattrib.errors import StoreError
from funcattrib.store.encode import STORAGE, TORCH, decode

Index = int | slice | Sequence[int] | np.ndarray


class ShardBlock(NamedTuple):
    """The rows that one shard contributes: first row here, their number, the files."""

    start: int
    rows: int
    file: Path
    scale: Path | None


class LazyMatrix:
    """(rows, *shape) over the shards of a store: indexed like an array, read when indexed.

    `m[i]`, `m[a:b]`, `m[[3, 1]]` and `m[:, a:b]` are NumPy arrays: of the stored dtype for float16 and float32, where a
    slice within one shard is a read-only view of the file; decoded to float32 for bfloat16 and int8. `m.tensor(a, b)`
    is float32 always, `m.blocks(n)` streams.

    Attributes:
        shape: (rows, *shape of what a row holds).
        dtype: of what indexing gives.
    """

    def __init__(
        self, parts: Sequence[ShardBlock], dtype: str, width: int, columns: range, inner: tuple[int, ...]
    ) -> None:
        self._parts = list(parts)
        self._starts = np.array([part.start for part in parts], dtype=np.int64)
        self._stored = dtype
        self._width = width
        self._columns = columns
        rows = parts[-1].start + parts[-1].rows if parts else 0
        self.shape: tuple[int, ...] = (rows, *inner)
        self.dtype = np.dtype(np.float16 if dtype == "float16" else np.float32)

    @property
    def ndim(self) -> int:
        """Return the number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"LazyMatrix({' × '.join(f'{n:,}' for n in self.shape)}, {self._stored}, {len(self._parts)} shards)"

    def __getitem__(self, index: Any) -> np.ndarray:
        rows, *rest = index if isinstance(index, tuple) else (index,)
        if rows is Ellipsis:
            rows, rest = slice(None), [*[slice(None)] * (self.ndim - 1 - len(rest)), *rest]
        if not all(isinstance(at, int | np.integer | slice) or at is Ellipsis for at in rest):
            raise TypeError("beyond the first axis, a LazyMatrix takes numbers and slices; index the result instead")
        if len(rest) == 1 and isinstance(rest[0], slice) and self.ndim == 2:
            columns = self._columns[rest[0]]
            if columns.step == 1:  # only these are then decoded
                return LazyMatrix(self._parts, self._stored, self._width, columns, (len(columns),))[rows]
        if isinstance(rows, int | np.integer):
            row = self._row(int(rows))
            one: np.ndarray = self._slice(row, row + 1)[(0, *rest)]
            return one
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            found = self._slice(start, stop) if step == 1 else self._take(np.arange(start, stop, step))
        else:
            found = self._take(self._rows(rows))
        return found[(slice(None), *rest)]

    def __iter__(self) -> Iterator[np.ndarray]:
        for part in self._parts:
            yield from self._array(part, slice(0, part.rows))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = self[:]
        return found if dtype is None else found.astype(dtype, copy=False)

    def tensor(self, start: int = 0, stop: int | None = None) -> Float32[Tensor, "R *shape"]:
        """Return rows start to stop (exclusive), decoded to float32, in new memory."""
        start, stop, _ = slice(start, stop).indices(len(self))
        out = torch.empty(max(stop - start, 0), *self.shape[1:])
        for part, span in self._within(start, stop):
            at = part.start + span.start - start
            stored, scale = self._read(part, span)
            out[at : at + len(stored)] = stored if scale is None else decode(stored, self._stored, scale)
        return out

    def blocks(self, rows: int) -> Iterator[Float[Tensor, "R *shape"]]:
        """Yield all rows in order, in blocks of at most `rows` that never span two shards.

        A block of a float16, float32 or bfloat16 store is that part of the file, mapped, in the stored dtype: nothing
        is copied, and what is written to it never reaches the file. Of an int8 store it is decoded to float32.
        """
        if rows < 1:
            raise StoreError(f"expected blocks of at least one row, found {rows}")
        for part in self._parts:
            stored, scale = self._read(part, slice(0, part.rows))
            for start in range(0, part.rows, rows):
                block = stored[start : start + rows]
                yield block if scale is None else decode(block, self._stored, scale[start : start + rows])

    def _slice(self, start: int, stop: int) -> np.ndarray:
        found = [self._array(part, span) for part, span in self._within(start, stop)]
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.empty((0, *self.shape[1:]), self.dtype)

    def _take(self, rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(owner):
            part, wanted = self._parts[number], np.flatnonzero(owner == number)
            out[wanted] = self._array(part, rows[wanted] - part.start)
        return out

    def _array(self, part: ShardBlock, rows: slice | np.ndarray) -> np.ndarray:
        stored, scale = self._read(part, rows)
        if self._stored in ("float16", "float32"):
            found: np.ndarray = stored.numpy()
            found.flags.writeable = False
            return found
        return decode(stored, self._stored, scale).numpy()

    def _read(self, part: ShardBlock, rows: slice | np.ndarray) -> tuple[Tensor, np.ndarray | None]:
        """Read rows of a part with the wanted columns, in the stored dtype, and for int8 their scales."""
        stored = map_rows(part.file, self._stored, (part.rows, self._width))
        found = stored[:, self._columns.start : self._columns.stop][
            rows if isinstance(rows, slice) else torch.from_numpy(rows)
        ]
        scale = None if part.scale is None else read_scale(part.scale, part.rows)[rows]
        return found.reshape(len(found), *self.shape[1:]), scale

    def _within(self, start: int, stop: int) -> Iterator[tuple[ShardBlock, slice]]:
        if start < stop:
            first = int(np.searchsorted(self._starts, start, side="right")) - 1
            for part in self._parts[first:]:
                if part.start >= stop:
                    return
                yield part, slice(max(start - part.start, 0), min(stop - part.start, part.rows))

    def _row(self, row: int) -> int:
        if not -len(self) <= row < len(self):
            raise IndexError(f"expected a row below {len(self)}, found {row}")
        return row % len(self)

    def _rows(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        index = np.asarray(rows)
        if index.dtype == bool:
            if index.shape != (len(self),):
                raise IndexError(f"expected a mask of {len(self)} rows, found one of shape {index.shape}")
            return np.flatnonzero(index)
        if index.ndim != 1 or not (np.issubdtype(index.dtype, np.integer) or not index.size):
            raise TypeError(f"expected a number, a slice, or a list of rows, found {rows!r}")
        wrong = index[(index < -len(self)) | (index >= len(self))]
        if wrong.size:
            raise IndexError(f"expected rows below {len(self)}, found {wrong[0]}")
        return index.astype(np.int64) % max(len(self), 1)


def map_rows(file: Path, dtype: str, shape: tuple[int, int]) -> Tensor:
    """Map the rows of a shard's file: (rows, D) in the stored dtype. Writing to it changes no file.

    Raises:
        StoreError: The file is missing, cut short, or holds something else.
    """
    try:
        with open(file, "rb") as opened:
            offset = check_header(opened, STORAGE[dtype], shape)
            size = opened.seek(0, 2)
    except (OSError, ValueError) as error:
        raise StoreError(f"{file} is damaged and cannot be read as the rows of a shard: {error}") from error
    count = shape[0] * shape[1]
    if size != offset + count * TORCH[dtype].itemsize:
        raise StoreError(
            f"{file} is damaged: expected {offset + count * TORCH[dtype].itemsize:,} bytes, found {size:,}"
        )
    # Torch's mapping keeps no file descriptor, NumPy's does: with one for every shard they would run out.
    mapped = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    return mapped[offset:].view(TORCH[dtype]).view(shape)


def read_scale(file: Path, rows: int) -> np.ndarray:
    """Read the scale of every row of an int8 shard."""
    try:
        with open(file, "rb") as opened:
            check_header(opened, STORAGE["float32"], (rows,))
            content = opened.read()
        if len(content) != 4 * rows:
            raise ValueError(f"expected {4 * rows:,} bytes of scales, found {len(content):,}")
    except (OSError, ValueError) as error:
        raise StoreError(f"{file} is damaged and cannot be read as the scales of a shard: {error}") from error
    return np.frombuffer(content, STORAGE["float32"])


def check_header(file: Any, descr: str, shape: tuple[int, ...]) -> int:
    """Check the header of an open .npy file; return the offset of its data. ValueError where it says something else."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"a .npy file of version {version}")
    try:
        found, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # NumPy reads it as Python's text, whose errors are of many kinds
        raise ValueError(f"its header is damaged ({type(error).__name__})") from error
    if found != shape or fortran or dtype != np.dtype(descr):
        raise ValueError(
            f"{dtype} of shape {found}{' in Fortran order' if fortran else ''}, expected {descr} of {shape}"
        )
    return int(file.tell())
