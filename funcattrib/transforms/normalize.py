"""Normalisation of gradients: by Adafactor's factored second moments, and to unit length.

    adafactor   r = E[mean_j G²], c = E[mean_i G²]     G ↦ diag(r + ε)^-½ G diag(c + ε)^-½ · √mean(r)
    vectors     v = E[g²]                              g ↦ g (v + ε)^-½
    unit norm   g ↦ g / ‖g‖ over all leaves together; a zero gradient stays zero

The first is a linear map with two diagonal sides, so before a projection it costs nothing a step.

References: Adafactor, arXiv 1804.04235; TrackStar, arXiv 2410.17413.
"""

from functools import partial

import torch
from torch import Tensor

from funcattrib.compose import State, Transform, finalize_nothing, observe_nothing
from funcattrib.errors import ChainError
from funcattrib.lift import Lowered, TwoSided, own
from funcattrib.per_example import Grads, Leaf, Spec
from funcattrib.transforms.moments import Moment, Moments, add_up, average, factors, start


def adafactor_norm(moments: Moments | None = None, eps: float = 1e-30) -> Transform:
    """Divide by the root of Adafactor's factored second moments.

    Args:
        moments: r and c of each matrix, or v of its entries, whose means they are; v of each vector. Fitted in a pass
            over data when not given; ``optimizer_state`` reads an optimizer's.
        eps: added to each moment.

    Raises:
        ChainError: leaves that are neither matrices nor vectors; moments that are missing or do not fit.

    Example:
        >>> stage = adafactor_norm({"w": (torch.tensor([4.0, 4.0]), torch.tensor([1.0]))})
        >>> state, _ = stage.init({"w": Leaf((2, 1), torch.float32)})
        >>> stage.apply(state, {"w": torch.ones(1, 2, 1)})["w"].flatten()
        tensor([1., 1.])
    """
    given = moments is not None
    return Transform(
        "adafactor_norm",
        init=partial(_init_adafactor, moments),
        observe=observe_nothing if given else add_up,
        finalize=finalize_nothing if given else average,
        apply=partial(_apply_adafactor, eps=eps),
        lower=partial(_lower_adafactor, eps=eps),
        measure=None if given else _mean_squares,
    )


def unit_norm() -> Transform:
    """Scale each example's gradient, all leaves together, to Euclidean length 1; zero stays zero.

    Example:
        >>> apply = unit_norm().apply
        >>> apply(None, {"a": torch.tensor([[3.0]]), "b": torch.tensor([[4.0]])})
        {'a': tensor([[0.6000]]), 'b': tensor([[0.8000]])}
    """
    return Transform("unit_norm", apply=_apply_unit_norm)


def _init_adafactor(moments: Moments | None, spec: Spec) -> tuple[State, Spec]:
    for name, leaf in spec.items():
        if len(leaf.shape) not in (1, 2):
            raise ChainError(f"needs matrices or vectors; {name} has shape {leaf.shape}")
    return start(spec, moments, _factors), spec


def _factors(leaf: Leaf, moment: Moment | None) -> Tensor:
    """r and c one after the other."""
    return torch.zeros(sum(leaf.shape), dtype=torch.float64) if moment is None else torch.cat(factors(moment))


def _mean_squares(grad: Tensor) -> Tensor:
    """(B, O, I) → (B, O + I): mean over columns, mean over rows; (B, n) → squares."""
    squares = grad * grad
    return squares if grad.ndim == 2 else torch.cat([squares.mean(2), squares.mean(1)], 1)


def _apply_adafactor(state: State, grads: Grads, eps: float) -> Grads:
    return {name: _sides(state["sums"][name], grad.shape[1:], eps).of_gradient(grad) for name, grad in grads.items()}


def _lower_adafactor(state: State, spec: Spec, eps: float) -> Lowered:
    return {name: own(name, _sides(state["sums"][name], leaf.shape, eps)) for name, leaf in spec.items()}


def _sides(moments: Tensor, shape: tuple[int, ...], eps: float) -> TwoSided:
    """diag(r)^-½ √mean(r) and diag(c)^-½; a row or column that never had a gradient is left at zero."""
    if len(shape) == 1:
        return TwoSided(_inverse_root(moments, eps))
    r, c = moments.split(list(shape))
    return TwoSided(_inverse_root(r, eps) * float(r.mean().sqrt()), _inverse_root(c, eps))


def _inverse_root(moment: Tensor, eps: float) -> Tensor:
    return torch.where(moment > 0, (moment + eps).rsqrt(), 0.0)


def _apply_unit_norm(state: State, grads: Grads) -> Grads:
    squares = sum(grad.flatten(1).to(torch.float32).square().sum(1) for grad in grads.values())
    norm = torch.as_tensor(squares).sqrt()
    inverse = torch.where(norm > 0, 1 / norm, 0.0)
    return {n: g * inverse.to(g.dtype).reshape(-1, *[1] * (g.ndim - 1)) for n, g in grads.items()}
