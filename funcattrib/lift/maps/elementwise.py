"""Maps of the gradient's entries, each by itself: G is formed, one weight at a time.

C(G)_ij = D_ij G_ij        C(G)_ij = f_ij(G_ij), which is read like a map, but is not linear
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from funcattrib.lift.maps.base import GradientMap


@dataclass(frozen=True)
class Scale(GradientMap):
    """C(G) = D ⊙ G."""

    factor: Tensor

    def from_gradient(self, gradient: Tensor) -> Tensor:
        return gradient * self.factor.to(gradient.dtype)

    def adjoint(self, theta: Tensor) -> Tensor:
        return theta * self.factor.to(theta.dtype)

    def to(self, dtype: torch.dtype) -> "Scale":
        return Scale(self.factor.to(dtype))


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
