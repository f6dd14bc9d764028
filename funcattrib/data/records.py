"""Data as it is given in Python or by name: to one data set, or to a sequence of examples for a user's loss."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow as pa

from funcattrib.data.read import choose_split, load
from funcattrib.data.utf8 import half_character
from funcattrib.errors import DataError

Records: TypeAlias = (
    str
    | Path
    | datasets.Dataset
    | datasets.DatasetDict
    | Sequence[Mapping[str, Any]]
    | Sequence[str]
    | Mapping[str, Sequence[Any]]
)
"""A data set: its name or path, or itself; a list of rows or of texts, columns by name, or a DataFrame."""

_KINDS = "a data set, its name or path, a DataFrame, a dict of columns, or a list of dicts or of texts"


def open_records(
    data: Records, split: str | None = None, *, subset: str | None = None, text_column: str = "text"
) -> datasets.Dataset:
    """Return data as one data set.

    Args:
        data: what ``Records`` says.
        split, subset: of a data set given by name, or that has splits.
        text_column: the column's name where data are texts alone.

    Raises:
        DataError: it is nothing of the kind, or a text that is no Unicode.

    Example:
        >>> open_records(["It rains.", "It snows."])[1]
        {'text': 'It snows.'}
        >>> open_records({"text": ["It rains."], "id": [7]})[0]
        {'text': 'It rains.', 'id': 7}
    """
    if (found := _named(data, split, subset)) is not None:
        return found
    if isinstance(data, Mapping):
        _check_columns(data)
        return _converted(lambda **more: datasets.Dataset.from_dict(dict(data), **more), data)
    rows = _rows(data)
    if wrong := next((row for row in rows if not isinstance(row, str | Mapping)), None):
        raise DataError(f"expected rows as dicts or texts, found {type(wrong).__name__}\ngive {_KINDS}")
    named = [{text_column: row} if isinstance(row, str) else dict(row) for row in rows]
    if not named:
        raise DataError("the data set has no rows\ngive at least one")
    return _converted(lambda **more: datasets.Dataset.from_list(_same_keys(named), **more), named)


def open_examples(data: Any, split: str | None = None, *, subset: str | None = None) -> Sequence[Mapping[str, Any]]:
    """Return data as a sequence of examples, name → number, numbers or tensor, for a user's loss.

    Raises:
        DataError: it is nothing of the kind.

    Example:
        >>> import torch
        >>> open_examples({"x": torch.eye(2), "y": [0, 1]})[1]
        {'x': tensor([0., 1.]), 'y': 1}
    """
    if (found := _named(data, split, subset)) is not None:
        return found
    if isinstance(data, Mapping):
        _check_columns(data)
        return [dict(zip(data, values, strict=True)) for values in zip(*data.values(), strict=True)]
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        data = _rows(data)
    if len(data) and not isinstance(data[0], Mapping):
        raise DataError(
            f"expected examples as dicts for a custom loss, found {type(data[0]).__name__}\n"
            'give the loss names to read: [{"x": x, "y": y} for x, y in data]'
        )
    return data


def _named(data: Any, split: str | None, subset: str | None) -> datasets.Dataset | None:
    """Return what has a name, or is a data set already; None for everything else."""
    if isinstance(data, str | Path):
        return load(data, split, subset=subset)
    if isinstance(data, datasets.DatasetDict):
        return choose_split(data, split, "the DatasetDict")
    if isinstance(data, datasets.Dataset):
        return data
    if type(data).__name__ == "DataFrame" and hasattr(data, "columns"):
        if type(data).__module__.startswith("polars"):
            return datasets.Dataset.from_polars(data)
        return _converted(lambda: datasets.Dataset.from_pandas(data, preserve_index=False), [])
    return datasets.Dataset(data) if isinstance(data, pa.Table) else None


def _rows(data: Any) -> list[Any]:
    if isinstance(data, Iterable):
        return list(data)
    raise DataError(f"expected data, found {'None' if data is None else type(data).__name__}\ngive {_KINDS}")


def _check_columns(data: Mapping[str, Any]) -> None:
    lengths = {name: len(values) if hasattr(values, "__len__") else None for name, values in data.items()}
    columns = all(not isinstance(values, str) for values in data.values()) and None not in lengths.values()
    if not lengths or not columns or len(set(lengths.values())) > 1:
        found = ", ".join(f"{name}: {type(value).__name__}" for name, value in list(data.items())[:4])
        raise DataError(
            f"expected a dict of columns of one length, found {{{found}}}\n"
            "put one row into a list, or give every column as many values"
        )


def _same_keys(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows whose first has every key, which decides the columns."""
    keys = {name: None for row in rows for name in row}
    return rows if rows[0].keys() == keys.keys() else [{**keys, **row} for row in rows]


def _converted(convert: Any, rows: Any) -> datasets.Dataset:
    """Convert to Arrow; values of several types in one column (the arguments of tools, say) as JSON."""
    try:
        try:
            made: datasets.Dataset = convert()
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            made = convert(on_mixed_types="use_json")
        return made
    except UnicodeEncodeError as error:
        raise half_character(error.object, _place(rows, str(error.object))) from error
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"the rows cannot be made a data set: {str(error).splitlines()[0][:200]}\n"
            "give every column values of one type: text, numbers, lists or dicts of them"
        ) from error


def _place(rows: Any, text: str) -> str:
    """Return where a text stands among rows, or columns."""
    if isinstance(rows, Mapping):
        found = next((f"row {list(values).index(text)}" for values in rows.values() if text in list(values)), "")
    else:
        found = next((f"row {at}" for at, row in enumerate(rows) if text in list(row.values())), "")
    return f"the text in {found}" if found else "a text"
