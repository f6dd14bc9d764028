"""Statistics of a weight's gradient, read in its place: quadratic ones, f(s g) = s² f(g)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcattrib.lift.factors import Factor, Side
from funcattrib.lift.maps.base import GradientMap, like
from funcattrib.lift.maps.two_sided import TwoSided


@dataclass(frozen=True)
class Measured(GradientMap):
    """A statistic of the coordinates that ``inner`` reads.

    It has no adjoint: its weight must reach the loss through exactly one tapped operation
    (``lift.single_use`` finds out), or else the coordinates are read and measured afterwards.
    """

    inner: GradientMap
    measure: Callable[[Tensor], Tensor]

    @property
    def linear(self) -> bool:
        return False

    @property
    def wide(self) -> bool:
        return True

    @property
    def takes_patches(self) -> bool:
        return self.inner.takes_patches

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        probe = torch.zeros(1, *self.inner.coordinates_shape(shape), device="meta")
        return tuple(self.measure(probe).shape[1:])

    def reduce_rows(self, rows: Factor) -> Factor:
        return self.inner.reduce_rows(rows)

    def reduce_cols(self, cols: Tensor) -> Tensor:
        return self.inner.reduce_cols(cols)

    def from_factors(self, rows: Factor, cols: Tensor | None) -> Tensor:
        return self.measure(self.inner.from_factors(rows, cols))

    def from_gradient(self, gradient: Tensor) -> Tensor:
        return self.measure(self.inner.from_gradient(gradient))

    def to(self, dtype: torch.dtype) -> "Measured":
        return Measured(self.inner.to(dtype), self.measure)

    def __matmul__(self, first: GradientMap) -> GradientMap:
        """Return the statistic of what ``first`` and then the inner map read."""
        return Measured(self.inner @ first, self.measure)

    def rescale(self, value: Tensor, scale: Tensor) -> Tensor:
        return value * like(scale, value) ** 2

    def stack_first(self) -> tuple[Any, GradientMap | None]:
        stack, rest = self.inner.stack_first()
        return stack, Measured(rest or TwoSided(), self.measure)

    def sides_first(self) -> tuple[Side, Side, GradientMap | None]:
        left, right, rest = self.inner.sides_first()
        return left, right, Measured(rest or TwoSided(), self.measure)
