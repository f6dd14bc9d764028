"""Two-sided maps C(G) = L G Rᵀ: projections, diagonal scales, and the identity."""

from dataclasses import dataclass

import torch
from torch import Tensor

from funcattrib.lift.factors import Factor, Side, along, dense_along, length, outer, product, transpose
from funcattrib.lift.maps.base import Composed, GradientMap


@dataclass(frozen=True)
class TwoSided(GradientMap):
    """C(G) = L G Rᵀ on a matrix and L g on a vector; C*(θ) = Lᵀ θ R. Without sides, the identity."""

    left: Side = None
    right: Side = None

    @property
    def is_identity(self) -> bool:
        return self.left is None and self.right is None

    @property
    def row_side(self) -> Side:
        return self.left

    def sides_first(self) -> tuple[Side, Side, GradientMap | None]:
        return self.left, self.right, None

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) > 2:  # more axes have no sides: they are kept whole
            return shape
        return tuple(length(side, n) for side, n in zip((self.left, self.right), shape, strict=False))

    def reduce_rows(self, rows: Factor) -> Factor:
        return along(self.left, rows)

    def reduce_cols(self, cols: Tensor) -> Tensor:
        return dense_along(self.right, cols)

    def from_factors(self, rows: Factor, cols: Tensor | None) -> Tensor:
        return outer(rows, cols)

    def from_gradient(self, gradient: Tensor) -> Tensor:
        if self.is_identity or gradient.ndim > 3:
            return gradient
        if gradient.ndim == 2:
            return dense_along(self.left, gradient)
        right = dense_along(self.right, gradient)
        return dense_along(self.left, right.transpose(-1, -2)).transpose(-1, -2)

    def adjoint(self, theta: Tensor) -> Tensor:
        if self.is_identity or theta.ndim > 2:
            return theta
        if theta.ndim == 1:
            return dense_along(transpose(self.left), theta)
        rows = dense_along(transpose(self.right), theta)
        return dense_along(transpose(self.left), rows.transpose(-1, -2)).transpose(-1, -2)

    def to(self, dtype: torch.dtype) -> "TwoSided":
        return TwoSided(*(side if side is None else side.to(dtype) for side in (self.left, self.right)))

    def __matmul__(self, first: GradientMap) -> GradientMap:
        """Merge into one pair of sides where ``first`` is one; otherwise apply the two in turn."""
        return self.merge(first) if isinstance(first, TwoSided) else Composed(first, self)

    def merge(self, first: "TwoSided") -> "TwoSided":
        """Return the one pair of sides that applies ``first`` and then this one."""
        return TwoSided(product(self.left, first.left), product(self.right, first.right))
