"""A dense symmetric map of the flattened gradient: C(G) = M vec(G)."""

from typing import NamedTuple

import torch
from torch import Tensor

from funcattrib.lift import Composed, GradientMap, TwoSided
from funcattrib.lift.factors import Factor, outer


class Dense(NamedTuple):
    """C(G) = M vec(G), shaped like G, for a symmetric M: the gradient is formed, one parameter at a time."""

    matrix: Tensor

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The weight's own."""
        return shape

    def reduce_rows(self, rows: Factor) -> Factor:
        """Whole rows."""
        return rows

    def reduce_cols(self, cols: Tensor) -> Tensor:
        """Whole columns."""
        return cols

    def from_factors(self, rows: Factor, cols: Tensor | None) -> Tensor:
        """From kept factors."""
        return self.from_gradient(outer(rows, cols))

    def from_gradient(self, gradient: Tensor) -> Tensor:
        """From formed gradients."""
        return times(gradient.flatten(1), self.matrix).reshape(gradient.shape)

    def adjoint(self, theta: Tensor) -> Tensor:
        """The same product."""
        return times(theta.reshape(1, -1), self.matrix).reshape(theta.shape)

    def to(self, dtype: torch.dtype) -> "Dense":
        """In ``dtype``, or in float32 where that is wider: half precision has too few digits for H^p."""
        return Dense(self.matrix.to(torch.promote_types(dtype, torch.float32)))

    def __matmul__(self, first: GradientMap) -> GradientMap:
        """The two in turn; nothing is gained by merging."""
        return self if first == TwoSided() else Composed(first, self)


def times(rows: Tensor, matrix: Tensor) -> Tensor:
    """``matrix`` applied to every row, in the wider type of the two; the result has the rows' type."""
    dtype = torch.promote_types(rows.dtype, matrix.dtype)
    return (rows.to(dtype) @ matrix.to(rows.device, dtype)).to(rows.dtype)
