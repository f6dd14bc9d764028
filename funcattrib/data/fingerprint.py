"""The contents of a tokenised data set as one hash: the same for the same tokens, wherever they are stored."""

import hashlib
from collections.abc import Iterator

import datasets
import numpy as np

from funcattrib.data.rows import list_chunks

_STORED_AS = {"input_ids": "<i4", "labels": "<i4", "token_weights": "<f4"}


def fingerprint(dataset: datasets.Dataset) -> str:
    """Hash the tokens, labels and token weights of a tokenised data set.

    Streamed over Arrow's buffers: independent of chunks, integer widths and other columns; in constant memory.

    Returns:
        64 hexadecimal digits (sha256).

    Example:
        >>> one = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]], "topic": ["a", "b"]})
        >>> fingerprint(one) == fingerprint(one.remove_columns("topic"))
        True
    """
    whole = hashlib.sha256(f"rows {len(dataset)}".encode())
    for column, dtype in _STORED_AS.items():
        if column in dataset.column_names:
            whole.update(column.encode())
            for part in _digests(dataset, column, dtype):
                whole.update(part)
    return whole.hexdigest()


def _digests(dataset: datasets.Dataset, column: str, dtype: str) -> Iterator[bytes]:
    # Lengths beside values: without them, two documents and their concatenation would be one.
    values, lengths = hashlib.sha256(), hashlib.sha256()
    for chunk in list_chunks(dataset, column):
        offsets = chunk.offsets.astype("<i8")
        values.update(np.ascontiguousarray(chunk.values[offsets[0] : offsets[-1]], dtype=dtype).data)
        lengths.update(np.diff(offsets).data)
    yield values.digest()
    yield lengths.digest()
