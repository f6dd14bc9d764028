"""Columns with one number a row."""

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
    columns = {}
    for name in dataset.column_names:
        if name not in _OWN and is_number(dataset, name):
            values = read_numbers(dataset, name)
            whole = str(dataset.features[name].dtype).startswith(("int", "uint", "bool")) and not np.isnan(values).any()
            columns[name] = values.astype(np.int64 if whole else np.float32)
    return columns


def is_number(dataset: datasets.Dataset, name: str) -> bool:
    """Return whether a column has one number (or truth value) a row."""
    kind = str(getattr(dataset.features[name], "dtype", ""))
    return isinstance(dataset.features[name], datasets.Value) and kind.startswith(("int", "uint", "float", "bool"))


def read_numbers(dataset: datasets.Dataset, name: str) -> np.ndarray:
    """Read a column of numbers, (rows,) float64, NaN where there is none."""
    column: pa.ChunkedArray = dataset.select_columns([name]).with_format("arrow")[:].column(name)
    return np.asarray(column.cast("float64").to_numpy(), dtype=np.float64)
