"""Stored rows, encoded and decoded: saturate(x) in the store's dtype; for int8 round(x / s), s = max|x| / 127 a row.

A value beyond the dtype's finite range becomes the largest finite one and is counted as clipped. NaN and infinities
are counted on their own and stored as they are; int8 has neither, so there a row that holds one gets the scale NaN
and comes back as NaN throughout.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

# bfloat16 is no NumPy dtype: its bits are stored as uint16.
STORAGE = {"float16": "<f2", "float32": "<f4", "bfloat16": "<u2", "int8": "|i1"}
TORCH = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class Encoded(NamedTuple):
    """Rows as they are stored.

    Attributes:
        array: (rows, D) in the NumPy dtype of the file.
        scale: (rows,) float32 for int8, otherwise None.
        clipped: entries beyond the dtype's finite range.
        nonfinite: entries that were NaN or infinite.
    """

    array: np.ndarray
    scale: np.ndarray | None
    clipped: int
    nonfinite: int


def encode(matrix: Float[Tensor, "R D"], dtype: str) -> Encoded:
    """Encode rows for the store; every row by itself, so in whatever portions one likes.

    Args:
        matrix: any float dtype, on the CPU.
        dtype: float16, float32, bfloat16 or int8.

    Example:
        >>> encode(torch.tensor([[1.0, -1e6]]), "float16").array.tolist()
        [[1.0, -65504.0]]
    """
    x = matrix.detach().float()
    if dtype == "int8":
        return _encode_int8(x)
    limit = torch.finfo(TORCH[dtype]).max
    clipped = nonfinite = 0
    if not _within(x, limit):
        finite = torch.isfinite(x)
        beyond = finite & (x.abs() > limit)
        nonfinite, clipped = x.numel() - int(finite.sum()), int(beyond.sum())
        x = torch.where(beyond, x.clamp(-limit, limit), x)
    stored = x.to(TORCH[dtype]).contiguous()
    return Encoded((stored.view(torch.uint16) if dtype == "bfloat16" else stored).numpy(), None, clipped, nonfinite)


def decode(
    array: Shaped[np.ndarray, "R D"] | Shaped[Tensor, "R D"], dtype: str, scale: np.ndarray | None = None
) -> Float[Tensor, "R D"]:
    """Decode stored rows to float32, in new memory.

    Args:
        array: as stored (bfloat16 as uint16 bits, or as a bfloat16 tensor).
        dtype: float16, float32, bfloat16 or int8.
        scale: (R,) for int8.

    Example:
        >>> decode(*encode(torch.tensor([[2.0, -1.0]]), "int8")[:1], "int8", np.array([2 / 127], np.float32))
        tensor([[ 2.0000, -1.0079]])
    """
    stored = array if isinstance(array, Tensor) else torch.from_numpy(np.array(array))
    if dtype == "bfloat16" and stored.dtype == torch.uint16:
        stored = stored.view(torch.bfloat16)
    rows = stored.to(torch.float32, copy=True)
    if scale is not None:
        rows *= torch.from_numpy(np.array(scale, np.float32)).view(-1, *[1] * (rows.dim() - 1))
    return rows


def _encode_int8(x: Tensor) -> Encoded:
    largest = x.abs().amax(1) if x.numel() else x.new_zeros(len(x))
    nonfinite = 0
    if not torch.isfinite(largest).all():
        nonfinite = x.numel() - int(torch.isfinite(x).sum())
        largest = torch.where(torch.isfinite(largest), largest, torch.nan)
    scale = largest / 127
    # A zero row, a row too small for a scale, a row with a NaN: zeros, whatever the scale.
    usable = (scale > 0).unsqueeze(1)
    steps = torch.where(usable, x / scale.unsqueeze(1), 0.0).round().clamp(-127, 127)
    return Encoded(steps.to(torch.int8).numpy(), scale.numpy(), 0, nonfinite)


def _within(x: Tensor, limit: float) -> bool:
    if not x.numel():
        return True
    low, high = torch.aminmax(x)  # a NaN anywhere makes both NaN, and the comparison false
    return bool(low >= -limit) and bool(high <= limit)
