"""Two gradient maps in turn."""

from typing import NamedTuple

import torch
from torch import Tensor

from funcattrib.lift.factors import Factor
from funcattrib.lift.maps.base import Reading


class Then(NamedTuple):
    """Two maps in turn: ``first`` is read from the factors, ``second`` is applied to what it gives."""

    first: Reading
    second: Reading

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a weight of ``shape``."""
        return self.second.coordinates_shape(self.first.coordinates_shape(shape))

    def keep_rows(self, rows: Factor) -> Factor:
        """As the first map does."""
        return self.first.keep_rows(rows)

    def keep_cols(self, cols: Tensor) -> Tensor:
        """As the first map does."""
        return self.first.keep_cols(cols)

    def read(self, rows: Factor, cols: Tensor | None) -> Tensor:
        """From kept factors."""
        return self.second.of_gradient(self.first.read(rows, cols))

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """From formed gradients."""
        return self.second.of_gradient(self.first.of_gradient(gradient))

    def adjoint(self, theta: Tensor) -> Tensor:
        """The adjoints in reverse order."""
        return self.first.adjoint(self.second.adjoint(theta))

    def to(self, dtype: torch.dtype) -> "Then":
        """Both maps in ``dtype``."""
        return Then(self.first.to(dtype), self.second.to(dtype))

    def after(self, first: Reading) -> Reading:
        """Behind a third map."""
        return self.second.after(self.first.after(first))


def is_wide(reading: Reading) -> bool:
    """Whether what is read has at least float32, by itself or as the last of several maps: statistics and scores.

    Example:
        >>> from funcattrib.lift.maps.measured import Measured
        >>> from funcattrib.lift.maps.two_sided import TwoSided
        >>> is_wide(Measured(TwoSided(), torch.square)), is_wide(TwoSided())
        (True, False)
    """
    if isinstance(reading, Then):
        return is_wide(reading.second)
    last = getattr(reading, "maps", (reading.inner,) if hasattr(reading, "inner") else ())
    return getattr(reading, "wide", False) or any(is_wide(one) for one in last)
