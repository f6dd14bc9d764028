"""The two-sided map C(G) = L G Rᵀ: projections, diagonal scales, and the identity."""

from typing import NamedTuple

import torch
from torch import Tensor

from funcattrib.lift.factors import Factor, Side, along, dense_along, length, outer, product, transpose
from funcattrib.lift.maps.base import GradientMap
from funcattrib.lift.maps.composed import Composed


class TwoSided(NamedTuple):
    """C(G) = L G Rᵀ on a matrix and L g on a vector; C*(θ) = Lᵀ θ R."""

    left: Side = None
    right: Side = None

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a weight of ``shape``."""
        if len(shape) > 2:  # more axes have no sides: they are kept whole
            return shape
        return tuple(length(side, n) for side, n in zip((self.left, self.right), shape, strict=False))

    def reduce_rows(self, rows: Factor) -> Factor:
        """Rows with the left side applied."""
        return along(self.left, rows)

    def reduce_cols(self, cols: Tensor) -> Tensor:
        """Columns with the right side applied."""
        return dense_along(self.right, cols)

    def from_factors(self, rows: Factor, cols: Tensor | None) -> Tensor:
        """From kept factors."""
        return outer(rows, cols)

    def from_gradient(self, gradient: Tensor) -> Tensor:
        """From formed gradients (E, *shape)."""
        if gradient.ndim == 2:
            return dense_along(self.left, gradient)
        if gradient.ndim > 3:
            return gradient
        right = dense_along(self.right, gradient)
        return dense_along(self.left, right.transpose(-1, -2)).transpose(-1, -2)

    def adjoint(self, theta: Tensor) -> Tensor:
        """Of θ without example axis."""
        if theta.ndim == 1:
            return dense_along(transpose(self.left), theta)
        if theta.ndim > 2:
            return theta
        rows = dense_along(transpose(self.right), theta)
        return dense_along(transpose(self.left), rows.transpose(-1, -2)).transpose(-1, -2)

    def to(self, dtype: torch.dtype) -> "TwoSided":
        """Both sides in ``dtype``."""
        return TwoSided(*(side if side is None else side.to(dtype) for side in self))

    def __matmul__(self, first: GradientMap) -> GradientMap:
        """One pair of sides where ``first`` is one; otherwise the two in turn."""
        if not isinstance(first, TwoSided):
            return Composed(first, self)
        return TwoSided(product(self.left, first.left), product(self.right, first.right))
