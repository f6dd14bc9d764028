"""From rows of a data set to padded batches of tokens, and to what a store tells of each example."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from funcattrib.data import Columns, Rows, TokenizeReport, collate, fingerprint, tokenize
from funcattrib.per_example import Batch

Records: TypeAlias = datasets.Dataset | Sequence[Mapping[str, Any]]


class Documents(NamedTuple):
    """A tokenised data set: ``source`` to show, ``tokens`` as Arrow rows, and views on them."""

    source: datasets.Dataset
    tokens: datasets.Dataset
    rows: Rows
    lengths: np.ndarray
    report: TokenizeReport
    columns: Columns
    pad_id: int
    tokenizer: PreTrainedTokenizerBase | None

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """The documents padded on the right to the longest of them."""
        batch = collate([self.rows[i] for i in indices], pad_id=self.pad_id)
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def shown(self, rows: range) -> dict[str, Any]:
        """What a store keeps of each example to show it: its id and the columns that were read, or else its tokens."""
        part = self.source.select(rows)
        names = [name for name in _text_columns(self.columns) if name in part.column_names and name != "input_ids"]
        shown = {name: part[name][:] for name in names}
        if not shown and self.tokenizer is not None:
            shown = {"text": [self.tokenizer.decode(self.rows[row]["input_ids"].tolist()) for row in rows]}
        ids = part["id"][:] if "id" in part.column_names else list(rows)
        return {"id": [str(i) for i in ids], **shown}

    def facts(self) -> dict[str, Any]:
        """Columns, a fingerprint of the tokens and labels, and counts."""
        return {
            "prompt_column": self.columns.prompt_column,
            "completion_column": self.columns.completion_column,
            "conversation_column": self.columns.conversation_column,
            "fingerprint": fingerprint(self.tokens),
            "documents": self.report.documents,
            "tokens": self.report.tokens,
        }

    def notes(self) -> dict[str, Any]:
        """What tokenising found."""
        return {"report": self.report._asdict()}


def read_documents(
    records: Records,
    tokenizer: PreTrainedTokenizerBase | None,
    columns: Columns,
    *,
    max_length: int,
    truncation: bool,
    vocab_size: int | None,
) -> Documents:
    """Tokenise records and lay them out for batching."""
    source = (
        records if isinstance(records, datasets.Dataset) else datasets.Dataset.from_list([dict(r) for r in records])
    )
    tokens, report = tokenize(
        source, tokenizer, columns, max_length=max_length, truncation=truncation, vocab_size=vocab_size
    )
    rows = Rows(tokens)
    pad = getattr(tokenizer, "pad_token_id", None)
    return Documents(source, tokens, rows, rows.lengths, report, columns, pad or 0, tokenizer)


def _text_columns(columns: Columns) -> list[str]:
    names = [columns.prompt_column, columns.completion_column, columns.conversation_column]
    return [name for name in names if name is not None]
