"""Euclidean lengths as divisors of rows."""

from torch import Tensor


def divisors(lengths: Tensor) -> Tensor:
    """Return the lengths, and 1 for that of a zero row, which so stays zero.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> rows / divisors(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    return lengths.where(lengths > 0, 1.0)
