"""Results of a search: training examples with their metadata, one by one and for a traced block."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcattrib.query.topk import TopK


class Hit(NamedTuple):
    """One training example that a search found.

    Attributes:
        rank: from 1.
        score: the inner product or cosine.
        row: in the store.
        example: its columns beside the row.
        text: its columns of text one after the other, a conversation turn by turn; of a token's row the token in its
            sentence.
        copies: rows after it that a search for unique texts left out because they have its text.
    """

    rank: int
    score: float
    row: int
    example: Mapping[str, Any]
    text: str = ""
    copies: int = 0


class Trace:
    """Results of a ``trace`` block, once it is over: ``scores`` and ``rows`` (B, k), and ``hits`` per example."""

    def __init__(self) -> None:
        self.scores: Tensor = torch.empty(0)
        self.rows: Tensor = torch.empty(0, dtype=torch.int64)
        self.hits: list[list[Hit]] = []

    def fill(self, found: TopK, hits: list[list[Hit]]) -> None:
        """Take what the search found when the block is left."""
        self.scores, self.rows, self.hits = found.values, found.rows, hits
