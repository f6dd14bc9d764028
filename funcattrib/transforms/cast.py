"""Change of floating-point type, saturating at the target's largest finite value."""

from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from funcattrib.compose import State, Transform
from funcattrib.errors import ChainError
from funcattrib.per_example import Grads, Leaf, Spec

Precision = Literal["float16", "bfloat16", "float32"]


def cast(dtype: Precision = "float16") -> Transform:
    """Cast every leaf to ``dtype``; finite values beyond its range become its largest ones.

    Raises:
        ChainError: an unknown dtype.

    Example:
        >>> cast("float16").apply(None, {"w": torch.tensor([[1e6]])})["w"]
        tensor([[65504.]], dtype=torch.float16)
    """
    if dtype not in get_args(Precision):
        raise ChainError(f"expected a dtype of {', '.join(get_args(Precision))}, found {dtype!r}")
    return Transform("cast", init=partial(_init, dtype=dtype), apply=partial(_apply, dtype=dtype))


def saturate(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` in ``dtype``, finite ones clamped to its range; infinities and NaN pass."""
    largest = torch.finfo(dtype).max
    if torch.finfo(values.dtype).max <= largest:
        return values.to(dtype)
    return torch.where(values.isinf(), values, values.clamp(-largest, largest)).to(dtype)


def _init(spec: Spec, dtype: Precision) -> tuple[State, Spec]:
    return None, {name: Leaf(leaf.shape, getattr(torch, dtype)) for name, leaf in spec.items()}


def _apply(state: State, grads: Grads, dtype: Precision) -> Grads:
    return {name: saturate(grad, getattr(torch, dtype)) for name, grad in grads.items()}
