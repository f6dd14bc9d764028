"""Texts with a label each, for a model that classifies or rates them: tokens, their mask, and the label."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from funcattrib.data.batching import collate
from funcattrib.data.columns import Columns, shown_name, storable
from funcattrib.data.documents import TAKEN, Documents, read_documents
from funcattrib.data.number_columns import read_numbers
from funcattrib.data.pretokenized import ids_alone
from funcattrib.data.report import count_of, some_rows
from funcattrib.errors import DataError
from funcattrib.types import Batch


class Labels(NamedTuple):
    """The labels that a model gives.

    Attributes:
        problem: what they are; None: a class where the data has one value a row, several labels where it has a list.
        size: the number of classes, labels or numbers.
        names: a class's name → its number.
    """

    problem: Literal["single_label_classification", "multi_label_classification", "regression"] | None
    size: int
    names: Mapping[str, int]


class Labelled(NamedTuple):
    """A tokenised data set with a label a row: ``labels`` (rows,) whole numbers, or (rows, C) fractions."""

    documents: Documents
    labels: np.ndarray
    column: str
    shown: list[Any]

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each document, (rows,)."""
        return self.documents.lengths

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """Stack documents, padded on the right, with the mask of their tokens and the labels."""
        tokens = [visible(self.documents.rows[i]["input_ids"], self.documents.pad_id) for i in indices]
        batch = collate(tokens, pad_id=self.documents.pad_id)
        batch["label"] = torch.from_numpy(self.labels[list(indices)])
        return {name: tensor.to(device) for name, tensor in batch.items()}

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Return the columns of ``metadata`` that hold text."""
        return self.documents.text_columns

    def metadata(self, rows: range) -> dict[str, Any]:
        """Return what a store keeps of each document to show it: its id, its text and its label."""
        return {**self.documents.metadata(rows), self._label: self.shown[rows.start : rows.stop]}

    def identity(self) -> dict[str, Any]:
        """Return columns, a fingerprint of tokens and labels, and counts."""
        found = self.documents.identity()
        whole = hashlib.sha256(f"{found['fingerprint']}{self.labels.dtype.str}{self.labels.shape}".encode())
        whole.update(np.ascontiguousarray(self.labels).data)
        kept = [*self.documents.kept_columns, self._label]
        return {**found, "fingerprint": whole.hexdigest(), "keep_columns": kept}

    @property
    def _label(self) -> str:
        """Return the name that labels have in a store."""
        return shown_name(self.column, (*TAKEN, *self.text_columns))

    def notes(self) -> dict[str, Any]:
        """Return the report of tokenising."""
        return {"report": self.documents.report._asdict()}

    def lines(self) -> list[str]:
        """Return the same as lines for people."""
        report = self.documents.report
        cut = f"{count_of(report.truncated, 'document')} cut to the longest length allowed"
        total = (
            f"{count_of(report.documents, 'document')}, {count_of(report.tokens, 'token')}, labels in '{self.column}'"
        )
        return [total, *([cut] if report.truncated else [])]


def visible(ids: np.ndarray, pad_id: int) -> dict[str, np.ndarray]:
    """Return tokens with a mask of ones; of a document without tokens, one token of padding that is visible."""
    ids = ids if len(ids) else np.array([pad_id], dtype=np.int32)
    return {"input_ids": ids, "attention_mask": np.ones(len(ids), dtype=np.int32)}


def read_labelled(
    source: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    columns: Columns,
    labels: Labels,
    *,
    max_length: int,
    truncation: bool,
    vocab_size: int | None,
    name: str = "the data",
) -> Labelled:
    """Tokenise texts and read the label of each, from ``label``, or ``labels`` where there is none, by default.

    Raises:
        DataError: no such column, a label that the model does not give, or columns that classification has no use for.
    """
    refuse_columns(columns, "a sequence classification model", completion=False)
    column = columns.label_column or next(
        (each for each in ("label", "labels") if each in source.column_names), "label"
    )
    found = _read(source, column, labels)
    shown = storable(source, column)
    kept = (each for each in columns.keep_columns if each != column)  # which is kept as it is
    documents = read_documents(
        ids_alone(source) if columns.ready(source) else source,
        tokenizer,
        replace(columns, label_column=column, keep_columns=tuple(kept)),
        max_length=max_length,
        truncation=truncation,
        vocab_size=vocab_size,
        name=name,
    )
    return Labelled(documents, found, column, shown)


def refuse_columns(columns: Columns, model: str, *, completion: bool) -> None:
    """Refuse columns that only a causal language model has a use for.

    Raises:
        DataError: naming the first of them.
    """
    names = ["conversation_column", "token_weights_column", "reward_column", "advantage_column"]
    for name in (*names, *([] if completion else ["completion_column"])):
        if (given := getattr(columns, name)) is not None:
            raise DataError(f"`{name}` ('{given}') requires a causal language model, found {model}; leave it out")


def _read(source: datasets.Dataset, column: str, labels: Labels) -> np.ndarray:
    if column not in source.column_names:
        raise DataError(
            f"a sequence classification model requires labels, and the data has no column '{column}'; its columns are "
            f"{', '.join(source.column_names)}\n"
            "name the right one with `columns=Columns(label_column=…)`"
        )
    values = source.select_columns([column]).with_format("arrow")[:].column(column)
    if values.null_count:
        rows = np.flatnonzero(values.is_null().to_numpy())
        raise DataError(f"column '{column}' has null in place of a label in {some_rows(rows)}\ndrop these rows")
    listed = pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or _fixed(values.type)
    problem = labels.problem or ("multi_label_classification" if listed else "single_label_classification")
    if problem == "single_label_classification":
        return _classes(source, column, values, labels)
    return _fractions(source, column, values, labels, listed=listed, several=problem != "regression")


def _fixed(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind))


def _numbers(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _classes(source: datasets.Dataset, column: str, values: pa.ChunkedArray, labels: Labels) -> np.ndarray:
    """Read one class a row, (rows,) int64: its number, or its name in the model's configuration."""
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        named = values.to_pylist()
        if unknown := next(((row, each) for row, each in enumerate(named) if each not in labels.names), None):
            raise DataError(
                f"expected one of the model's labels ({', '.join(list(labels.names)[:5])}) in '{column}', found "
                f"{unknown[1]!r} in row {unknown[0]}\ngive the label's name, or its number"
            )
        return np.array([labels.names[each] for each in named], dtype=np.int64)
    if not _numbers(values.type):
        raise DataError(f"expected a class a row in '{column}', found {values.type} (row 0: {values[0].as_py()!r:.60})")
    numbers = read_numbers(source, column)
    wrong = np.flatnonzero((numbers != np.floor(numbers)) | (numbers < 0) | (numbers >= labels.size))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"expected a class from 0 to {labels.size - 1} in '{column}', found {numbers[row]:g} in row {row}\n"
            "repair or drop the row"
        )
    return numbers.astype(np.int64)


