"""A per-leaf statistic of the gradient, read in its place: quadratic, not linear."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from funcattrib.lift.factors import Factor
from funcattrib.lift.maps.base import GradientMap


class Measured(NamedTuple):
    """A statistic of the coordinates, read in their place: a quadratic one, f(s g) = s² f(g).

    It has no adjoint: its weight must reach the loss through exactly one tapped operation
    (``lift.single_use`` finds out), or else the coordinates are read and measured afterwards.
    """

    inner: GradientMap
    measure: Callable[[Tensor], Tensor]

    @property
    def wide(self) -> bool:
        """What is read has at least float32."""
        return True

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a weight of ``shape``."""
        probe = torch.zeros(1, *self.inner.coordinates_shape(shape), device="meta")
        return tuple(self.measure(probe).shape[1:])

    def reduce_rows(self, rows: Factor) -> Factor:
        """As the inner map does."""
        return self.inner.reduce_rows(rows)

    def reduce_cols(self, cols: Tensor) -> Tensor:
        """As the inner map does."""
        return self.inner.reduce_cols(cols)

    def from_factors(self, rows: Factor, cols: Tensor | None) -> Tensor:
        """From kept factors."""
        return self.measure(self.inner.from_factors(rows, cols))

    def from_gradient(self, gradient: Tensor) -> Tensor:
        """From formed gradients."""
        return self.measure(self.inner.from_gradient(gradient))

    def adjoint(self, theta: Tensor) -> Tensor:
        """There is none."""
        raise AssertionError("a statistic has no adjoint; single_use must have excluded this weight")

    def to(self, dtype: torch.dtype) -> "Measured":
        """The inner map in ``dtype``."""
        return Measured(self.inner.to(dtype), self.measure)

    def __matmul__(self, first: GradientMap) -> GradientMap:
        """The statistic of coordinates behind another map."""
        return Measured(self.inner @ first, self.measure)
