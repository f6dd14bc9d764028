"""One weight's part of a sketch of the whole gradient: a sparse Johnson–Lindenstrauss transform (SJLT).

    C(G)_b = Σ_j S_bj vec(G)_j        S (k, n): in each of s blocks of k/s rows, one entry ±1/√s a column

S is never held. Row and sign of column j's entry in block r are a hash of (seed, leaf name, r, j), made again for
every pass, a part of the positions at a time; G is formed a few rows at a time and forgotten. The hash is 32-bit
integer arithmetic, the same on every device.

Reference: GraSS, arXiv 2505.18976; the hash is two rounds of MurmurHash3's finaliser.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcattrib.kernels.fold import fold, unfold
from funcattrib.kernels.safe_norm import as_rows
from funcattrib.lift.factors import Factor, outer
from funcattrib.lift.maps.base import GradientMap

_PART = 1 << 18
"""Positions hashed at a time: their indices stay in cache."""
_BLOCK = 1 << 31
"""Positions counted in 32 bits; a larger weight has a key for every block of so many."""


@dataclass(frozen=True)
class Sketched(GradientMap):
    """C(G) = S vec(G), (k,), of a leaf of ``shape`` called ``name``."""

    name: str
    shape: tuple[int, ...]
    k: int
    seed: int = 0
    sparsity: int = 1

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the sketch: the same for every weight, so that weights can share a probe."""
        return (self.k,)

    def from_factors(self, rows: Factor, cols: Tensor | None) -> Tensor:
        """Compute the sketch from kept factors: G is formed a few rows at a time."""
        if cols is None or not isinstance(rows, Tensor):
            return self.from_gradient(outer(rows, cols))
        return _Sketch.apply(rows, cols, self)

    def from_gradient(self, gradient: Tensor) -> Tensor:
        """Compute the sketch of formed gradients."""
        return _Sketch.apply(gradient, None, self)

    def adjoint(self, theta: Tensor) -> Tensor:
        """Compute Sᵀ θ in the leaf's shape."""
        size = torch.Size(self.shape).numel()
        parts = []
        for start in range(0, size, _PART):
            entries = [buckets(self, r, start, min(start + _PART, size), theta.device) for r in range(self.sparsity)]
            parts.append(torch.stack([theta[rows] * signs.to(theta.dtype) for rows, signs in entries]).sum(0))
        return (torch.cat(parts) * self.sparsity**-0.5).reshape(self.shape)


def buckets(sketched: Sketched, repetition: int, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows (int64, in block ``repetition`` of [0, k)) and signs (±1, int32) of columns ``start`` to ``stop`` of
    S.

    Example:
        >>> rows, signs = buckets(Sketched("w", (6,), 8, sparsity=2), 1, 0, 6, torch.device("cpu"))
        >>> bool(((rows >= 4) & (rows < 8)).all()), sorted(set(signs.tolist()) | {-1, 1})
        (True, [-1, 1])
    """
    height = sketched.k // sketched.sparsity
    hashed = torch.cat([_hash(sketched, repetition, block, a, b, device) for block, a, b in _blocks(start, stop)])
    # The lowest bit is the sign; the others, shifted down without their sign, choose the row.
    rows = ((hashed >> 1) & 0x7FFFFFFF) % height
    return rows.to(torch.int64) + repetition * height, (hashed & 1) * 2 - 1


def _hash(sketched: Sketched, repetition: int, block: int, start: int, stop: int, device: torch.device) -> Tensor:
    """Hash positions, (stop − start,) int32; products wrap, and a right shift is followed by the mask that makes it
    logical.
    """
    text = "\x1f".join(["sketch", str(sketched.seed), sketched.name, str(repetition), str(block)])
    digest = hashlib.sha256(text.encode()).digest()
    x = torch.arange(start, stop, dtype=torch.int32, device=device)
    for at in (0, 4):
        x ^= int.from_bytes(digest[at : at + 4], "little", signed=True)
        x ^= (x >> 16) & 0xFFFF
        x *= 0x85EBCA6B - (1 << 32)
        x ^= (x >> 13) & 0x7FFFF
        x *= 0xC2B2AE35 - (1 << 32)
        x ^= (x >> 16) & 0xFFFF
    return x


def _blocks(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield the range as (block, first, last) with positions that fit in 32 bits."""
    while start < stop:
        block, offset = divmod(start, _BLOCK)
        end = min(stop, (block + 1) * _BLOCK)
        yield block, offset, offset + end - start
        start = end


class _Sketch(torch.autograd.Function):
    """S vec(G) of formed gradients (E, *shape), or of factors (E, N, O) and (E, N, I); not differentiated again."""

    @staticmethod
    def forward(gradient: Tensor, cols: Tensor | None, sketched: Sketched) -> Tensor:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = torch.zeros(gradient.shape[0], sketched.k, dtype=wide, device=gradient.device)
        for start, part in _parts(gradient, cols):
            part = part.to(wide)
            for repetition in range(sketched.sparsity):
                rows, signs = buckets(sketched, repetition, start, start + part.shape[1], part.device)
                total.scatter_add_(1, rows.expand(part.shape), part * signs)
        return (total * sketched.sparsity**-0.5).to(gradient.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], gradient: Tensor, cols: Tensor | None, sketched: Sketched) -> Any:
        size = info.batch_size
        both = fold(gradient, in_dims[0], size), fold(cols, in_dims[1], size)
        return unfold(_Sketch.apply(*both, sketched), size), 0


def _parts(gradient: Tensor, cols: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Yield vec(G) in parts (E, n), each with the position it starts at."""
    if cols is None:
        flat = as_rows(gradient)
        for start in range(0, flat.shape[1], _PART):
            yield start, flat[:, start : start + _PART]
        return
    height = max(1, _PART // cols.shape[-1])
    for top in range(0, gradient.shape[-1], height):
        some = gradient[..., top : top + height]
        yield top * cols.shape[-1], (some.transpose(-1, -2) @ cols).flatten(1)
