"""Columns with one number a row."""

from typing import Any

import datasets
import numpy as np
import pyarrow as pa

_OWN = ("id", "input_ids", "labels", "length")


def number_columns(dataset: datasets.Dataset) -> dict[str, np.ndarray]:
    """Read every column of one number a row, (rows,): whole numbers int64, others float32, NaN where there is none.

    Example:
        >>> number_columns(datasets.Dataset.from_dict({"text": ["a", "b"], "target": [0.5, None], "year": [1, 2]}))
        {'target': array([0.5, nan], dtype=float32), 'year': array([1, 2])}
    """
    columns: dict[str, Any] = {}
    for name in dataset.column_names:
        if name not in _OWN and is_number(dataset, name):
            columns[name] = _whole_numbers(dataset, name)
            if columns[name] is None:
                columns[name] = read_numbers(dataset, name).astype(np.float32)
    return columns


def _whole_numbers(dataset: datasets.Dataset, name: str) -> np.ndarray | None:
    """Read a column of whole numbers, int64; None where some are missing, are fractions or do not fit."""
    if str(dataset.features[name].dtype).startswith("float") or (column := _column(dataset, name)).null_count:
        return None
    try:
        return np.asarray(column.cast("int64").to_numpy(), dtype=np.int64)
    except pa.ArrowInvalid:  # an unsigned one above 2⁶³
        return None


def is_number(dataset: datasets.Dataset, name: str) -> bool:
    """Return whether a column has one number (or truth value) a row."""
    kind = str(getattr(dataset.features[name], "dtype", ""))
    return isinstance(dataset.features[name], datasets.Value) and kind.startswith(("int", "uint", "float", "bool"))


def read_numbers(dataset: datasets.Dataset, name: str) -> np.ndarray:
    """Read a column of numbers, (rows,) float64, NaN where there is none."""
    # not `safe`, which refuses whole numbers above 2⁵³ because they are rounded
    return np.asarray(_column(dataset, name).cast("float64", safe=False).to_numpy(), dtype=np.float64)


def _column(dataset: datasets.Dataset, name: str) -> pa.ChunkedArray:
    return dataset.select_columns([name]).with_format("arrow")[:].column(name)
