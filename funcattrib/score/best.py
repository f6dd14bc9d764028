"""The best N rows of every query among scores that stream by, block after block."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcattrib.query.topk import TopK


class Best(NamedTuple):
    """What is kept so far: ``values`` and ``rows`` (K, n), best first, n at most the number wanted.

    A place that no row with a finite score has taken has row -1 and value -inf.
    """

    values: Float[Tensor, "K n"]
    rows: Int[Tensor, "K n"]

    def found(self, k: int, sign: float = 1.0) -> TopK:
        """The first k places, without those that no query has filled; an unfilled one has NaN and row -1."""
        filled = int((self.rows >= 0).sum(1).max()) if self.rows.numel() else 0
        values, rows = (part[:, : min(k, filled)] for part in self)
        return TopK(torch.where(rows >= 0, sign * values, torch.nan), rows)


def nothing(queries: int) -> Best:
    """Before the first block."""
    return Best(torch.empty(queries, 0), torch.empty(queries, 0, dtype=torch.int64))


def fold(best: Best, scores: Float[Tensor, "B K"], start: int, count: int) -> Best:
    """``best`` with a block of rows from ``start`` on taken in.

    Scores that are NaN or infinite are left out: their gradient says nothing. Of equal scores the lower row is first.

    Example:
        >>> fold(nothing(1), torch.tensor([[1.0], [float("nan")], [3.0], [3.0]]), 10, 2).rows
        tensor([[12, 13]])
    """
    columns = scores.T.to(torch.float32)
    values = columns.where(columns.isfinite(), -torch.inf)
    rows = torch.arange(start, start + len(scores)).where(values > -torch.inf, -1)
    together = torch.cat([best.values, values], 1)
    kept, order = together.sort(dim=1, descending=True, stable=True)
    return Best(kept[:, :count].contiguous(), torch.cat([best.rows, rows], 1).gather(1, order[:, :count]))
