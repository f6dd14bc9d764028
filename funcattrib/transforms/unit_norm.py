"""Scaling of each example's gradient to unit length.

g ↦ g / ‖g‖ over all leaves together; a zero gradient stays zero
"""

import torch

from funcattrib.chain.transform import State, Transform
from funcattrib.kernels.safe_norm import as_rows, float32_at_least
from funcattrib.types import Grads


def unit_norm() -> Transform:
    """Scale each example's gradient, all leaves together, to Euclidean length 1; zero stays zero.

    Example:
        >>> stage = unit_norm()
        >>> stage(None, {"a": torch.tensor([[3.0]]), "b": torch.tensor([[4.0]])})
        {'a': tensor([[0.6000]]), 'b': tensor([[0.8000]])}
    """
    return Transform("unit_norm", apply=_apply_unit_norm)


def _apply_unit_norm(state: State, grads: Grads) -> Grads:
    squares = sum(float32_at_least(as_rows(grad)).square().sum(1) for grad in grads.values())
    norm = torch.as_tensor(squares).sqrt()
    inverse = torch.where(norm > 0, 1 / norm, 0.0)
    return {n: g * inverse.to(g.dtype).reshape(-1, *[1] * (g.ndim - 1)) for n, g in grads.items()}
