"""From rows of a data set to padded batches of tokens, and to the metadata of each example."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from funcattrib.data import (
    IGNORED,
    Columns,
    Rows,
    TokenizeReport,
    advantages,
    collate,
    fingerprint,
    number_columns,
    some_rows,
    tokenize,
)
from funcattrib.data.columns import shown_name, storable
from funcattrib.data.conversation import OPTIONS
from funcattrib.data.read import files_of
from funcattrib.data.utf8 import check_text
from funcattrib.errors import DataError
from funcattrib.types import Batch

TAKEN = ("id", "loss", "tokens", "advantage")  # columns that a store has of every document


class Documents(NamedTuple):
    """A tokenised data set: ``source`` to show, ``tokens`` as Arrow rows, and views on them.

    ``numbers`` are given to the loss beside each document's tokens, (rows,) each; a document whose ``advantage`` is NaN
    has no reward and counts with no token.
    """

    source: datasets.Dataset
    tokens: datasets.Dataset
    rows: Rows
    lengths: np.ndarray
    report: TokenizeReport
    columns: Columns
    pad_id: int
    tokenizer: PreTrainedTokenizerBase | None
    numbers: Mapping[str, np.ndarray] = MappingProxyType({})

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """Stack the documents, padded on the right to the longest of them."""
        batch = collate([self._example(i) for i in indices], pad_id=self.pad_id)
        return {name: tensor.to(device) for name, tensor in batch.items()}

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Return the columns of ``metadata`` that hold text."""
        columns = tuple(shown_name(name, TAKEN) for name in self._text_columns_read())
        return columns or (() if self.tokenizer is None else ("text",))

    @property
    def kept_columns(self) -> list[str]:
        """Return the columns of ``metadata`` that were asked for beside the text."""
        return [shown_name(name, TAKEN) for name in self._kept()]

    def metadata(self, rows: range) -> dict[str, Any]:
        """Return what a store keeps of each example to show it: its id and the columns that were read, or its tokens.

        A column called as one that the store has of every document is kept as ``data.NAME``.
        """
        part = self.source.select(rows)
        metadata = {shown_name(name, TAKEN): storable(part, name) for name in self._text_columns_read()}
        if not metadata and self.tokenizer is not None:
            metadata = {"text": [self.tokenizer.decode(self.rows[row]["input_ids"].tolist()) for row in rows]}
        ids = part["id"][:] if "id" in part.column_names else list(rows)
        metadata |= {shown_name(name, TAKEN): storable(part, name) for name in self._kept()}
        if (advantage := self._advantage()) is not None:
            metadata["advantage"] = [None if np.isnan(a) else float(a) for a in advantage[rows.start : rows.stop]]
        return {"id": [str(i) for i in ids], **metadata}

    def identity(self) -> dict[str, Any]:
        """Return columns, a fingerprint of the tokens, labels and numbers, and counts."""
        columns = asdict(self.columns)
        del columns["keep_columns"]  # where there are none, stores of earlier releases have no entry
        if self.columns.label_column is None:
            del columns["label_column"]
        return {
            **columns,
            **({"keep_columns": self.kept_columns} if self.kept_columns else {}),
            "prompt_column": self.columns.prompt,
            "fingerprint": self._fingerprint(),
            "documents": self.report.documents,
            "tokens": self.report.tokens,
        }

    def notes(self) -> dict[str, Any]:
        """Return the report of tokenising, and the rows without a reward."""
        return {"report": self.report._asdict(), "without_reward": len(self._without_reward())}

    def lines(self) -> list[str]:
        """Return the same as lines for people."""
        left_out = self._without_reward()
        note = f"no reward in {some_rows(left_out)}; kept, with a zero gradient, and not in its prompt's mean"
        return [*self.report.lines(), *([note] if len(left_out) else [])]

    def _text_columns_read(self) -> list[str]:
        """Return the data set's columns of text that were read."""
        columns = self.columns
        names = [columns.prompt, columns.completion_column, columns.conversation_column]
        return [name for name in names if name and name in self.source.column_names and name != "input_ids"]

    def _kept(self) -> list[str]:
        """Return the data set's columns that are kept to be shown, without those that are there as text or id."""
        read = {*self._text_columns_read(), "id"}
        return [name for name in self.columns.keep_columns if name not in read]

    def _example(self, row: int) -> dict[str, Any]:
        example: dict[str, Any] = {**self.rows[row], **{name: values[row] for name, values in self.numbers.items()}}
        if self._advantage() is not None and np.isnan(example["advantage"]):
            example |= {"advantage": np.float32(0), "labels": np.full_like(example["labels"], IGNORED)}
        return example

    def _without_reward(self) -> np.ndarray:
        advantage = self._advantage()
        return np.zeros(0, np.int64) if advantage is None else np.flatnonzero(np.isnan(advantage))

    def _advantage(self) -> np.ndarray | None:
        """Return the advantages where they were asked for; a column that is called so without that is the user's."""
        asked = self.columns.reward_column or self.columns.advantage_column
        return self.numbers["advantage"] if asked else None

    def _fingerprint(self) -> str:
        tokens = fingerprint(self.tokens)
        if not self.numbers:
            return tokens
        whole = hashlib.sha256(tokens.encode())
        for name, values in self.numbers.items():
            whole.update(f"{name}{values.dtype.str}".encode())
            whole.update(np.ascontiguousarray(values).data)
        return whole.hexdigest()


def read_documents(
    source: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    columns: Columns,
    *,
    max_length: int,
    truncation: bool,
    vocab_size: int | None,
    own_loss: bool = False,
    name: str = "the data",
) -> Documents:
    """Tokenise a data set and lay it out for batching; a user's loss is also given their columns of numbers."""
    read = (columns.prompt, columns.completion_column, columns.conversation_column, "id", *OPTIONS)
    missing = [name for name in columns.keep_columns if name not in source.column_names]
    if missing:
        raise DataError(
            f"{name} has no column {missing[0]!r} to keep; its columns are {', '.join(source.column_names)}"
        )
    check_text(source, filter(None, read), name, files_of(name))
    tokens, report = tokenize(
        source,
        tokenizer,
        columns,
        max_length=max_length,
        truncation=truncation,
        vocab_size=vocab_size,
        name=name,
    )
    rows = Rows(tokens)
    numbers = number_columns(source) if own_loss else {}
    numbers = {name: values for name, values in numbers.items() if name not in tokens.column_names}
    if (advantage := advantages(source, tokens, columns)) is not None:
        numbers["advantage"] = advantage
    return Documents(
        source, tokens, rows, rows.lengths, report, columns, padding_id(tokenizer, vocab_size), tokenizer, numbers
    )


def padding_id(tokenizer: Any, vocab_size: int | None) -> int:
    """Return the token that fills a batch: the tokenizer's padding, or 0 where the model has no such token.

    Example:
        >>> padding_id(None, 10)
        0
    """
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    return pad if vocab_size is None or pad < vocab_size else 0
