"""Maps C of one weight's gradient to coordinates, read off its factors, with their adjoints.

The gradient of a weight W (O, I) used in a linear operation is a sum of outer products over tokens,

    G = Σ_n rows_n colsᵀ_n,        rows (N, O), cols (N, I),

of what came into the operation and what comes back through it. A two-sided map C(G) = L G Rᵀ is then
(rows Lᵀ)ᵀ (cols Rᵀ): G itself is never formed. Other maps form one weight's G at a time, in its turn.

A new map is a frozen dataclass on ``GradientMap`` with ``from_gradient`` and ``adjoint``, or ``linear`` False where it
has none: a statistic, such as a square. All else has a default. What the rules of operations ask of a map is a property
here, never its class.

Shapes: E examples, N tokens, O/I weight rows/columns, P/Q coordinates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from funcattrib.lift.factors import Factor, Side, outer


@dataclass(frozen=True)
class GradientMap:
    """A map from one weight's gradient to coordinates, whichever form the gradient comes in.

    By default a map keeps the gradient's shape, needs both factors whole and forms G from them.

    Example:
        >>> @dataclass(frozen=True)
        ... class Twice(GradientMap):
        ...     def from_gradient(self, gradient):
        ...         return 2 * gradient
        ...
        ...     def adjoint(self, theta):
        ...         return 2 * theta
        >>> (Twice() @ Twice()).from_factors(torch.ones(1, 3, 2), torch.ones(1, 3, 1))
        tensor([[[12.],
                 [12.]]])
    """

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the coordinates of a gradient of ``shape``."""
        return shape

    def reduce_rows(self, rows: Factor) -> Factor:
        """Return what must be kept of the row factor until the column factor is known."""
        return rows

    def reduce_cols(self, cols: Tensor) -> Tensor:
        """Return what must be kept of the column factor until the row factor is known."""
        return cols

    def from_factors(self, rows: Factor, cols: Tensor | None) -> Tensor:
        """Return (E, …) coordinates from reduced factors; ``cols`` is None where the weight is a vector."""
        return self.from_gradient(outer(rows, cols))

    def from_gradient(self, gradient: Tensor) -> Tensor:
        """Return (E, …) coordinates of formed gradients (E, *shape)."""
        raise NotImplementedError(f"{type(self).__name__} has no from_gradient")

    def adjoint(self, theta: Tensor) -> Tensor:
        """Return C*(θ), shaped like the weight, for θ without example axis."""
        if self.linear:
            raise NotImplementedError(f"{type(self).__name__} has no adjoint; without one, linear must be False")
        raise AssertionError("a statistic has no adjoint; single_use must have excluded this weight")

    def to(self, dtype: torch.dtype) -> "GradientMap":
        """Return the same map in ``dtype``, the weight's own, so that no operation has to convert it."""
        return self

    def __matmul__(self, first: "GradientMap") -> "GradientMap":
        """Return the map that applies ``first`` and then this one."""
        return self if first.is_identity else Composed(first, self)

    @property
    def linear(self) -> bool:
        """Return whether coordinates add up with gradients; if not, this is a statistic, without an adjoint."""
        return True

    @property
    def is_identity(self) -> bool:
        """Return whether every gradient comes out as it is."""
        return False

    @property
    def wide(self) -> bool:
        """Return whether the coordinates have at least float32: statistics and scores."""
        return False

    @property
    def by_token(self) -> bool:
        """Return whether every position's term is read by itself."""
        return False

    @property
    def row_side(self) -> Side:
        """Return the side that rows are multiplied with first; None where they are kept whole."""
        return None

    @property
    def takes_patches(self) -> bool:
        """Return whether factors of a flattened kernel are taken; otherwise G comes in the kernel's shape."""
        return False

    @property
    def homogeneous(self) -> bool:
        """Return whether the coordinates of s · G follow from those of G by ``rescale``."""
        return True

    @property
    def per_entry(self) -> bool:
        """Return whether the entries of stacked gradients are read each by another map."""
        return False

    def rescale(self, value: Tensor, scale: Tensor) -> Tensor:
        """Return the coordinates of scale · G, scale (E,), from ``value`` (E, …), those of G."""
        return value * like(scale, value)

    def stack_first(self) -> tuple[Any, "GradientMap | None"]:
        """Divide into the map that takes tokens of a stack of experts (None for none), and the map after it."""
        return None, None if self.is_identity else self

    def sides_first(self) -> tuple[Side, Side, "GradientMap | None"]:
        """Divide into the left and right side that are applied to a gradient first, and the map after them."""
        return None, None, None if self.is_identity else self

    def narrow(self, numbers: Sequence[int]) -> "GradientMap":
        """Return the map of some entries of the stacked gradients alone."""
        raise AssertionError(f"gradients are stacked by a split, not by {type(self).__name__}")

    def absorb(self, maps: Sequence["GradientMap"]) -> "GradientMap":
        """Return the map that applies one of ``maps`` to each stacked entry after this one."""
        raise AssertionError(f"gradients are stacked by a split, not by {type(self).__name__}")


@dataclass(frozen=True)
class Composed(GradientMap):
    """Two maps in turn: ``first`` is read from the factors, ``second`` is applied to what it gives."""

    first: GradientMap
    second: GradientMap

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.second.coordinates_shape(self.first.coordinates_shape(shape))

    def reduce_rows(self, rows: Factor) -> Factor:
        return self.first.reduce_rows(rows)

    def reduce_cols(self, cols: Tensor) -> Tensor:
        return self.first.reduce_cols(cols)

    def from_factors(self, rows: Factor, cols: Tensor | None) -> Tensor:
        return self.second.from_gradient(self.first.from_factors(rows, cols))

    def from_gradient(self, gradient: Tensor) -> Tensor:
        return self.second.from_gradient(self.first.from_gradient(gradient))

    def adjoint(self, theta: Tensor) -> Tensor:
        return self.first.adjoint(self.second.adjoint(theta))

    def to(self, dtype: torch.dtype) -> Self:
        return type(self)(self.first.to(dtype), self.second.to(dtype))

    def __matmul__(self, first: GradientMap) -> GradientMap:
        return self.second @ (self.first @ first)

    @property
    def linear(self) -> bool:
        return self.first.linear and self.second.linear

    @property
    def wide(self) -> bool:
        return self.second.wide

    @property
    def row_side(self) -> Side:
        return self.first.row_side

    @property
    def takes_patches(self) -> bool:
        return self.first.takes_patches

    @property
    def homogeneous(self) -> bool:
        return self.first.homogeneous and self.second.homogeneous

    def rescale(self, value: Tensor, scale: Tensor) -> Tensor:
        return self.second.rescale(value, scale)

    def stack_first(self) -> tuple[Any, GradientMap | None]:
        stack, rest = self.first.stack_first()
        return stack, self.second if rest is None else self.second @ rest

    def sides_first(self) -> tuple[Side, Side, GradientMap | None]:
        left, right, rest = self.first.sides_first()
        return left, right, self.second if rest is None else Composed(rest, self.second)

    def narrow(self, numbers: Sequence[int]) -> GradientMap:
        first = self.first.narrow(numbers) if self.second.per_entry else self.first
        return Composed(first, self.second.narrow(numbers))

    def absorb(self, maps: Sequence[GradientMap]) -> GradientMap:
        if self.second.per_entry:
            return Composed(self.first, self.second.absorb(maps))
        return self.second.absorb(maps) @ self.first


def like(scale: Tensor, value: Tensor) -> Tensor:
    """Return (E,) as a factor of (E, …), in its type."""
    return scale.reshape(-1, *[1] * (value.ndim - 1)).to(value.dtype)
