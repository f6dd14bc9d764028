"""Retrieval measures of a ranking: mean reciprocal rank and recall at k.

    MRR         mean over queries of 1 / rank of the first relevant row
    Recall@k    mean over queries of (relevant rows among the first k) / (relevant rows)

Ties: rows of equal score count in random order, and the figures are the exact expectation over that order. So they do
not depend on the order of the rows, nothing is gained by constant scores, and a constant score is a random ranking.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from funcattrib.errors import FuncattribError


def mean_reciprocal_rank(scores: Float[Tensor, "K N"], relevant: Bool[Tensor, "K N"]) -> float:
    """Compute the mean over queries of the reciprocal rank of the first relevant row.

    Args:
        scores: (K, N), higher is better; -inf for rows that a search did not return.
        relevant: (K, N), what ought to be found.

    Returns:
        Between 0 and 1. A query without a relevant row is left out.

    Raises:
        FuncattribError: shapes that differ, NaN scores, no relevant row at all.

    Example:
        >>> mean_reciprocal_rank(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[False, True, False]]))
        0.5
        >>> mean_reciprocal_rank(torch.zeros(1, 2), torch.tensor([[True, False]]))  # first or second: (1 + 1/2) / 2
        0.75
    """
    scores, relevant = _checked(scores, relevant)
    best = scores.masked_fill(~relevant, float("-inf")).amax(1, keepdim=True)
    above = (scores > best).sum(1)
    tied = scores == best
    return float(_expected_reciprocal(above, tied.sum(1), (tied & relevant).sum(1)).mean())


def recall_at(scores: Float[Tensor, "K N"], relevant: Bool[Tensor, "K N"], k: int) -> float:
    """Compute the mean over queries of the share of its relevant rows that are among the k best.

    Args:
        scores: (K, N), higher is better; -inf for rows that a search did not return.
        relevant: (K, N), what ought to be found.
        k: how many rows are looked at, at least 1.

    Returns:
        Between 0 and 1; below 1 where a query has more than k relevant rows. A query without one is left out.

    Raises:
        FuncattribError: shapes that differ, NaN scores, no relevant row at all, k below 1.

    Example:
        >>> recall_at(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[True, False, True]]), k=2)
        0.5
    """
    if k < 1:
        raise FuncattribError(f"expected k of at least 1, found {k}")
    scores, relevant = _checked(scores, relevant)
    ascending = scores.sort(dim=1).values
    at_least = scores.shape[1] - torch.searchsorted(ascending, scores)
    above = scores.shape[1] - torch.searchsorted(ascending, scores, right=True)
    # k - above places remain for the rows tied with this one.
    inside = ((k - above) / (at_least - above)).clamp(0, 1)
    return float(((inside * relevant).sum(1) / relevant.sum(1)).mean())


def _checked(scores: Tensor, relevant: Tensor) -> tuple[Tensor, Tensor]:
    if scores.ndim != 2 or scores.shape != relevant.shape:
        raise FuncattribError(
            f"expected scores and relevance of one shape (queries, rows), "
            f"found {tuple(scores.shape)} and {tuple(relevant.shape)}"
        )
    if scores.isnan().any():
        raise FuncattribError(
            "the scores contain NaN and cannot be ranked; leave out the examples whose gradient is not finite"
        )
    asked = relevant.any(1)
    if not asked.any():
        raise FuncattribError(f"none of the {len(scores)} queries has a relevant row")
    return scores[asked].contiguous(), relevant[asked].to(torch.float64) > 0


def _expected_reciprocal(above: Int[Tensor, "K"], tied: Int[Tensor, "K"], wanted: Int[Tensor, "K"]) -> Tensor:
    """Compute E[1 / (above + J)], J the place of the first of ``wanted`` rows in a random order of ``tied``."""
    before = torch.arange(int(tied.max()), dtype=torch.float64, device=tied.device)  # rows placed already, (J - 1)
    above, tied, wanted = above[:, None], tied[:, None], wanted[:, None]
    remaining = (tied - before).clamp(min=1)
    here = (wanted / remaining).clamp(max=1)  # P(J = j | J ≥ j)
    missed = torch.cat([torch.ones_like(here[:, :1]), (1 - here).cumprod(1)[:, :-1]], 1)
    return (here * missed / (above + before + 1)).sum(1)
