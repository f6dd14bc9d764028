"""Clipping of gradients to a length.

    g ↦ g · min(1, m / ‖g‖)        ‖g‖ over all leaves together

A gradient that is short enough stays as it is, bit for bit.
"""

import math
from functools import partial

import torch
from torch import Tensor

from funcattrib.chain.transform import State, Transform
from funcattrib.errors import ChainError
from funcattrib.kernels.safe_norm import as_rows
from funcattrib.types import Grads


def clip(max_norm: float) -> Transform:
    """Scale each example's gradient, all leaves together, to a Euclidean length of at most ``max_norm``.

    Args:
        max_norm: the longest that stays as it is, in the unit of the gradients that arrive.

    Raises:
        ChainError: a length that is not positive and finite.

    Example:
        >>> stage = clip(1.0)
        >>> stage(None, {"a": torch.tensor([[3.0], [0.3]]), "b": torch.tensor([[4.0], [0.4]])})
        {'a': tensor([[0.6000], [0.3000]]), 'b': tensor([[0.8000], [0.4000]])}
    """
    if not 0 < max_norm < math.inf:
        raise ChainError(f"expected a positive, finite max_norm, found {max_norm}")
    return Transform("clip", settings={"max_norm": max_norm}, apply=partial(_apply, max_norm=max_norm))


def _apply(state: State, grads: Grads, max_norm: float) -> Grads:
    # In float64: clipping is for gradients that may be too long to be squared in float32.
    lengths = [torch.linalg.vector_norm(as_rows(grad), dim=1, dtype=torch.float64) for grad in grads.values()]
    factor = (max_norm / torch.stack(lengths).square().sum(0).sqrt()).clamp(max=1)
    return {name: _scaled(grad, factor) for name, grad in grads.items()}


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    return grad * factor.to(grad.dtype).reshape(-1, *[1] * (grad.ndim - 1))
