"""The kinds of leaves of more than two axes: a convolution's kernel, or a stack of experts.

    vector (n,)    matrix (o, i)    kernel (o, i, *spatial), as (o, i · spatial)    stack (x, o, i), expert by expert

A leaf of three axes is a stack where its name contains ``experts``, as the parameters of every mixture in transformers
do (``…mlp.experts.gate_up_proj``), and the kernel of a one-dimensional convolution otherwise.
"""

from torch import Size, Tensor

from funcattrib.lift import GradientMap, TwoSided
from funcattrib.lift.maps.conv import Kernel
from funcattrib.lift.maps.experts import Stack


def is_stack(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a leaf is a stack of matrices.

    Example:
        >>> is_stack("h.0.experts.down_proj", (8, 4, 6)), is_stack("h.0.conv1d.weight", (8, 4, 6))
        (True, False)
    """
    return len(shape) == 3 and "experts" in name


def sides(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the lengths of the sides that a leaf's matrices have, or of the vector.

    Example:
        >>> sides("conv.weight", (8, 4, 3, 3)), sides("experts.down_proj", (8, 4, 6)), sides("bias", (8,))
        ((8, 36), (4, 6), (8,))
    """
    if is_stack(name, shape):
        return shape[1:]
    return shape if len(shape) < 3 else (shape[0], Size(shape[1:]).numel())


def projected(name: str, shape: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a leaf whose sides have been taken to ``lengths``: a kernel becomes a matrix."""
    return (shape[0], *lengths) if is_stack(name, shape) else lengths


def projection(name: str, shape: tuple[int, ...], pair: TwoSided) -> GradientMap:
    """Return the map with these sides: on a kernel flattened, on each matrix of a stack."""
    if is_stack(name, shape):
        return Stack(pair)
    return pair if len(shape) < 3 else Kernel(pair, shape)


def normalisation(name: str, shape: tuple[int, ...], left: Tensor, right: Tensor) -> GradientMap:
    """Return the map with these diagonals, which keeps the leaf's shape; of a stack (x, o) and (x, i)."""
    if is_stack(name, shape):
        return Stack(left=left, right=right)
    pair = TwoSided(left, right)
    return pair if len(shape) < 3 else Kernel(pair, shape, keep=True)
