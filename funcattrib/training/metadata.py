"""Metadata of a training's data set, and of each example beside its row."""

from collections.abc import Callable, Mapping
from typing import Any

import datasets

from funcattrib.data.columns import shown_name
from funcattrib.training.row_ids import Numbered

ORDER = ("step", "epoch", "position", "rank")
"""Columns that say when and where an example was trained on."""
_TAKEN = ("tokens", "loss_scale", "visits", *ORDER)  # columns that a store of a training has of every example


def data_identity(examples: Any) -> dict[str, Any]:
    """Return the manifest's entry for the data set."""
    fingerprint = getattr(examples, "_fingerprint", None)
    return {"id": "in memory", "split": None, "fingerprint": fingerprint, "documents": len(examples)}


def text_columns(examples: Any, tokenizer: Any) -> tuple[str, ...]:
    """Return the names of the columns of text that ``metadata_of`` gives."""
    names = _strings(examples) if isinstance(examples, datasets.Dataset) else []
    decoded = ("text",) if hasattr(tokenizer, "decode") else ()
    return tuple(shown_name(name, _TAKEN) for name in names) or decoded


def metadata_of(examples: Any, tokenizer: Any) -> Callable[[range], Mapping[str, Any]]:
    """Return a function from rows to columns to show: the data set's ids and texts, or its tokens as text.

    A column called as one that the store has of every example is shown as ``data.NAME``.
    """
    if isinstance(examples, datasets.Dataset):
        plain, texts = examples.with_format(None), _strings(examples)

        def of_dataset(rows: range) -> dict[str, Any]:
            some = plain[rows.start : rows.stop]
            columns = {shown_name(name, _TAKEN): some[name] for name in texts}
            if not columns and "input_ids" in some:
                columns = _decoded(some["input_ids"], tokenizer)
            return {"id": [str(i) for i in some.get("id", rows)], **columns}

        return of_dataset

    of_each = examples.examples if isinstance(examples, Numbered) else examples

    def of_sequence(rows: range) -> dict[str, Any]:
        some = [of_each[row] for row in rows]
        ids = [str(each.get("id", row)) for row, each in zip(rows, some, strict=True)]
        if not all("input_ids" in each for each in some):
            return {"id": ids}
        return {"id": ids, **_decoded([each["input_ids"] for each in some], tokenizer)}

    return of_sequence


def _strings(examples: datasets.Dataset) -> list[str]:
    """List the columns of the data set that hold text, but its ids."""
    features = examples.with_format(None).features
    return [name for name, feature in features.items() if getattr(feature, "dtype", "") == "string" and name != "id"]


def _decoded(ids: Any, tokenizer: Any) -> dict[str, Any]:
    decode = getattr(tokenizer, "decode", None)
    return {} if decode is None else {"text": [decode(each, skip_special_tokens=True) for each in ids]}
