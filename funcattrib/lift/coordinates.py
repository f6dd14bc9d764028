"""Linear maps C of one weight's gradient, read off its factors, with their adjoints.

The gradient of a weight W (O, I) used in a linear operation is a sum of outer products over tokens,

    G = Σ_n rows_n colsᵀ_n,        rows (N, O), cols (N, I),

of what came into the operation and what comes back through it. A two-sided map C(G) = L G Rᵀ is then
(rows Lᵀ)ᵀ (cols Rᵀ): G itself is never formed. The row factor may be one-hot (an
embedding's token ids).

Shapes: E examples, N tokens, O/I weight rows/columns, P/Q coordinates.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class OneHot(NamedTuple):
    """A row factor: token n is ``weight``_n times the unit vector number ``ids``_n, of length ``size``."""

    ids: Tensor
    size: int
    weight: Tensor | None = None


Factor = Tensor | OneHot
Side = Tensor | None
"""A linear map along one axis: None (identity), a vector (diagonal, (n,)) or a matrix ((p, n))."""


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


class TwoSided(NamedTuple):
    """C(G) = L G Rᵀ on a matrix and L g on a vector; C*(θ) = Lᵀ θ R."""

    left: Side = None
    right: Side = None

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a weight of ``shape``."""
        if len(shape) > 2:  # more axes have no sides: they are kept whole
            return shape
        return tuple(_length(side, n) for side, n in zip((self.left, self.right), shape, strict=False))

    def keep_rows(self, rows: Factor) -> Factor:
        """Rows with the left side applied."""
        return along(self.left, rows)

    def keep_cols(self, cols: Tensor) -> Tensor:
        """Columns with the right side applied."""
        return _dense_along(self.right, cols)

    def read(self, rows: Factor, cols: Tensor | None) -> Tensor:
        """From kept factors."""
        return outer(rows, cols)

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """From formed gradients (E, *shape)."""
        if gradient.ndim == 2:
            return _dense_along(self.left, gradient)
        if gradient.ndim > 3:
            return gradient
        right = _dense_along(self.right, gradient)
        return _dense_along(self.left, right.transpose(-1, -2)).transpose(-1, -2)

    def adjoint(self, theta: Tensor) -> Tensor:
        """Of θ without example axis."""
        if theta.ndim == 1:
            return _dense_along(_transpose(self.left), theta)
        if theta.ndim > 2:
            return theta
        rows = _dense_along(_transpose(self.right), theta)
        return _dense_along(_transpose(self.left), rows.transpose(-1, -2)).transpose(-1, -2)

    def after(self, first: "TwoSided") -> "TwoSided":
        """The map that applies ``first`` and then this one."""
        return TwoSided(_product(self.left, first.left), _product(self.right, first.right))

    def to(self, dtype: torch.dtype) -> "TwoSided":
        """Both sides in ``dtype``, the weight's own, so that no operation has to convert them."""
        return TwoSided(*(side if side is None else side.to(dtype) for side in self))


class Measured(NamedTuple):
    """A statistic of the coordinates, read in their place: any per-example function, linear or not.

    It has no adjoint: its weight must reach the loss through exactly one tapped operation
    (``lift.single_use`` finds out), or else the coordinates are read and measured afterwards.
    """

    inner: TwoSided
    measure: Callable[[Tensor], Tensor]

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a weight of ``shape``."""
        probe = torch.zeros(1, *self.inner.coordinates_shape(shape), device="meta")
        return tuple(self.measure(probe).shape[1:])

    def keep_rows(self, rows: Factor) -> Factor:
        """Rows with the left side applied."""
        return self.inner.keep_rows(rows)

    def keep_cols(self, cols: Tensor) -> Tensor:
        """Columns with the right side applied."""
        return self.inner.keep_cols(cols)

    def read(self, rows: Factor, cols: Tensor | None) -> Tensor:
        """From kept factors."""
        return self.measure(self.inner.read(rows, cols))

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """From formed gradients (E, *shape)."""
        return self.measure(self.inner.of_gradient(gradient))

    def adjoint(self, theta: Tensor) -> Tensor:
        """Of θ without example axis."""
        raise AssertionError("a statistic has no adjoint; single_use must have excluded this weight")


def along(side: Side, factor: Factor) -> Factor:
    """``side`` applied to the last axis of every token's vector."""
    if isinstance(factor, Tensor):
        return _dense_along(side, factor)
    if side is None:
        return factor
    if side.ndim == 1:
        scale = side[factor.ids]
        return factor._replace(weight=scale if factor.weight is None else scale * factor.weight)
    picked = side.T[factor.ids]
    return picked if factor.weight is None else picked * factor.weight[..., None]


def outer(rows: Factor, cols: Tensor | None) -> Tensor:
    """Σ_n rows_n colsᵀ_n, (E, P, Q), or Σ_n rows_n, (E, P), without columns."""
    if cols is None:
        return _scatter(rows, None) if isinstance(rows, OneHot) else rows.sum(1)
    return _scatter(rows, cols) if isinstance(rows, OneHot) else rows.transpose(-1, -2) @ cols


def _scatter(rows: OneHot, values: Tensor | None) -> Tensor:
    """Σ_n e_{id_n} valuesᵀ_n by scattered addition: no one-hot matrix is formed."""
    scale = rows.weight
    if values is None:
        ones = torch.ones_like(rows.ids, dtype=torch.float32) if scale is None else scale
        return torch.zeros(*rows.ids.shape[:-1], rows.size, dtype=ones.dtype, device=ones.device).scatter_add(
            -1, rows.ids, ones
        )
    if scale is not None:
        values = values * scale[..., None]
    index = rows.ids[..., None].expand(*rows.ids.shape, values.shape[-1])
    zeros = torch.zeros(*values.shape[:-2], rows.size, values.shape[-1], dtype=values.dtype, device=values.device)
    return zeros.scatter_add(-2, index, values)


def _dense_along(side: Side, x: Tensor) -> Tensor:
    if side is None:
        return x
    side = side.to(x.dtype)
    return x * side if side.ndim == 1 else x @ side.T


def _length(side: Side, n: int) -> int:
    return n if side is None else side.shape[0]


def _transpose(side: Side) -> Side:
    return side if side is None or side.ndim == 1 else side.T


def _product(second: Side, first: Side) -> Side:
    """The side that applies ``first``, then ``second``."""
    if second is None or first is None:
        return first if second is None else second
    if second.ndim == 1:
        return second * first if first.ndim == 1 else second[:, None] * first
    return second * first if first.ndim == 1 else second @ first
