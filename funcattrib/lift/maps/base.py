"""Linear maps C of one weight's gradient, read off its factors, with their adjoints.

The gradient of a weight W (O, I) used in a linear operation is a sum of outer products over tokens,

    G = Σ_n rows_n colsᵀ_n,        rows (N, O), cols (N, I),

of what came into the operation and what comes back through it. A two-sided map C(G) = L G Rᵀ is then
(rows Lᵀ)ᵀ (cols Rᵀ): G itself is never formed. Other maps form one weight's G at a time, in its turn.

Shapes: E examples, N tokens, O/I weight rows/columns, P/Q coordinates.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from funcattrib.lift.factors import Factor


class GradientMap(Protocol):
    """How the coordinates of one weight are read off its gradient, whichever form that comes in."""

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the coordinates of a gradient of ``shape``."""

    def reduce_rows(self, rows: Factor) -> Factor:
        """What must be kept of the row factor until the column factor is known."""

    def reduce_cols(self, cols: Tensor) -> Tensor:
        """What must be kept of the column factor until the row factor is known."""

    def from_factors(self, rows: Factor, cols: Tensor | None) -> Tensor:
        """(E, …) coordinates from kept factors; ``cols`` is None where the weight is a vector."""

    def from_gradient(self, gradient: Tensor) -> Tensor:
        """(E, …) coordinates of formed gradients (E, *shape)."""

    def adjoint(self, theta: Tensor) -> Tensor:
        """C*(θ), shaped like the weight, for θ without example axis."""

    def to(self, dtype: torch.dtype) -> Any:
        """The same map in ``dtype``, the weight's own, so that no operation has to convert it."""

    def __matmul__(self, first: Any) -> Any:
        """The map that applies ``first`` and then this one."""
