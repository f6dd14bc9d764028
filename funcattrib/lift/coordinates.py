"""Linear maps C of one weight's gradient, read off its factors, with their adjoints.

The gradient of a weight W (O, I) used in a linear operation is a sum of outer products over tokens,

    G = Σ_n rows_n colsᵀ_n,        rows (N, O), cols (N, I),

of what came into the operation and what comes back through it. A two-sided map C(G) = L G Rᵀ is then
(rows Lᵀ)ᵀ (cols Rᵀ): G itself is never formed. Other maps form one weight's G at a time, in its turn.

Shapes: E examples, N tokens, O/I weight rows/columns, P/Q coordinates.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from funcattrib.lift.factors import Factor, Side, along, dense_along, length, outer, product, transpose


class Reading(Protocol):
    """How the coordinates of one weight are read off its gradient, whichever form that comes in."""

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the coordinates of a gradient of ``shape``."""

    def keep_rows(self, rows: Factor) -> Factor:
        """What must be kept of the row factor until the column factor is known."""

    def keep_cols(self, cols: Tensor) -> Tensor:
        """What must be kept of the column factor until the row factor is known."""

    def read(self, rows: Factor, cols: Tensor | None) -> Tensor:
        """(E, …) coordinates from kept factors; ``cols`` is None where the weight is a vector."""

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """(E, …) coordinates of formed gradients (E, *shape)."""

    def adjoint(self, theta: Tensor) -> Tensor:
        """C*(θ), shaped like the weight, for θ without example axis."""

    def to(self, dtype: torch.dtype) -> Any:
        """The same map in ``dtype``, the weight's own, so that no operation has to convert it."""

    def after(self, first: Any) -> Any:
        """The map that applies ``first`` and then this one."""


class TwoSided(NamedTuple):
    """C(G) = L G Rᵀ on a matrix and L g on a vector; C*(θ) = Lᵀ θ R."""

    left: Side = None
    right: Side = None

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a weight of ``shape``."""
        if len(shape) > 2:  # more axes have no sides: they are kept whole
            return shape
        return tuple(length(side, n) for side, n in zip((self.left, self.right), shape, strict=False))

    def keep_rows(self, rows: Factor) -> Factor:
        """Rows with the left side applied."""
        return along(self.left, rows)

    def keep_cols(self, cols: Tensor) -> Tensor:
        """Columns with the right side applied."""
        return dense_along(self.right, cols)

    def read(self, rows: Factor, cols: Tensor | None) -> Tensor:
        """From kept factors."""
        return outer(rows, cols)

    def of_gradient(self, gradient: Tensor) -> Tensor:
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

    def after(self, first: Reading) -> Reading:
        """One pair of sides where ``first`` is one; otherwise the two in turn."""
        if not isinstance(first, TwoSided):
            return Then(first, self)
        return TwoSided(product(self.left, first.left), product(self.right, first.right))


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


class Scale(NamedTuple):
    """C(G) = D ⊙ G, entry by entry: G is formed, one weight at a time."""

    factor: Tensor

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The weight's own."""
        return shape

    def keep_rows(self, rows: Factor) -> Factor:
        """Whole rows."""
        return rows

    def keep_cols(self, cols: Tensor) -> Tensor:
        """Whole columns."""
        return cols

    def read(self, rows: Factor, cols: Tensor | None) -> Tensor:
        """From kept factors."""
        return self.of_gradient(outer(rows, cols))

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """From formed gradients."""
        return gradient * self.factor.to(gradient.dtype)

    def adjoint(self, theta: Tensor) -> Tensor:
        """The same product."""
        return theta * self.factor.to(theta.dtype)

    def to(self, dtype: torch.dtype) -> "Scale":
        """The factor in ``dtype``."""
        return Scale(self.factor.to(dtype))

    def after(self, first: Reading) -> Reading:
        """The two in turn; nothing is gained by merging."""
        return self if first == TwoSided() else Then(first, self)


class Measured(NamedTuple):
    """A statistic of the coordinates, read in their place: a quadratic one, f(s g) = s² f(g).

    It has no adjoint: its weight must reach the loss through exactly one tapped operation
    (``lift.single_use`` finds out), or else the coordinates are read and measured afterwards.
    """

    inner: Reading
    measure: Callable[[Tensor], Tensor]

    @property
    def wide(self) -> bool:
        """What is read has at least float32."""
        return True

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a weight of ``shape``."""
        probe = torch.zeros(1, *self.inner.coordinates_shape(shape), device="meta")
        return tuple(self.measure(probe).shape[1:])

    def keep_rows(self, rows: Factor) -> Factor:
        """As the inner map does."""
        return self.inner.keep_rows(rows)

    def keep_cols(self, cols: Tensor) -> Tensor:
        """As the inner map does."""
        return self.inner.keep_cols(cols)

    def read(self, rows: Factor, cols: Tensor | None) -> Tensor:
        """From kept factors."""
        return self.measure(self.inner.read(rows, cols))

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """From formed gradients."""
        return self.measure(self.inner.of_gradient(gradient))

    def adjoint(self, theta: Tensor) -> Tensor:
        """There is none."""
        raise AssertionError("a statistic has no adjoint; single_use must have excluded this weight")

    def to(self, dtype: torch.dtype) -> "Measured":
        """The inner map in ``dtype``."""
        return Measured(self.inner.to(dtype), self.measure)

    def after(self, first: Reading) -> Reading:
        """The statistic of coordinates behind another map."""
        return Measured(self.inner.after(first), self.measure)


def is_wide(reading: Reading) -> bool:
    """Whether what is read has at least float32, by itself or as the last of several maps: statistics and scores.

    Example:
        >>> is_wide(Measured(TwoSided(), torch.square)), is_wide(TwoSided())
        (True, False)
    """
    if isinstance(reading, Then):
        return is_wide(reading.second)
    last = getattr(reading, "maps", (reading.inner,) if hasattr(reading, "inner") else ())
    return getattr(reading, "wide", False) or any(is_wide(one) for one in last)
