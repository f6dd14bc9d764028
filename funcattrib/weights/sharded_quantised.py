"""A quantised weight of which each rank of a group holds some blocks: gathered quantised, dequantised for its use.

    vec(W) = blocks of numbers, row after row, each block with one scale        int8: a row; nf4, fp4: 64 numbers
    a block's bytes = its codes, then its scale in float32

Blocks are those of the whole quantised weight: codes and scales are the same to the bit. A gather moves one tensor of
bytes, about half of what the weight has in bfloat16, or a bit more than a quarter. bitsandbytes quantises and
dequantises; it is imported for that alone.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from funcattrib.weights.quantised import from_four_bits, from_int8
from funcattrib.weights.sharded import Gathers, Sharded, row_range

_SCALE = 4  # bytes


class QuantFormat(NamedTuple):
    """The format of a quantised weight.

    Attributes:
        kind: int8, nf4 or fp4.
        shape, dtype: of the dense weight.
        block: numbers with one scale; in int8 those of a row.

    Example:
        >>> eight = QuantFormat("int8", (6, 10), torch.float32, 10)
        >>> eight.blocks, QuantFormat("nf4", (6, 30), torch.float32, 64).blocks
        (6, 3)
        >>> [QuantFormat("nf4", (6, 30), torch.float32, 64).numbers(2, rank) for rank in (0, 1)]
        [(0, 128), (128, 180)]
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int

    @property
    def blocks(self) -> int:
        """Return the number of blocks of the whole weight; the last may be shorter."""
        return -(-math.prod(self.shape) // self.block)

    @property
    def code_bytes(self) -> int:
        """Return the bytes of a block, without its scale."""
        return self.block if self.kind == "int8" else self.block // 2

    def numbers(self, ranks: int, rank: int) -> tuple[int, int]:
        """Return the first of vec(W) in a rank's blocks, and the first after them."""
        first, last = (min(self.block * at, math.prod(self.shape)) for at in row_range(self.blocks, ranks, rank))
        return first, last


class ShardedQuantised:
    """Some blocks of a quantised weight.

    Args:
        blocks: the bytes of all, of which each rank has some rows.
    """

    def __init__(self, blocks: Sharded, coding: QuantFormat) -> None:
        self.blocks, self.coding = blocks, coding
        self.shape, self.dtype, self.device = coding.shape, coding.dtype, blocks.device
        self.precision = "int8" if coding.kind == "int8" else "int4"

    @property
    def gathers(self) -> Gathers:
        """Return the gathers of the group that holds it."""
        return self.blocks.gathers

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Gather and dequantise the whole weight: every rank of the group calls this together."""
        return _dequantised(self.blocks.dense(), self.coding)


@torch.no_grad()
def quantise(numbers: Tensor, coding: QuantFormat) -> Tensor:
    """Quantise whole blocks of vec(W) to bytes, as bitsandbytes does on the device of ``numbers``.

    Args:
        numbers: (n,), of consecutive blocks.

    Returns:
        (blocks, bytes of one), uint8.
    """
    if not numbers.numel():
        return numbers.new_empty(0, coding.code_bytes + _SCALE, dtype=torch.uint8)
    from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit

    if coding.kind == "int8":
        codes, scale, _ = int8_vectorwise_quant(numbers.reshape(-1, coding.block).half())  # as Int8Params does
        return in_blocks(codes, scale, coding)
    codes, state = quantize_4bit(numbers, blocksize=coding.block, quant_type=coding.kind)
    return in_blocks(codes, state.absmax, coding)


def in_blocks(codes: Tensor, scale: Tensor, coding: QuantFormat) -> Tensor:
    """Return quantised values and scales of whole blocks, as bytes of one row a block."""
    flat = codes.contiguous().view(torch.uint8).reshape(-1)
    short = len(scale) * coding.code_bytes - len(flat)  # where the weight ends inside a block
    blocks = F.pad(flat, (0, short)).reshape(len(scale), coding.code_bytes)
    return torch.cat([blocks, scale.float().contiguous().view(torch.uint8).reshape(-1, _SCALE)], 1)


def _dequantised(blocks: Tensor, coding: QuantFormat) -> Tensor:
    codes = blocks[:, : coding.code_bytes]
    scale = blocks[:, coding.code_bytes :].clone(memory_format=torch.contiguous_format).view(torch.float32)[:, 0]
    if coding.kind == "int8":
        return from_int8(codes.view(torch.int8), scale).reshape(coding.shape).to(coding.dtype)
    from bitsandbytes.functional import QuantState

    count = math.prod(coding.shape)
    state: Any = QuantState(
        absmax=scale,
        shape=torch.Size([1, count]),
        dtype=coding.dtype,
        blocksize=coding.block,
        quant_type=coding.kind,
    )
    return from_four_bits(codes.reshape(-1)[: -(-count // 2), None], state, coding.shape)
