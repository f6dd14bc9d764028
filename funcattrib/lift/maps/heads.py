"""A gradient taken apart by attention heads, each head with its linear map.

    C(G) = stack over heads h of   L_h G[rows of h] Rᵀ      or      L G[:, columns of h] R_hᵀ      (E, H, p, q)

The side that heads do not divide is shared: x Rᵀ is computed once. The other one is one batched product over heads.
Maps of any other kind after the split are applied to the formed, stacked (E, H, …), head by head.

Shapes: E examples, N tokens, H heads, S a head's rows or columns, P/Q coordinates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from funcattrib.lift.factors import Factor, OneHot, Side, along, dense_along, length, outer, product
from funcattrib.lift.maps.base import Composed, GradientMap
from funcattrib.lift.maps.two_sided import TwoSided


class Heads(NamedTuple):
    """Assignment of positions along an axis of a weight to heads.

    Attributes:
        axis: of the weight.
        number: of heads.
        size: positions of one head, over all blocks.
        blocks: of the axis, one after the other, each (number, size / blocks): GPT-2's query, key and value.
        kept: the heads that are read, all of them by default.
    """

    axis: int
    number: int
    size: int
    blocks: int = 1
    kept: tuple[int, ...] | None = None

    @property
    def read(self) -> int:
        """Return the number of heads that are read."""
        return self.number if self.kept is None else len(self.kept)

    def take(self, x: Tensor) -> Tensor:
        """Divide the last axis into heads, (…, n) → (…, H, S)."""
        if self.blocks == 1:
            parts = x.unflatten(-1, (self.number, self.size))
        else:
            parts = x.unflatten(-1, (self.blocks, self.number, -1)).transpose(-3, -2).flatten(-2)
        return parts if self.kept is None else parts[..., list(self.kept), :]

    def scatter(self, parts: Tensor) -> Tensor:
        """Join heads, (…, H, S) → (…, n), zero where no head is read: the adjoint of ``take``."""
        if self.kept is not None:
            whole = parts.new_zeros(*parts.shape[:-2], self.number, self.size)
            parts = whole.index_copy(-2, torch.tensor(self.kept, device=parts.device), parts)
        if self.blocks == 1:
            return parts.flatten(-2)
        return parts.unflatten(-1, (self.blocks, -1)).transpose(-3, -2).flatten(-3)

    def only(self, numbers: Sequence[int]) -> "Heads":
        """Keep, of the heads that are read, those in these places."""
        if len(numbers) == self.read:
            return self
        before = range(self.number) if self.kept is None else self.kept
        return self._replace(kept=tuple(before[number] for number in numbers))


@dataclass(frozen=True)
class Split(GradientMap):
    """The heads' gradients with two sides each; see the module.

    Attributes:
        heads: along which axis, and how.
        per_head: each head's side along that axis: None (identity), (H, S) (diagonals) or (H, P, S).
        other: the side along the other axis, shared by the heads.
    """

    heads: Heads
    per_head: Tensor | None = None
    other: Side = None

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the coordinates of a weight of ``shape``: heads first."""
        per_head = self.heads.size if self.per_head is None else self.per_head.shape[1]
        sides = tuple(per_head if axis == self.heads.axis else length(self.other, n) for axis, n in enumerate(shape))
        return (self.heads.read, *sides)

    def reduce_rows(self, rows: Factor) -> Factor:
        """Apply their side to rows, heads one after the other: (E, N, H·P)."""
        if self.heads.axis == 1:
            return along(self.other, rows)
        return rows if isinstance(rows, OneHot) else self._each(rows).flatten(-2)

    def reduce_cols(self, cols: Tensor) -> Tensor:
        """Apply their side to columns, heads one after the other: (E, N, H·Q)."""
        return dense_along(self.other, cols) if self.heads.axis == 0 else self._each(cols).flatten(-2)

    def from_factors(self, rows: Factor, cols: Tensor | None) -> Tensor:
        """Compute coordinates from kept factors."""
        formed = outer(rows, cols)
        if isinstance(rows, OneHot) and self.heads.axis == 0:  # one-hot rows do not divide into heads: rows of G do
            return replace(self, other=None).from_gradient(formed)
        return formed.unflatten(1 + self.heads.axis, (self.heads.read, -1)).movedim(1 + self.heads.axis, 1)

    def from_gradient(self, gradient: Tensor) -> Tensor:
        """Compute coordinates of formed gradients (E, *shape)."""
        axis = 1 + self.heads.axis
        shared = TwoSided(None, self.other) if self.heads.axis == 0 else TwoSided(self.other)
        parts = self._each(shared.from_gradient(gradient).movedim(axis, -1))
        return parts.movedim((-2, -1), (1, 1 + axis))

    def adjoint(self, theta: Tensor) -> Tensor:
        """Compute C*(θ) of θ (H, …), without example axis."""
        axis = self.heads.axis
        parts = theta.movedim((0, 1 + axis), (-2, -1))
        whole = self.heads.scatter(_apply(_transpose(self.per_head), parts)).movedim(-1, axis)
        shared = TwoSided(None, self.other) if axis == 0 else TwoSided(self.other)
        return shared.adjoint(whole)

    def to(self, dtype: torch.dtype) -> "Split":
        """Convert every side to ``dtype``."""
        per_head, other = (side if side is None else side.to(dtype) for side in (self.per_head, self.other))
        return replace(self, per_head=per_head, other=other)

    def __matmul__(self, first: GradientMap) -> GradientMap:
        """Merge a pair of sides before the split into it, unless one mixes the heads."""
        if not isinstance(first, TwoSided):
            return Composed(first, self)
        sides = (first.left, first.right)
        divided = sides[self.heads.axis]
        if divided is not None and divided.ndim == 2:
            return Composed(first, self)
        before = None if divided is None else self.heads.take(divided)
        return replace(
            self, per_head=_product(self.per_head, before), other=product(self.other, sides[1 - self.heads.axis])
        )

    def narrow(self, numbers: Sequence[int]) -> "Split":
        """Keep only the heads in these places."""
        per_head = (
            self.per_head if self.per_head is None or len(numbers) == self.heads.read else self.per_head[list(numbers)]
        )
        return replace(self, heads=self.heads.only(numbers), per_head=per_head)

    def absorb(self, maps: Sequence[GradientMap]) -> GradientMap:
        """Apply a map to each head's coordinates, in one product where all maps are alike pairs of sides."""
        pairs = [one for one in maps if isinstance(one, TwoSided)]
        per_head = [(pair.left, pair.right)[self.heads.axis] for pair in pairs]
        other = [(pair.right, pair.left)[self.heads.axis] for pair in pairs]
        alike = len({None if side is None else side.shape for side in per_head}) == 1
        if len(pairs) < len(maps) or not alike or any(side is not other[0] for side in other):
            return Composed(self, Each(tuple(maps)))
        stacked = None if per_head[0] is None else torch.stack([side for side in per_head if side is not None])
        return replace(self, per_head=_product(stacked, self.per_head), other=product(other[0], self.other))

    def _each(self, x: Tensor) -> Tensor:
        """Apply its own side to every head's part, (…, n) → (…, H, P)."""
        return _apply(self.per_head, self.heads.take(x))


