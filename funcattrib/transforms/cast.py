"""Change of number format: floating-point types, saturating at the largest finite value, and a grid of 255 levels.

    float16, bfloat16, float32   x ↦ x in that type, clamped to its finite range
    int8                         x ↦ s round(x / s), s = max|x| / 127 over all leaves of a row together

The store's dtype int8 has the same grid, so that rows from ``cast("int8")`` are stored in it as they are.
"""

from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from funcattrib.chain.transform import State, Transform
from funcattrib.errors import ChainError
from funcattrib.kernels.safe_norm import as_rows
from funcattrib.types import Grads, Spec

Precision = Literal["float16", "bfloat16", "float32", "int8"]


def cast(dtype: Precision = "float16") -> Transform:
    """Cast every leaf to ``dtype``; finite values beyond a floating-point type's range become its largest ones.

    Args:
        dtype: a floating-point type, or ``int8``: values on a row's grid of 255 levels, as float32 (the bytes are the
            store's, ``dtype="int8"``). A row with an infinity or a NaN becomes NaN there, as in the store.

    Raises:
        ChainError: an unknown dtype.

    Example:
        >>> cast("float16")(None, {"w": torch.tensor([[1e6]])})["w"]
        tensor([[65504.]], dtype=torch.float16)
        >>> cast("int8")(None, {"w": torch.tensor([[127.0, 1.4]]), "v": torch.tensor([[-0.6]])})
        {'w': tensor([[127.,   1.]]), 'v': tensor([[-1.]])}
    """
    if dtype not in get_args(Precision):
        raise ChainError(f"expected a dtype of {', '.join(get_args(Precision))}, found {dtype!r}")
    return Transform(
        "cast", settings={"dtype": dtype}, init=partial(_init, dtype=dtype), apply=partial(_apply, dtype=dtype)
    )


def saturate(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert ``values`` to ``dtype``, finite ones clamped to its range; infinities and NaN pass."""
    largest = torch.finfo(dtype).max
    if torch.finfo(values.dtype).max <= largest:
        return values.to(dtype)
    return torch.where(values.isinf(), values, values.clamp(-largest, largest)).to(dtype)


def _init(spec: Spec, dtype: Precision) -> tuple[State, Spec]:
    kept_as = torch.float32 if dtype == "int8" else getattr(torch, dtype)
    return None, {name: leaf._replace(dtype=kept_as) for name, leaf in spec.items()}


def _apply(state: State, grads: Grads, dtype: Precision) -> Grads:
    if dtype == "int8":
        return _on_grid(grads)
    return {name: saturate(grad, getattr(torch, dtype)) for name, grad in grads.items()}


def _on_grid(grads: Grads) -> Grads:
    """Round every row to the 255 multiples of its s."""
    rows = {name: as_rows(saturate(grad, torch.float32)) for name, grad in grads.items()}
    largest = torch.stack([row.abs().amax(1) for row in rows.values()]).amax(0)
    scale = torch.where(largest.isfinite(), largest, torch.nan)[:, None] / 127
    # A row of zeros, or of values too small for a scale, is zero; a scale of NaN makes its row NaN.
    steps = {name: torch.where(scale > 0, row / scale, 0.0).round().clamp(-127, 127) for name, row in rows.items()}
    return {name: (step * scale).reshape(grads[name].shape) for name, step in steps.items()}