def _fractions(
    source: datasets.Dataset, column: str, values: pa.ChunkedArray, labels: Labels, *, listed: bool, several: bool
) -> np.ndarray:
    """Read several labels or numbers a row, (rows, C) float32, or one number, (rows,)."""
    what = "labels, each from 0 to 1" if several else "numbers"
    if not listed and labels.size == 1 and _numbers(values.type):
        numbers = read_numbers(source, column)[:, None]
    else:
        rows = values.to_pylist() if listed else []
        if not rows or any(len(row) != labels.size for row in rows):
            row = next((at for at, each in enumerate(rows) if len(each) != labels.size), 0)
            raise DataError(
                f"expected {labels.size} {what}, in '{column}', found {values[row].as_py()!r:.60} in row {row}\n"
                "give a list of them in every row"
            )
        try:
            numbers = np.array(rows, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"expected numbers in '{column}', found {values.type}; convert the column") from error
    wrong = ~np.isfinite(numbers) | (several & ((numbers < 0) | (numbers > 1)))
    if wrong.any():
        row, at = (int(each) for each in np.argwhere(wrong)[0])
        raise DataError(
            f"expected {what}, in '{column}', found {numbers[row, at]:g} in row {row}\nrepair or drop the row"
        )
    numbers = numbers.astype(np.float32)
    return numbers if listed else numbers[:, 0]
