"""Two gradient maps in turn."""

from typing import NamedTuple

import torch
from torch import Tensor

from funcattrib.lift.factors import Factor
from funcattrib.lift.maps.base import GradientMap


class Composed(NamedTuple):
    """Two maps in turn: ``first`` is read from the factors, ``second`` is applied to what it gives."""

    first: GradientMap
    second: GradientMap

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a weight of ``shape``."""
        return self.second.coordinates_shape(self.first.coordinates_shape(shape))

    def reduce_rows(self, rows: Factor) -> Factor:
        """As the first map does."""
        return self.first.reduce_rows(rows)

    def reduce_cols(self, cols: Tensor) -> Tensor:
        """As the first map does."""
        return self.first.reduce_cols(cols)

    def from_factors(self, rows: Factor, cols: Tensor | None) -> Tensor:
        """From kept factors."""
        return self.second.from_gradient(self.first.from_factors(rows, cols))

    def from_gradient(self, gradient: Tensor) -> Tensor:
        """From formed gradients."""
        return self.second.from_gradient(self.first.from_gradient(gradient))

    def adjoint(self, theta: Tensor) -> Tensor:
        """The adjoints in reverse order."""
        return self.first.adjoint(self.second.adjoint(theta))

    def to(self, dtype: torch.dtype) -> "Composed":
        """Both maps in ``dtype``."""
        return Composed(self.first.to(dtype), self.second.to(dtype))

    def __matmul__(self, first: GradientMap) -> GradientMap:
        """Behind a third map."""
        return self.second @ (self.first @ first)


def is_wide(gradient_map: GradientMap) -> bool:
    """Whether what is read has at least float32, by itself or as the last of several maps: statistics and scores.

    Example:
        >>> from funcattrib.lift.maps.measured import Measured
        >>> from funcattrib.lift.maps.two_sided import TwoSided
        >>> is_wide(Measured(TwoSided(), torch.square)), is_wide(TwoSided())
        (True, False)
    """
    if isinstance(gradient_map, Composed):
        return is_wide(gradient_map.second)
    last = getattr(gradient_map, "maps", (gradient_map.inner,) if hasattr(gradient_map, "inner") else ())
    return getattr(gradient_map, "wide", False) or any(is_wide(one) for one in last)
