"""Normalisation of gradients by Adafactor's factored second moments.

    matrices    r = E[mean_j G²], c = E[mean_i G²]     G ↦ diag(r + ε)^-½ G diag(c + ε)^-½ · √mean(r)
    kernels     the same on (o, i · spatial), shape kept; stacks of experts: each of the matrices
    vectors     v = E[g²]                              g ↦ g (v + ε)^-½

It is a linear map with two diagonal sides, so before a projection it costs nothing a step.

References: Adafactor, arXiv 1804.04235; TrackStar, arXiv 2410.17413.
"""

import torch
from torch import Tensor

from funcattrib.chain.transform import State, Transform
from funcattrib.errors import ChainError
from funcattrib.kernels.safe_norm import float32_at_least
from funcattrib.lift import GradientMap, Readouts, TwoSided, readout
from funcattrib.transforms import leaf_shapes
from funcattrib.transforms.moments import Moment, Moments, entries, factors, moment_norm, start
from funcattrib.types import Leaf, Spec

_TILE = 1 << 18


def adafactor_norm(moments: Moments | None = None, eps: float = 1e-30) -> Transform:
    """Divide by the root of Adafactor's factored second moments.

    Args:
        moments: r and c of each matrix, or v of its entries, whose means they are; v of each vector. Fitted in a pass
            over data when not given; ``optimizer_state`` reads an optimizer's.
        eps: added to each moment.

    Raises:
        ChainError: scalars; moments that are missing or do not fit.

    Example:
        >>> stage = adafactor_norm({"w": (torch.tensor([4.0, 4.0]), torch.tensor([1.0]))})
        >>> state, _ = stage.init({"w": Leaf((2, 1), torch.float32)})
        >>> stage(state, {"w": torch.ones(1, 2, 1)})["w"].flatten()
        tensor([1., 1.])
    """
    return moment_norm(
        "adafactor_norm", moments, eps, init=_init_adafactor, statistic=_mean_squares, maps=_maps_adafactor
    )


def _init_adafactor(moments: Moments | None, spec: Spec) -> tuple[State, Spec]:
    for name, leaf in spec.items():
        if not leaf.shape:
            raise ChainError(f"requires vectors or matrices, and {name} is a scalar; leave it out with select")
    return start(spec, moments, _factors), spec


def _factors(name: str, leaf: Leaf, moment: Moment | None) -> Tensor:
    """Join r and c one after the other; (x, o + i) of a stack."""
    stack = leaf_shapes.is_stack(name, leaf.shape)
    if moment is None:
        size = sum(leaf_shapes.sides(name, leaf.shape))
        return torch.zeros((leaf.shape[0], size) if stack else size, dtype=torch.float64)
    if len(leaf.shape) > 2 and not stack:
        moment = entries(moment).flatten(1)
    return torch.cat(factors(moment), -1)


def _mean_squares(name: str, grad: Tensor) -> Tensor:
    """Compute the mean over columns, mean over rows, (B, …, O, I) → (B, …, O + I); squares of (B, n)."""
    if grad.ndim == 2:
        return float32_at_least(grad).square()
    if not leaf_shapes.is_stack(name, tuple(grad.shape[1:])):
        grad = grad.flatten(2)
    of_rows, of_cols = [], []
    for part in torch.split(grad, max(1, _TILE // grad.shape[-1]), -2):  # so many rows that their squares stay in cache
        squares = float32_at_least(part).square()
        of_rows.append(squares.mean(-1))
        of_cols.append(squares.sum(-2))
    return torch.cat([*of_rows, torch.stack(of_cols).sum(0) / grad.shape[-2]], -1)


def _maps_adafactor(state: State, spec: Spec, eps: float) -> Readouts:
    return {name: readout(name, _map(name, state["sums"][name], leaf.shape, eps)) for name, leaf in spec.items()}


def _map(name: str, moments: Tensor, shape: tuple[int, ...], eps: float) -> GradientMap:
    """Return the map of diag(r)^-½ √mean(r) and diag(c)^-½; a row or column that never had a gradient stays zero."""
    if len(shape) == 1:
        return TwoSided(_inverse_root(moments, eps))
    r, c = torch.split(moments, list(leaf_shapes.sides(name, shape)), -1)
    left, right = _inverse_root(r, eps) * r.mean(-1, keepdim=True).sqrt(), _inverse_root(c, eps)
    return leaf_shapes.normalisation(name, shape, left, right)


def _inverse_root(moment: Tensor, eps: float) -> Tensor:
    return torch.where(moment > 0, (moment + eps).rsqrt(), 0.0)
