"""Examples for a user's loss: rows of numbers, as they are.

A row is a dict of scalars, sequences of numbers (padded on the right with 0, ``labels`` with -100) or tensors of equal
shape. What the loss is called with is one row, stacked and taken apart again by ``vmap``.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funcattrib.data import collate
from funcattrib.errors import DataError
from funcattrib.types import Batch


class Examples:
    """A sequence of examples in memory or in a data set, as a corpus."""

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        if not len(records):
            raise DataError("the list of examples is empty; give at least one")
        self.records = records
        self.lengths = np.asarray([_length(record) for record in _each(records)])

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """Stack the examples."""
        rows = [{name: _array(name, value) for name, value in self.records[i].items()} for i in indices]
        stacked = {
            name: torch.from_numpy(np.stack([row[name] for row in rows]))
            for name, value in rows[0].items()
            if value.ndim > 1
        }
        flat = [{name: value for name, value in row.items() if name not in stacked} for row in rows]
        padded: dict[str, Tensor] = collate(flat, pad_id=0) if any(flat) else {}
        return {name: tensor.to(device) for name, tensor in (padded | stacked).items()}

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Return no column: examples of numbers have no text."""
        return ()

    def metadata(self, rows: range) -> dict[str, Any]:
        """Return ids alone: what to show of numbers is the user's to say."""
        ids = [self.records[row].get("id", row) for row in rows]
        return {"id": [str(i) for i in ids]}

    def identity(self) -> dict[str, Any]:
        """Return a fingerprint of every value, and counts."""
        whole = hashlib.sha256()
        for record in _each(self.records):
            for name, value in record.items():
                array = _array(name, value)
                whole.update(f"{name}{array.dtype}{array.shape}".encode())
                whole.update(np.ascontiguousarray(array).tobytes())
        return {"fingerprint": whole.hexdigest(), "documents": len(self.lengths), "tokens": int(self.lengths.sum())}

    def notes(self) -> dict[str, Any]:
        """Return nothing further."""
        return {}


def _each(records: Sequence[Mapping[str, Any]]) -> Any:
    return (records[i] for i in range(len(records)))


def _length(record: Mapping[str, Any]) -> int:
    sizes = [array.shape[0] for array in (_array(name, value) for name, value in record.items()) if array.ndim == 1]
    return max([1, *sizes])


def _array(name: str, value: Any) -> np.ndarray:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise DataError(f"expected numbers in '{name}' for a custom loss, found {array.dtype}; turn text into tokens")
    return array.astype(np.float32) if array.dtype == np.float64 and not isinstance(value, Tensor) else array
