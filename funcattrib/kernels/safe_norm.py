"""Examples' entries as rows, Euclidean lengths as divisors of rows, and a dtype in which squares can be summed."""

import torch
from torch import Tensor


def as_rows(values: Tensor) -> Tensor:
    """Return each example's entries as one row, (B, *shape) → (B, D); of a scalar's gradients (B,), (B, 1).

    Example:
        >>> as_rows(torch.zeros(2, 3, 4)).shape, as_rows(torch.zeros(2)).shape
        (torch.Size([2, 12]), torch.Size([2, 1]))
    """
    return values.flatten(1) if values.ndim > 1 else values[:, None]


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


def float32_at_least(values: Tensor) -> Tensor:
    """Convert to float32, or keep a wider dtype: in float16 the squares of small gradients are zero.

    Example:
        >>> float32_at_least(torch.tensor([1e-4], dtype=torch.float16)).square() > 0
        tensor([True])
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))
