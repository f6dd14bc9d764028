"""Sources with a target each, for an encoder-decoder: the tokens of both, whose lengths are independent."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from funcattrib.data.batching import IGNORED, collate
from funcattrib.data.columns import Columns
from funcattrib.data.documents import Documents, read_documents
from funcattrib.data.labelled import refuse_columns, visible
from funcattrib.data.pretokenized import ids_alone
from funcattrib.data.report import TokenizeReport, count_of
from funcattrib.data.rows import Rows
from funcattrib.data.spill import ragged
from funcattrib.errors import DataError
from funcattrib.types import Batch


class Pairs(NamedTuple):
    """Two tokenised data sets of as many rows: the sources, which show what a row is, and the targets."""

    sources: Documents
    targets: Documents

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each source and its target together, (rows,)."""
        return self.sources.lengths + self.targets.lengths

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """Stack examples, source and target padded on the right, with the mask of the source's tokens."""
        tokens = [visible(self.sources.rows[i]["input_ids"], self.sources.pad_id) for i in indices]
        batch = collate(tokens, pad_id=self.sources.pad_id)
        batch |= collate([{"labels": self.targets.rows[i]["labels"]} for i in indices], pad_id=0)
        return {name: tensor.to(device) for name, tensor in batch.items()}

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Return the columns of ``metadata`` that hold text."""
        return self.sources.text_columns

    def metadata(self, rows: range) -> dict[str, Any]:
        """Return what a store keeps of each example to show it: its id, source and target."""
        return self.sources.metadata(rows)

    def identity(self) -> dict[str, Any]:
        """Return columns, a fingerprint of sources and targets, and counts."""
        found, other = self.sources.identity(), self.targets.identity()
        both = hashlib.sha256(f"{found['fingerprint']}{other['fingerprint']}".encode()).hexdigest()
        return {**found, "fingerprint": both, "tokens": found["tokens"] + other["tokens"]}

    def notes(self) -> dict[str, Any]:
        """Return the reports of tokenising."""
        return {"report": self.sources.report._asdict(), "target_report": self.targets.report._asdict()}

    def lines(self) -> list[str]:
        """Return the same as lines for people."""
        source, target = self.sources.report, self.targets.report
        pairs = f"{count_of(source.documents, 'pair')}: {count_of(source.tokens, 'token')} of sources, "
        return [f"{pairs}{target.tokens:,} of targets", *_cut(source, "source"), *_cut(target, "target")]


def _cut(report: TokenizeReport, noun: str) -> list[str]:
    return [f"{count_of(report.truncated, noun)} cut to the longest length allowed"] if report.truncated else []


def read_pairs(
    source: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    columns: Columns,
    *,
    max_length: int,
    truncation: bool,
    vocab_size: int | None,
    name: str = "the data",
) -> Pairs:
    """Tokenise sources (the prompt column) and targets (the completion column), or take ready ``input_ids`` and
    ``labels``.

    Raises:
        DataError: no target, or columns that an encoder-decoder has no use for.
    """
    refuse_columns(columns, "an encoder-decoder", completion=True)
    limits: dict[str, Any] = {"max_length": max_length, "truncation": truncation, "vocab_size": vocab_size}
    ready = columns.ready(source)
    if ready and "labels" not in source.column_names:
        raise DataError(
            f"an encoder-decoder requires a target, and beside 'input_ids' the data has no 'labels'; its columns are "
            f"{_named(source)}\ngive the target's tokens there, or texts with `columns=Columns(completion_column=…)`"
        )
    if not ready and columns.completion_column is None:
        raise DataError(
            f"an encoder-decoder requires a target; the data's columns are {_named(source)}\n"
            "name the column of targets with `columns=Columns(completion_column=…)`"
        )
    sources = read_documents(
        ids_alone(source) if ready else source, tokenizer, replace(columns, completion_column=None), name=name, **limits
    )
    right = _ready_targets(source) if ready else source
    with _target_mode(tokenizer):
        targets = read_documents(right, tokenizer, Columns(columns.completion_column), name=name, **limits)
    return Pairs(sources._replace(columns=columns), targets)


def _named(source: datasets.Dataset) -> str:
    return ", ".join(source.column_names)


def _ready_targets(source: datasets.Dataset) -> datasets.Dataset:
    """Return the labels as tokens, without the padding after them; -100 before their end stays a label."""
    rows = [row["labels"] for row in Rows(source, ["labels"])]
    ends = [int(np.flatnonzero(row != IGNORED).max(initial=-1)) + 1 for row in rows]
    labels = [row[:end].astype(np.int32) for row, end in zip(rows, ends, strict=True)]
    tokens = [np.where(row == IGNORED, 0, row).astype(np.int32) for row in labels]
    return datasets.Dataset(pa.table({"input_ids": ragged(tokens), "labels": ragged(labels)}))


@contextmanager
def _target_mode(tokenizer: PreTrainedTokenizerBase | None) -> Iterator[None]:
    """Tokenise in the target's language, where the tokenizer has one."""
    switch, back = (getattr(tokenizer, f"_switch_to_{mode}_mode", lambda: None) for mode in ("target", "input"))
    switch()
    try:
        yield
    finally:
        back()
