"""Shards, batches by a token budget, and right padding: pure functions on lengths and rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funcattrib.errors import DataError

IGNORED = -100
"""The label of a token whose loss is not counted, as in transformers."""


def shard_ranges(count: int, rows_per_shard: int) -> list[range]:
    """Cut `count` rows into contiguous ranges of `rows_per_shard`; the last may be shorter.

    Example:
        >>> shard_ranges(5, 2)
        [range(0, 2), range(2, 4), range(4, 5)]
    """
    if rows_per_shard < 1:
        raise DataError(f"expected at least 1 row per shard, found {rows_per_shard}")
    return [range(start, min(start + rows_per_shard, count)) for start in range(0, count, rows_per_shard)]


def plan(
    lengths: Sequence[int] | np.ndarray, token_budget: int, *, multiple: int = 1, equal_lengths: bool = False
) -> list[list[int]]:
    """Group documents into batches whose padded size stays within a token budget.

    Documents are taken longest first (ties by index), so those in a batch are of nearly one length. A batch costs its
    size times its longest document, rounded up to `multiple`; a document above the budget is a batch alone.

    Args:
        lengths: tokens of each document; an empty one counts as 1, the padding token it becomes.
        token_budget: the most tokens in a batch, padding included.
        multiple: lengths are rounded up to this, for hardware that likes it, or to have fewer shapes.
        equal_lengths: a batch holds documents of one length, and no padding.

    Returns:
        Indices into `lengths`, batch by batch; each index once.

    Example:
        >>> plan([3, 8, 4, 3], token_budget=8)
        [[1], [2, 0], [3]]
    """
    if token_budget < 1 or multiple < 1:
        raise DataError(f"expected a token budget and a multiple of at least 1, found {token_budget} and {multiple}")
    tokens = np.maximum(np.asarray(lengths, dtype=np.int64), 1)
    padded = -(-tokens // multiple) * multiple
    order = np.argsort(-tokens, kind="stable").tolist()

    batches = []
    start = 0
    while start < len(order):
        size = max(1, token_budget // int(padded[order[start]]))
        batch = order[start : start + size]
        if equal_lengths:
            batch = batch[: int((tokens[batch] == tokens[batch[0]]).sum())]
        batches.append(batch)
        start += len(batch)
    return batches


def collate(rows: Sequence[Mapping[str, Any]], *, pad_id: int, length: int | None = None) -> dict[str, Tensor]:
    """Stack examples into one right-padded batch.

    Args:
        rows: examples with the same keys. A value is one number per token (list, array or tensor), or a single number.
        pad_id: padding of `input_ids`. `labels` are padded with -100, any other column with 0.
        length: pad to this many tokens instead of the longest row's.

    Returns:
        Per-token columns of shape (B, T), single numbers of shape (B,); whole numbers int64, others float32. An
        example of no tokens becomes one padding token with label -100.

    Raises:
        DataError: where keys differ between rows, lengths within a row, or a value is no number.

    Example:
        >>> collate([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}], pad_id=0)["labels"]
        tensor([[   5,    6],
                [   7, -100]])
    """
    if not rows:
        raise DataError("a batch needs at least one example, and none was given")
    columns = {name: _numbers(name, [row[name] for row in rows]) for name in _shared_keys(rows)}
    per_token = {name: values for name, values in columns.items() if values[0].ndim == 1}
    tokens = _token_counts(per_token, len(rows))
    longest = int(tokens.max(initial=1))
    if length is not None and length < longest:
        raise DataError(f"expected examples of at most {length} tokens, found one of {longest}")

    batch = {}
    for name, values in columns.items():
        if name in per_token:
            fill = {"input_ids": pad_id, "labels": IGNORED}.get(name, 0)
            batch[name] = torch.from_numpy(_pad(values, fill, length or longest))
        else:
            batch[name] = torch.from_numpy(np.array(values, dtype=_dtype(values)))
    return batch


def _shared_keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = list(rows[0])
    for number, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            raise DataError(
                f"expected the keys {keys} in every example of a batch, found {list(row)} in example {number}"
            )
    return keys


def _numbers(name: str, values: Sequence[Any]) -> list[np.ndarray]:
    arrays = []
    for value in values:
        try:
            array = np.asarray(value)
        except ValueError:  # a ragged list
            array = np.empty((0, 0))
        if array.ndim > 1 or (array.dtype.kind not in "biuf" and array.size):
            raise DataError(f"expected a number, or one number per token, in '{name}', found {str(value)[:60]}")
        arrays.append(array)
    if len({array.ndim for array in arrays}) > 1:
        raise DataError(f"expected one number per token in '{name}' of every example, found a single number in some")
    return arrays


def _token_counts(per_token: Mapping[str, Sequence[np.ndarray]], count: int) -> np.ndarray:
    """Count the tokens of each row, on which all its per-token columns must agree."""
    counts = {name: np.fromiter(map(len, values), np.int64, count) for name, values in per_token.items()}
    if not counts:
        return np.zeros(0, dtype=np.int64)
    first, tokens = next(iter(counts.items()))
    for name, found in counts.items():
        if (found != tokens).any():
            row = int(np.flatnonzero(found != tokens)[0])
            raise DataError(
                f"expected equal lengths within an example, found {tokens[row]} in '{first}' and {found[row]} in "
                f"'{name}' (example {row} of its batch)"
            )
    return tokens


def _dtype(values: Sequence[np.ndarray]) -> type:
    # An empty list has numpy's default type, float64, and says nothing.
    return np.float32 if any(value.dtype.kind == "f" and value.size for value in values) else np.int64


def _pad(values: Sequence[np.ndarray], fill: int, length: int) -> np.ndarray:
    padded: np.ndarray = np.full((len(values), length), fill, dtype=_dtype(values))
    for row, value in zip(padded, values, strict=True):
        row[: len(value)] = value
    return padded
