"""The factors of tokens' losses, where the data does not bring them token by token."""

from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from funcattrib.errors import DataError


def check_weights(dataset: datasets.Dataset, name: str) -> None:
    """Refuse a column that is not there, or holds neither numbers nor lists of them, before any row is read."""
    if name not in dataset.column_names:
        raise DataError(
            f"the data has no column '{name}'; its columns are {', '.join(dataset.column_names)}\n"
            "name the right one with `columns=Columns(token_weights_column=…)`"
        )
    kind = dataset.features.arrow_schema.field(name).type
    number = kind.value_type if is_list(kind) else kind
    if not (pa.types.is_floating(number) or pa.types.is_integer(number)):
        raise DataError(
            f"expected a number or a list of numbers in every row of '{name}', found {kind} "
            f"(row 0: {dataset[0][name]!r:.60})\nconvert the column"
        )


def is_list(kind: pa.DataType) -> bool:
    """Return whether this Arrow type holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def token_weights(values: list[Any], ids: list[np.ndarray], name: str, first_row: int, cut_at: int | None) -> list[Any]:
    """Return weights of some documents' tokens, (tokens,) float32 each: one number for all, or a list with one for
    each.

    Args:
        values: the column.
        ids: the tokens.
        first_row: number of the first row, for messages.
        cut_at: the length that documents were cut to, where they were: their lists are cut with them.
    """
    return [
        _of_row(value, len(row), name, first_row + i, cut_at)
        for i, (value, row) in enumerate(zip(values, ids, strict=True))
    ]


def _of_row(value: Any, tokens: int, name: str, row: int, cut_at: int | None) -> np.ndarray:
    weights = np.array(np.nan if value is None else value, dtype=np.float32)
    if not np.isfinite(weights).all():
        raise DataError(
            f"expected finite numbers in '{name}', found {str(value)[:60]} in row {row}\nfill or drop the row"
        )
    if weights.ndim == 0:
        return np.full(tokens, weights, dtype=np.float32)
    if len(weights) > tokens and tokens == cut_at:
        weights = weights[:tokens]
    if len(weights) != tokens:
        raise DataError(
            f"expected one number, or one for each of {tokens} tokens, in '{name}', found {len(weights)} in row {row}\n"
            "give one number a document, or ready tokens ('input_ids') with their weights"
        )
    return weights
