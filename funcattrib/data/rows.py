"""Examples straight from Arrow's buffers: no Python list, no copy, until a batch is padded."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from funcattrib.errors import DataError


class ListChunk(NamedTuple):
    """One Arrow chunk of a list column: document i is `values[offsets[i]:offsets[i + 1]]`."""

    values: np.ndarray
    offsets: np.ndarray


class Rows(Sequence[dict[str, np.ndarray]]):
    """A tokenised data set as a sequence of examples, each a dict of read-only views into Arrow's memory.

    `collate([rows[i] for i in batch], pad_id=0)` is the way from disk to a batch: a few milliseconds for 1000 documents
    of 500 tokens, where going through `datasets`' own rows takes a hundred times as long.

    Args:
        dataset: with a list column `input_ids`, as `tokenize` returns it.
        columns: the per-token columns to read; by default `input_ids`, and `labels` and `token_weights` if present.
    """

    def __init__(self, dataset: datasets.Dataset, columns: Sequence[str] | None = None) -> None:
        names = columns or [name for name in ("input_ids", "labels", "token_weights") if name in dataset.column_names]
        missing = [name for name in names if name not in dataset.column_names]
        if missing or not names:
            raise DataError(
                f"expected a tokenised data set with {missing or ['input_ids']}, found {dataset.column_names}"
            )
        self._chunks = {name: list(list_chunks(dataset, name)) for name in names}
        self._starts = {
            name: np.cumsum([0, *(len(chunk.offsets) - 1 for chunk in chunks)]) for name, chunks in self._chunks.items()
        }
        self._count = len(dataset)

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each example, (rows,) int64."""
        chunks = next(iter(self._chunks.values()))
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(chunk.offsets) for chunk in chunks)])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:  # type: ignore[override]  # no slices: batches are index lists
        if not 0 <= index < self._count:
            raise IndexError(index)
        example = {}
        for name, starts in self._starts.items():
            number = int(starts.searchsorted(index, side="right")) - 1
            chunk, row = self._chunks[name][number], index - starts[number]
            example[name] = chunk.values[chunk.offsets[row] : chunk.offsets[row + 1]]
        return example


def list_chunks(dataset: datasets.Dataset, column: str) -> Iterator[ListChunk]:
    """Yield the chunks of a list column of numbers, in row order, as numpy views on Arrow's buffers."""
    table: pa.Table = dataset.select_columns([column]).with_format("arrow")[:]
    for chunk in table.column(column).chunks:
        if pa.types.is_fixed_size_list(chunk.type):
            chunk = chunk.cast(pa.list_(chunk.type.value_type))
        if not (pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type)):
            raise DataError(f"expected a list of numbers in every row of '{column}', found {chunk.type}")
        if len(chunk):
            # `values` knows nothing of a slice; the offsets point into it all the same.
            yield ListChunk(chunk.values.to_numpy(zero_copy_only=False), chunk.offsets.to_numpy().astype(np.int64))
