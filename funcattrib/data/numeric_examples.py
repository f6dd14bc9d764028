"""Examples for a user's loss: rows of numbers, as they are.

A row is a dict of scalars, sequences of numbers (padded on the right with 0, ``labels`` with -100) or tensors of equal
shape. What the loss is called with is one row, stacked and taken apart again by ``vmap``.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from funcattrib.data.batching import IGNORED
from funcattrib.errors import DataError
from funcattrib.types import Batch

_TOKENS = ("input_ids", "labels", "attention_mask", "token_weights")  # one value a token each


class Examples:
    """A sequence of examples in memory or in a data set, as a corpus."""

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        if not len(records):
            raise DataError("the list of examples is empty; give at least one")
        self.records = records
        shapes: dict[str, torch.Size] = {}
        self.lengths = np.asarray([_length(row, record, shapes) for row, record in enumerate(_each(records))])

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """Stack the examples, each sequence of numbers padded to the longest of its name."""
        records = [self.records[i] for i in indices]
        columns = {name: [_tensor(name, record[name]) for record in records] for name in records[0]}
        return {name: _stacked(name, values).to(device) for name, values in columns.items()}

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
                tensor = _raw(name, value)
                whole.update(f"{name}{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)}".encode())
                if tensor.numel():  # as bytes, because numpy has no bfloat16
                    whole.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return {"fingerprint": whole.hexdigest(), "documents": len(self.lengths), "tokens": int(self.lengths.sum())}

    def notes(self) -> dict[str, Any]:
        """Return nothing further."""
        return {}


def _each(records: Sequence[Mapping[str, Any]]) -> Any:
    return (records[i] for i in range(len(records)))


def _length(row: int, record: Mapping[str, Any], shapes: dict[str, torch.Size]) -> int:
    """Return the longest sequence of a row, whose names and shapes must fit those of the rows before it."""
    tensors = {name: _tensor(name, value) for name, value in record.items()}
    if shapes and shapes.keys() != tensors.keys():
        raise DataError(f"expected the keys {list(shapes)} in every example, found {list(tensors)} in row {row}")
    for name, tensor in tensors.items():
        before = shapes.setdefault(name, tensor.shape)
        if tensor.ndim != len(before) or (tensor.ndim > 1 and tensor.shape != before):
            raise DataError(
                f"expected '{name}' of one shape in every example, found {tuple(before)} in row 0 and "
                f"{tuple(tensor.shape)} in row {row}\npad or crop them to one shape, or give sequences of numbers"
            )
    tokens = {name: len(tensors[name]) for name in _TOKENS if name in tensors and tensors[name].ndim == 1}
    if len(set(tokens.values())) > 1:
        found = ", ".join(f"{count} in '{name}'" for name, count in tokens.items())
        raise DataError(f"expected columns of equal length in row {row}, found {found}\nrepair or drop the row")
    return max([1, *(len(tensor) for tensor in tensors.values() if tensor.ndim == 1)])


def _raw(name: str, value: Any) -> Tensor:
    """Convert a value to a tensor of its type; fractions that are no tensor's are float32."""
    if isinstance(value, Tensor) and not value.is_complex():
        return value.detach().cpu()
    try:
        array = np.asarray(value)
    except ValueError as error:  # a ragged list
        raise DataError(
            f"expected a number, a list of numbers or a tensor in '{name}', found lists of several lengths\n"
            "flatten them, or pad them to one length"
        ) from error
    if array.dtype.kind not in "biuf":
        raise DataError(f"expected numbers in '{name}' for a custom loss, found {array.dtype}; turn text into tokens")
    return torch.from_numpy(np.array(array, dtype=np.float32 if array.dtype == np.float64 else None))


def _tensor(name: str, value: Any) -> Tensor:
    """Convert a value: tensors of several axes keep their type, else whole numbers become int64, fractions at least
    float32.
    """
    raw = _raw(name, value)
    if raw.ndim > 1:
        return raw
    return raw.to(torch.promote_types(raw.dtype, torch.float32) if raw.is_floating_point() else torch.int64)


def _stacked(name: str, values: list[Tensor]) -> Tensor:
    # An empty list has numpy's default type and says nothing.
    dtype = reduce(torch.promote_types, [value.dtype for value in values if value.numel()] or [torch.int64])
    values = [value.to(dtype) for value in values]
    if values[0].ndim != 1:
        return torch.stack(values)
    fill = IGNORED if name == "labels" else 0
    padded = pad_sequence(values, batch_first=True, padding_value=fill)
    return padded if padded.shape[1] else padded.new_full((len(values), 1), fill)
