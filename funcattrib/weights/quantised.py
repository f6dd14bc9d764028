"""A weight in bitsandbytes' codes: int8, or four bits (nf4, fp4).

    int8    W_ij = code_ij · scale_i / 127        a scale a row
    nf4     W = map[code] · scale                 a scale a block

Dequantised for the operation that uses it. bitsandbytes is imported only for a weight that is in its codes.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = ("Int8Params", "Params4bit")
"""bitsandbytes' classes of parameters."""


@dataclass(frozen=True, eq=False)
class Quantised:
    """Quantised values, and how they are read; ``precision`` (int8, int4) is what loads a model in them."""

    read: Callable[[], Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    precision: str

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the dequantised weight."""
        return self.read().to(self.dtype)


def quantised(module: nn.Module, dtype: torch.dtype) -> Quantised:
    """Return the weight of bitsandbytes' linear layer ``module``.

    Args:
        dtype: of the dense weight, where the codes do not say.
    """
    weight: Any = module.weight
    if type(weight).__name__ == "Int8Params":
        layer: Any = module
        scale = weight.SCB if weight.SCB is not None else layer.state.SCB  # moved there by its first forward pass
        read = partial(from_int8, weight.detach(), scale)
        return Quantised(read, tuple(weight.shape), dtype, weight.device, "int8")
    codes, state = _four_bits(weight)
    shape = tuple(state.shape)
    # As one row: where rows end inside a block, bitsandbytes' CPU kernel may take the next block's scale too early.
    state.shape = torch.Size([1, state.shape.numel()])
    return Quantised(partial(from_four_bits, codes, state, shape), shape, state.dtype, codes.device, "int4")


def from_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """Compute W from its quantised values (O, I) and the scales of its rows (O,), in their type."""
    return codes * (scale / 127)[:, None]


def from_four_bits(codes: Tensor, state: Any, shape: tuple[int, ...]) -> Tensor:
    """Compute W from its quantised values, packed in pairs, and bitsandbytes' state of them, which says that they are
    one row.
    """
    from bitsandbytes.functional import dequantize_4bit

    whole: Tensor = dequantize_4bit(codes, state)
    return whole.reshape(shape)


def _four_bits(weight: Any) -> tuple[Tensor, Any]:
    """Return the quantised values and a copy of their state, which the layer's own forward changes in place on some
    processors.
    """
    state = copy.copy(weight.quant_state)
    if not getattr(state, "packing_format_for_cpu", False):
        return weight.detach().as_subclass(Tensor), state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpacked

    # Packing has rounded the scales to bfloat16, and laid them out by column of blocks.
    state.original_nested = False
    codes, state = unpacked(weight.detach().as_subclass(Tensor), state)
    state.absmax = state.absmax.T.reshape(-1).float()
    return codes, state
