"""Factors of a weight's gradient: G = Σ_n rows_n colsᵀ_n, and what is read of their products.

Shapes: E examples, N tokens, O/I weight rows/columns, P/Q coordinates.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class OneHot(NamedTuple):
    """A row factor: token n is ``weight``_n times the unit vector number ``ids``_n, of length ``size``."""

    ids: Tensor
    size: int
    weight: Tensor | None = None


Factor = Tensor | OneHot
Side = Tensor | None
"""A linear map along one axis: None (identity), a vector (diagonal, (n,)) or a matrix ((p, n))."""


def along(side: Side, factor: Factor) -> Factor:
    """Apply ``side`` to the last axis of every token's vector."""
    if isinstance(factor, Tensor):
        return dense_along(side, factor)
    if side is None:
        return factor
    if side.ndim == 1:
        scale = side[factor.ids]
        return factor._replace(weight=scale if factor.weight is None else scale * factor.weight)
    picked = side.T[factor.ids]
    return picked if factor.weight is None else picked * factor.weight[..., None]


def dense_along(side: Side, x: Tensor) -> Tensor:
    """Apply ``side`` to the last axis of ``x``."""
    if side is None:
        return x
    side = side.to(x.dtype)
    return x * side if side.ndim == 1 else x @ side.T


def alike(rows: Factor, cols: Tensor) -> tuple[Factor, Tensor]:
    """Return both factors in the wider type of the two: under autocast gradients are narrower than inputs."""
    if isinstance(rows, OneHot) or rows.dtype == cols.dtype:
        return rows, cols
    dtype = torch.promote_types(rows.dtype, cols.dtype)
    return rows.to(dtype), cols.to(dtype)


def outer(rows: Factor, cols: Tensor | None) -> Tensor:
    """Compute Σ_n rows_n colsᵀ_n, (E, P, Q), or Σ_n rows_n, (E, P), without columns."""
    if cols is None:
        return _scatter(rows, None) if isinstance(rows, OneHot) else rows.sum(1)
    return _scatter(rows, cols) if isinstance(rows, OneHot) else rows.transpose(-1, -2) @ cols


def transpose(side: Side) -> Side:
    """Return the side's adjoint."""
    return side if side is None or side.ndim == 1 else side.T


def product(second: Side, first: Side) -> Side:
    """Return the side that applies ``first``, then ``second``."""
    if second is None or first is None:
        return first if second is None else second
    if second.ndim == 1:
        return second * first if first.ndim == 1 else second[:, None] * first
    if first.ndim == 1:
        return second * first
    dtype = torch.promote_types(second.dtype, first.dtype)  # statistics are in float64, draws in float32
    return second.to(dtype) @ first.to(dtype)


def length(side: Side, n: int) -> int:
    """Return the length that an axis of length ``n`` has after ``side``."""
    return n if side is None else side.shape[0]


def _scatter(rows: OneHot, values: Tensor | None) -> Tensor:
    """Compute Σ_n e_{id_n} valuesᵀ_n by scattered addition: no one-hot matrix is formed."""
    scale = rows.weight
    if values is None:
        ones = torch.ones_like(rows.ids, dtype=torch.float32) if scale is None else scale
        zeros = torch.zeros(*rows.ids.shape[:-1], rows.size, dtype=ones.dtype, device=ones.device)
        return zeros.scatter_add(-1, rows.ids, ones)
    if scale is not None:
        values = values * scale[..., None]
    ids = rows.ids[..., None].expand(*rows.ids.shape, values.shape[-1])
    zeros = torch.zeros(*values.shape[:-2], rows.size, values.shape[-1], dtype=values.dtype, device=values.device)
    return zeros.scatter_add(-2, ids, values)
