"""A dense symmetric map of the flattened gradient: C(G) = M vec(G)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from funcattrib.kernels.safe_norm import as_rows
from funcattrib.lift.maps.base import GradientMap


@dataclass(frozen=True)
class Dense(GradientMap):
    """C(G) = M vec(G), shaped like G, for a symmetric M: the gradient is formed, one parameter at a time."""

    matrix: Tensor

    def from_gradient(self, gradient: Tensor) -> Tensor:
        """Compute M vec(G) of formed gradients."""
        return times(as_rows(gradient), self.matrix).reshape(gradient.shape)

    def adjoint(self, theta: Tensor) -> Tensor:
        """Compute the same product: M is symmetric."""
        return times(theta.reshape(1, -1), self.matrix).reshape(theta.shape)

    def to(self, dtype: torch.dtype) -> "Dense":
        """Convert to ``dtype``, or to float32 where that is wider: half precision has too few digits for H^p."""
        return Dense(self.matrix.to(torch.promote_types(dtype, torch.float32)))


def times(rows: Tensor, matrix: Tensor) -> Tensor:
    """Apply ``matrix`` to every row, in the wider type of the two; the result has the rows' type."""
    dtype = torch.promote_types(rows.dtype, matrix.dtype)
    return (rows.to(dtype) @ matrix.to(rows.device, dtype)).to(rows.dtype)
