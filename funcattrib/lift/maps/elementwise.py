"""Maps of the gradient's entries, each by itself: G is formed, one weight at a time.

C(G)_ij = D_ij G_ij        C(G)_ij = f_ij(G_ij), which is read like a map, but is not linear
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from funcattrib.errors import ChainError
from funcattrib.lift.maps.base import GradientMap


@dataclass(frozen=True)
class Scale(GradientMap):
    """C(G) = D ⊙ G, with D a tensor of the gradient's shape, or one number."""

    factor: Tensor | float

    def __post_init__(self) -> None:
        """Check what would fail in the backward pass."""
        if not isinstance(self.factor, Tensor | int | float):
            raise ChainError(
                f"expected a tensor or a number as the factor of Scale, found {type(self.factor).__name__}"
            )

    def from_gradient(self, gradient: Tensor) -> Tensor:
        return gradient * self._factor(gradient.dtype)

    def adjoint(self, theta: Tensor) -> Tensor:
        return theta * self._factor(theta.dtype)

    def to(self, dtype: torch.dtype) -> "Scale":
        return Scale(self._factor(dtype))

    def _factor(self, dtype: torch.dtype) -> Tensor | float:
        return self.factor.to(dtype) if isinstance(self.factor, Tensor) else self.factor


@dataclass(frozen=True)
class Elementwise(GradientMap):
    """``function`` of formed gradients (E, *shape), entry by entry: not linear.

    Its weight must reach the loss through exactly one tapped operation (``lift.single_use`` finds out), or else the
    gradient is read and the function taken afterwards.
    """

    function: Callable[[Tensor], Tensor]

    @property
    def linear(self) -> bool:
        return False

    @property
    def homogeneous(self) -> bool:
        return False

    def from_gradient(self, gradient: Tensor) -> Tensor:
        return self.function(gradient)
