"""The metadata of each row's example (its id, loss, token count, columns to show), as Arrow beside the rows.

One Arrow IPC stream a shard, row for row as the shard; read memory-mapped, as one `datasets.Dataset`.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from funcattrib.errors import StoreError
from funcattrib.store.atomic import hash_file
from funcattrib.store.layout import FileFacts

if TYPE_CHECKING:
    from datasets import Dataset

_NO_TEXT = frozenset(
    ("id", "loss", "tokens", "advantage", "document", "position", "loss_scale", "visits", "step", "epoch", "rank")
)
"""Columns without text in stores whose manifest does not say which columns have it."""

Column = Sequence[Any] | np.ndarray | Tensor


def to_table(columns: Mapping[str, Column], rows: int) -> pa.Table:
    """Convert columns of equal length to an Arrow table.

    Raises:
        StoreError: A column is of another length, or of values that Arrow has no type for.
    """
    arrays = {}
    for name, column in columns.items():
        if len(column) != rows:
            raise StoreError(f"expected {rows} entries in the examples' column {name!r}, found {len(column)}")
        values = column.detach().cpu().numpy() if isinstance(column, Tensor) else column
        try:
            arrays[name] = pa.array(list(values) if isinstance(values, np.ndarray) and values.ndim > 1 else values)
        except pa.ArrowException as error:
            raise StoreError(f"the examples' column {name!r} must have values of one type: {error}") from error
    # Without columns a table has no rows either; the running number within the shard then stands for them.
    return pa.table(arrays if arrays else {"row": np.arange(rows)})


def to_bytes(table: pa.Table) -> pa.Buffer:
    """Write the table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def read_table(path: Path) -> pa.Table:
    """Read a shard's table, memory-mapped, and check all of it: Arrow would follow a damaged offset anywhere.

    Raises:
        StoreError: It cannot be read as Arrow.
    """
    try:
        with pa.memory_map(str(path)) as file:  # closed at once: the mapping lives on in the buffers, the file need not
            table = pa.ipc.open_stream(file).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StoreError(f"{path} is damaged and cannot be read as an Arrow stream: {error}") from error
    return table


def read_examples(path: Path, files: Sequence[FileFacts]) -> "Dataset":
    """Read all shards' tables as one data set, in their order, memory-mapped; each is compared with its hash.

    A column that holds nothing but None in one shard, or whole numbers where another has fractions, takes the type
    of the others.

    Raises:
        StoreError: a table is not as it was written.
    """
    from datasets import Dataset
    from datasets.fingerprint import Hasher
    from datasets.table import InMemoryTable

    tables = [_checked(path / facts.file, facts) for facts in files]
    try:
        table = pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})
    except pa.ArrowException as error:
        raise StoreError(f"the examples' columns differ between the shards of {path}: {error}") from error
    # The fingerprint is given, as to compute one would read every column.
    return Dataset(InMemoryTable(table), fingerprint=Hasher.hash([facts.sha256 for facts in files]))


def _checked(path: Path, facts: FileFacts) -> pa.Table:
    table = read_table(path)
    if hash_file(path) != facts.sha256:
        raise StoreError(f"{path} is damaged: its content hash does not match; build its shard again")
    return table


def example_text(example: Mapping[str, Any], text_columns: Sequence[str] | None) -> str:
    """Return an example's text: its columns one after the other, a conversation turn by turn.

    Args:
        example: column name → value.
        text_columns: the manifest's; None, of a store written before manifests had any, takes every column but those
            that the library wrote itself.

    Example:
        >>> example_text({"id": "7", "document": "It rains.", "loss": 1.5}, ["document"])
        'It rains.'
    """
    names = [name for name in example if name not in _NO_TEXT] if text_columns is None else text_columns
    return " ".join(_as_text(value) for name in names if (value := example.get(name)) is not None)


def _as_text(value: Any) -> str:
    if isinstance(value, str) and value.startswith('[{"'):  # a conversation that Arrow has no type for is kept as JSON
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, list):
        return "\n".join(_turn(turn) if isinstance(turn, Mapping) else str(turn) for turn in value)
    return str(value)


def _turn(message: Mapping[str, Any]) -> str:
    said = message.get("content")
    calls = message.get("tool_calls") if said is None else None
    return f"{message.get('role', '')}: {json.dumps(calls) if calls else said or ''}"
