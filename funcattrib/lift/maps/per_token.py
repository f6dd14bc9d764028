"""Coordinates token by token: the terms of G = Σ_n rows_n colsᵀ_n, each read by itself.

    C(G)_n = C(rows_n colsᵀ_n)        (E, T, …) for a weight that is used once at every one of T positions

The terms add up to the example's coordinates. An operation that is not applied once a position, in the order of the
positions (a kernel, experts, a norm over each head), has no such terms to give and is refused.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from funcattrib.errors import ChainError
from funcattrib.lift.factors import Factor, OneHot, Side
from funcattrib.lift.maps.base import Composed, GradientMap


@dataclass(frozen=True)
class PerToken(GradientMap):
    """``inner``, read for each of ``tokens`` positions; a stage's map comes after ``inner``, not after this."""

    inner: GradientMap
    tokens: int

    @property
    def linear(self) -> bool:
        return self.inner.linear

    @property
    def wide(self) -> bool:
        return self.inner.wide

    @property
    def by_token(self) -> bool:
        return True

    @property
    def row_side(self) -> Side:
        return self.inner.row_side

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the coordinates of a weight of ``shape``, positions first."""
        return (self.tokens, *self.inner.coordinates_shape(shape))

    def reduce_rows(self, rows: Factor) -> Factor:
        """Reduce rows as the inner map does, one a position."""
        self._check(rows.ids.shape[1] if isinstance(rows, OneHot) else rows.shape[1])
        return self.inner.reduce_rows(rows)

    def reduce_cols(self, cols: Tensor) -> Tensor:
        """Reduce columns as the inner map does, one a position."""
        self._check(cols.shape[1])
        return self.inner.reduce_cols(cols)

    def from_factors(self, rows: Factor, cols: Tensor | None) -> Tensor:
        """Compute (E, T, …) coordinates: every position is an example of one token."""
        if isinstance(rows, OneHot):
            alone: Factor = OneHot(_alone(rows.ids), rows.size, None if rows.weight is None else _alone(rows.weight))
            examples = rows.ids.shape[0]
        else:
            alone, examples = _alone(rows), rows.shape[0]
        coordinates = self.inner.from_factors(alone, None if cols is None else _alone(cols))
        return coordinates.unflatten(0, (examples, self.tokens))

    def from_gradient(self, gradient: Tensor) -> Tensor:
        """Raise: a formed gradient has no positions any more."""
        raise _refused(
            f"a parameter of shape {tuple(gradient.shape[1:])} is used in an operation without a rule for it"
        )

    def adjoint(self, theta: Tensor) -> Tensor:
        """Raise: W + C*(θ) has no positions."""
        raise _refused(f"a parameter with coordinates {tuple(theta.shape[1:])} is used in an operation without a rule")

    def to(self, dtype: torch.dtype) -> "PerToken":
        """Convert the inner map to ``dtype``."""
        return replace(self, inner=self.inner.to(dtype))

    def __matmul__(self, first: GradientMap) -> GradientMap:
        """Compose with the map before it."""
        return replace(self, inner=self.inner @ first) if not isinstance(first, PerToken) else Composed(first, self)

    def _check(self, positions: int) -> None:
        if positions != self.tokens:
            raise _refused(f"a parameter is used {positions} times in an example of {self.tokens} tokens")


def summed(gradient_map: GradientMap, rows: Tensor) -> Tensor:
    """Sum rows of a vector's gradient (E, N, n) over positions, unless each is read by itself."""
    return rows if gradient_map.by_token else rows.sum(1, keepdim=True)


def _alone(x: Tensor) -> Tensor:
    """Reshape to one position an example, (E, T, …) → (E·T, 1, …)."""
    return x.flatten(0, 1).unsqueeze(1)


def _refused(wrong: str) -> ChainError:
    return ChainError(
        f"per-token gradients require parameters that are used once at each token, and {wrong}; "
        "leave it out (modules, exclude), or compute whole examples with per_example_grad"
    )
