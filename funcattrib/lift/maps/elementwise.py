"""A function of the gradient's entries, each by itself: read like a map, but not linear.

    C(G)_ij = f_ij(G_ij)

It has no adjoint: its weight must reach the loss through exactly one tapped operation (``lift.single_use`` finds out),
or else the gradient is read and the function taken afterwards.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from funcattrib.lift.factors import Factor, outer
from funcattrib.lift.maps.base import GradientMap
from funcattrib.lift.maps.composed import Composed
from funcattrib.lift.maps.two_sided import TwoSided


class Scale(NamedTuple):
    """C(G) = D ⊙ G, entry by entry: G is formed, one weight at a time."""

    factor: Tensor

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
        return gradient * self.factor.to(gradient.dtype)

    def adjoint(self, theta: Tensor) -> Tensor:
        """The same product."""
        return theta * self.factor.to(theta.dtype)

    def to(self, dtype: torch.dtype) -> "Scale":
        """The factor in ``dtype``."""
        return Scale(self.factor.to(dtype))

    def __matmul__(self, first: GradientMap) -> GradientMap:
        """The two in turn; nothing is gained by merging."""
        return self if first == TwoSided() else Composed(first, self)


class Elementwise(NamedTuple):
    """``function`` of formed gradients (E, *shape), entry by entry: G is formed, one weight at a time."""

    function: Callable[[Tensor], Tensor]

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
        return self.function(gradient)

    def adjoint(self, theta: Tensor) -> Tensor:
        """There is none."""
        raise AssertionError("a function of entries has no adjoint; single_use must have excluded this weight")

    def to(self, dtype: object) -> "Elementwise":
        """The function takes any type."""
        return self

    def __matmul__(self, first: GradientMap) -> GradientMap:
        """Of what ``first`` reads."""
        return self if first == TwoSided() else Composed(first, self)


def is_elementwise(gradient_map: GradientMap) -> bool:
    """Whether a reading begins with, or contains, a function of entries: of 2 G it reads no multiple of that of G."""
    if isinstance(gradient_map, Composed):
        return is_elementwise(gradient_map.first) or is_elementwise(gradient_map.second)
    return isinstance(gradient_map, Elementwise)
