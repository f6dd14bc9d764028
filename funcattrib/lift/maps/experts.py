"""A stack of matrices, the experts of a mixture: W (X, O, I), read expert by expert.

    C(G)_x = L diag(l_x) G_x diag(r_x) Rᵀ        (X, P, Q)

The matrices L and R are shared by the experts, so that a token's factors are projected once, whichever expert is its;
the diagonals are each expert's own. An expert that no token of an example went to has zeros.

Shapes: X experts, E examples, S tokens with their expert, O/I rows and columns, P/Q coordinates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from funcattrib.lift.factors import Factor, Side, dense_along, product
from funcattrib.lift.maps.base import Composed, GradientMap
from funcattrib.lift.maps.heads import Each
from funcattrib.lift.maps.two_sided import TwoSided


@dataclass(frozen=True)
class Stack(GradientMap):
    """A map for every expert's gradient; see the module.

    Attributes:
        sides: the matrices L and R, shared.
        left, right: diagonals, (X, O) and (X, I), an expert's own.
    """

    sides: TwoSided = field(default_factory=TwoSided)
    left: Side = None
    right: Side = None

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the coordinates of a weight of ``shape``, experts first."""
        return (shape[0], *self.sides.coordinates_shape(shape[1:]))

    def reduce_rows(self, rows: Factor) -> Factor:
        """Raise: rows need the experts' numbers; see ``rows_of``."""
        raise AssertionError("a stack is read from tokens with their experts, or from formed gradients")

    def reduce_cols(self, cols: Tensor) -> Tensor:
        """Raise: columns need the experts' numbers; see ``cols_of``."""
        raise AssertionError("a stack is read from tokens with their experts, or from formed gradients")

    def from_factors(self, rows: Factor, cols: Tensor | None) -> Tensor:
        """Raise: factors need the experts' numbers."""
        raise AssertionError("a stack is read from tokens with their experts, or from formed gradients")

    def stack_first(self) -> tuple["Stack", None]:
        return self, None

    def rows_of(self, rows: Tensor, expert: Tensor) -> Tensor:
        """Apply its expert's left side to each token, (E, S, O) → (E, S, P); ``expert`` (E, S)."""
        return dense_along(self.sides.left, rows if self.left is None else rows * self.left.to(rows.dtype)[expert])

    def cols_of(self, cols: Tensor, expert: Tensor) -> Tensor:
        """Apply its expert's right side to each token, (E, S, I) → (E, S, Q); ``expert`` (E, S)."""
        return dense_along(self.sides.right, cols if self.right is None else cols * self.right.to(cols.dtype)[expert])

    def from_gradient(self, gradient: Tensor) -> Tensor:
        """Compute coordinates of formed gradients (E, X, O, I)."""
        scaled = _diagonals(self.left, self.right, gradient)
        return self.sides.from_gradient(scaled.flatten(0, 1)).unflatten(0, gradient.shape[:2])

    def adjoint(self, theta: Tensor) -> Tensor:
        """Compute C*(θ) of θ (X, P, Q), without example axis."""
        left, right = (
            side if side is None or side.ndim == 1 else side.T for side in (self.sides.left, self.sides.right)
        )
        return _diagonals(self.left, self.right, TwoSided(left, right).from_gradient(theta))

    def to(self, dtype: torch.dtype) -> "Stack":
        """Convert every side to ``dtype``."""
        left, right = (side if side is None else side.to(dtype) for side in (self.left, self.right))
        return Stack(self.sides.to(dtype), left, right)

    def __matmul__(self, first: GradientMap) -> GradientMap:
        """Merge into one map where the diagonals come first; otherwise apply the two in turn."""
        if first.is_identity:
            return self
        if isinstance(first, Stack) and self.left is None and self.right is None:
            return replace(first, sides=self.sides.merge(first.sides))
        if isinstance(first, Stack) and first.sides.is_identity:
            return replace(self, left=product(self.left, first.left), right=product(self.right, first.right))
        return Composed(first, self)


@dataclass(frozen=True)
class Parts(GradientMap):
    """A stack taken apart: of (X, …), the entries ``kept``, all of them by default."""

    size: int
    kept: tuple[int, ...] | None = None

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the coordinates of a stack of ``shape``."""
        return (self.size if self.kept is None else len(self.kept), *shape[1:])

    def from_gradient(self, gradient: Tensor) -> Tensor:
        """Select the kept entries of formed gradients (E, X, …)."""
        return gradient if self.kept is None else gradient[:, list(self.kept)]

    def adjoint(self, theta: Tensor) -> Tensor:
        """Compute C*(θ) of θ without example axis: zero for the entries that are not kept."""
        if self.kept is None:
            return theta
        whole = theta.new_zeros(self.size, *theta.shape[1:])
        return whole.index_copy(0, torch.tensor(self.kept, device=theta.device), theta)

    def narrow(self, numbers: Sequence[int]) -> "Parts":
        """Keep only the entries in these places."""
        before = range(self.size) if self.kept is None else self.kept
        return replace(self, kept=tuple(before[number] for number in numbers))

    def absorb(self, maps: Sequence[GradientMap]) -> GradientMap:
        """Apply a map to each entry; sides that all entries share are applied before the stack is taken apart."""
        pairs = [one for one in maps if isinstance(one, TwoSided)]
        if len(pairs) == len(maps) and len({(id(one.left), id(one.right)) for one in pairs}) == 1:
            return self @ Stack(pairs[0])
        return Composed(self, Each(tuple(maps)))


def _diagonals(left: Side, right: Side, gradient: Tensor) -> Tensor:
    """Compute diag(l_x) G_x diag(r_x) of (…, X, O, I)."""
    if left is not None:
        gradient = gradient * left.to(gradient.dtype)[..., None]
    return gradient if right is None else gradient * right.to(gradient.dtype)[:, None]