@dataclass(frozen=True)
class Each(GradientMap):
    """After a split: one map for each head of formed, stacked gradients (E, H, …).

    Their coordinates are stacked again, except that one head alone is not: (E, …).
    """

    maps: tuple[GradientMap, ...]

    @property
    def linear(self) -> bool:
        return all(one.linear for one in self.maps)

    @property
    def wide(self) -> bool:
        return any(one.wide for one in self.maps)

    @property
    def per_entry(self) -> bool:
        return True

    def narrow(self, numbers: Sequence[int]) -> "Each":
        return Each(tuple(self.maps[number] for number in numbers))

    def absorb(self, maps: Sequence[GradientMap]) -> "Each":
        return Each(tuple(one @ before for one, before in zip(maps, self.maps, strict=True)))

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the coordinates of stacked gradients of ``shape``, heads first."""
        of_one = self.maps[0].coordinates_shape(shape[1:])
        return of_one if len(self.maps) == 1 else (len(self.maps), *of_one)

    def from_gradient(self, gradient: Tensor) -> Tensor:
        """Compute coordinates of formed gradients (E, H, …)."""
        parts = [one.from_gradient(part) for one, part in zip(self.maps, gradient.unbind(1), strict=True)]
        return parts[0] if len(parts) == 1 else torch.stack(parts, 1)

    def adjoint(self, theta: Tensor) -> Tensor:
        """Compute C*(θ) of θ without example axis."""
        parts = (theta,) if len(self.maps) == 1 else theta.unbind()
        return torch.stack([one.adjoint(part) for one, part in zip(self.maps, parts, strict=True)])

    def to(self, dtype: torch.dtype) -> "Each":
        """Convert every map to ``dtype``."""
        return Each(tuple(one.to(dtype) for one in self.maps))


def each(gradient_map: GradientMap, maps: Sequence[GradientMap | None]) -> GradientMap:
    """Return ``gradient_map``, which stacks heads, followed by one map for each; None drops the head."""
    numbers = [number for number, one in enumerate(maps) if one is not None]
    kept = [one for one in maps if one is not None]
    if len(kept) == 1:  # one head alone is not stacked
        return Each((kept[0],)) @ gradient_map.narrow(numbers)
    return gradient_map.narrow(numbers).absorb(kept)


def _apply(per_head: Tensor | None, parts: Tensor) -> Tensor:
    """Apply each head's side to its part: (…, H, S) → (…, H, P)."""
    if per_head is None:
        return parts
    per_head = per_head.to(parts.dtype)
    return parts * per_head if per_head.ndim == 2 else torch.einsum("...hs,hps->...hp", parts, per_head)


def _transpose(per_head: Tensor | None) -> Tensor | None:
    return per_head if per_head is None or per_head.ndim == 2 else per_head.transpose(1, 2)


def _product(second: Tensor | None, first: Tensor | None) -> Tensor | None:
    """Return each head's ``first`` side, followed by its ``second``."""
    if second is None or first is None:
        return first if second is None else second
    if second.ndim == 2:
        return second * first if first.ndim == 2 else second[..., None] * first
    if first.ndim == 2:
        return second * first[:, None]
    dtype = torch.promote_types(second.dtype, first.dtype)  # statistics are in float64, draws in float32
    return second.to(dtype) @ first.to(dtype)
