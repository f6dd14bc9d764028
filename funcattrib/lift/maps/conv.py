"""Kernels of convolutions as matrices: a weight (o, i/g, *kernel) is read as (o, i/g · kernel).

A convolution is a linear layer on patches: y[:, n] = W patch_n + b, so that G = Σ_n g_n patch_nᵀ over positions n, and
what serves a matrix serves a kernel. With g groups, group by group: rows of G that belong to a group see its channels.

Shapes: B batch, c channels, E examples, N positions, O/I rows and columns of the flattened weight, P/Q coordinates.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from funcattrib.lift.factors import Factor
from funcattrib.lift.maps.base import Composed, GradientMap
from funcattrib.lift.maps.two_sided import TwoSided


@dataclass(frozen=True)
class Kernel(GradientMap):
    """A two-sided map of a kernel of ``shape``, flattened: L G Rᵀ, (P, Q), or with ``keep`` in the kernel's own shape.

    With ``keep`` the sides must be diagonals or absent: normalisation keeps the shape, projection does not.
    """

    sides: TwoSided
    shape: tuple[int, ...]
    keep: bool = False

    @property
    def takes_patches(self) -> bool:
        return True

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the coordinates of a kernel of ``shape``."""
        return self.shape if self.keep else self.sides.coordinates_shape(self._flat())

    def reduce_rows(self, rows: Factor) -> Factor:
        """Apply the left side to rows."""
        return self.sides.reduce_rows(rows)

    def reduce_cols(self, cols: Tensor) -> Tensor:
        """Apply the right side to patches."""
        return self.sides.reduce_cols(cols)

    def from_factors(self, rows: Factor, cols: Tensor | None) -> Tensor:
        """Compute coordinates from kept factors."""
        return self._shaped(self.sides.from_factors(rows, cols))

    def from_gradient(self, gradient: Tensor) -> Tensor:
        """Compute coordinates of formed gradients (E, *shape)."""
        return self._shaped(self.sides.from_gradient(gradient.flatten(2)))

    def adjoint(self, theta: Tensor) -> Tensor:
        """Compute C*(θ) of θ without example axis."""
        return self.sides.adjoint(theta.flatten(1)).reshape(self.shape)

    def to(self, dtype: torch.dtype) -> "Kernel":
        """Convert both sides to ``dtype``."""
        return replace(self, sides=self.sides.to(dtype))

    def __matmul__(self, first: GradientMap) -> GradientMap:
        """Merge into one pair of sides where ``first`` keeps the kernel's shape; otherwise apply the two in turn."""
        if first.is_identity:
            return self
        if not isinstance(first, Kernel) or not first.keep:
            return Composed(first, self)
        return replace(self, sides=self.sides.merge(first.sides))

    def _flat(self) -> tuple[int, int]:
        return self.shape[0], torch.Size(self.shape[1:]).numel()

    def _shaped(self, coordinates: Tensor) -> Tensor:
        return coordinates.reshape(coordinates.shape[0], *self.shape) if self.keep else coordinates


def patches(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """Return the inputs at each position of a convolution: (B, c, *spatial) → (B, positions, c · kernel).

    Args:
        kernel, stride, dilation: one number a spatial axis.
        padding: zeros before and after, one pair a spatial axis.

    Example:
        >>> patches(torch.arange(4.0).reshape(1, 1, 4), (2,), (1,), ((1, 0),), (1,))
        tensor([[[0., 0.],
                 [0., 1.],
                 [1., 2.],
                 [2., 3.]]])
    """
    x = F.pad(x, [n for pair in reversed(padding) for n in pair])
    axes = len(kernel)
    for axis in range(axes):
        window = dilation[axis] * (kernel[axis] - 1) + 1
        x = x.unfold(2 + axis, window, stride[axis])[..., :: dilation[axis]]
    # (B, c, *positions, *kernel)
    x = x.movedim(1, 1 + axes)
    return x.flatten(1 + axes).flatten(1, axes)
