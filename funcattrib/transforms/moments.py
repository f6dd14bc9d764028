"""Second moments of gradients: averaged over a pass, or given, e.g. from an optimizer's state.

A matrix has v (O, I), entry by entry, or Adafactor's factors r (O,) and c (I,); a vector has v (n,). Each serves for
the other:

    factors of v    r_i = mean_j v_ij,  c_j = mean_i v_ij        v of factors    v_ij = r_i c_j / mean(r)

Reference: Adafactor, arXiv 1804.04235.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from funcattrib.chain.transform import State, Transform, finalize_nothing, observe_nothing
from funcattrib.errors import ChainError
from funcattrib.lift import Measured, Readouts, TwoSided, readout
from funcattrib.types import Grads, Leaf, Spec

Moment = tuple[Tensor, Tensor] | Tensor
Moments = Mapping[str, Moment]
"""Parameter name → (r (O,), c (I,)) or v (O, I) of a matrix, v (n,) of a vector; a stack's axis comes before."""


def moment_norm(
    name: str,
    moments: Moments | None,
    eps: float,
    *,
    init: Callable[[Moments | None, Spec], tuple[State, Spec]],
    statistic: Callable[[str, Tensor], Tensor],
    maps: Callable[..., Readouts],
) -> Transform:
    """Return the stage that divides by the root of second moments, given or fitted in a pass.

    Args:
        moments: in place of the pass.
        init: (moments, spec) → the first state and the spec.
        statistic: a leaf's name and gradients (B, *shape) → the squares that are averaged.
        maps: (state, spec, eps) → the map of each leaf.
    """
    given = moments is not None
    return Transform(
        name,
        settings={"eps": eps},
        init=partial(init, moments),
        statistics=None if given else partial(measured, statistic),
        observe=observe_nothing if given else add_up,
        finalize=finalize_nothing if given else average,
        maps=partial(maps, eps=eps),
    )


def start(spec: Spec, moments: Moments | None, of: Callable[[str, Leaf, Moment | None], Tensor]) -> State:
    """Return the state of a stage before its pass, or with given moments.

    Args:
        of: a leaf's name, the leaf and its moment → what the stage keeps of it, in float64; zeros without a moment.

    Raises:
        ChainError: a moment that is missing or does not fit.
    """
    sums = {}
    for name, leaf in spec.items():
        moment = None
        if moments is not None:
            if name not in moments:
                hint = "; put it before split_heads" if "#" in name else ""
                raise ChainError(f"has no moments for {name}{hint}")
            moment = moments[name]
            if _shape(moment) != leaf.shape:
                raise ChainError(f"expected moments of {name} of shape {leaf.shape}, found {_shape(moment)}")
        sums[name] = of(name, leaf, moment)
    return {"sums": sums, "count": torch.full((), 0.0 if moments is None else 1.0, dtype=torch.float64)}


def measured(of: Callable[[str, Tensor], Tensor], spec: Spec) -> Readouts:
    """Return the map of each leaf's statistic: ``of`` its name and gradients (B, *shape), quadratic in them."""
    return {name: readout(name, Measured(TwoSided(), partial(of, name))) for name in spec}


def add_up(state: State, squares: Grads) -> State:
    """Add one batch of squares, name → (B, …), to the state in float64."""
    sums = {
        name: total + squares[name].sum(0, dtype=torch.float64).to(total.device)
        for name, total in state["sums"].items()
    }
    return {"sums": sums, "count": state["count"] + len(next(iter(squares.values())))}


def average(state: State) -> State:
    """Divide sums over examples to means."""
    mean = {name: total / state["count"] for name, total in state["sums"].items()}
    return {"sums": mean, "count": torch.ones_like(state["count"])}


def factors(moment: Moment) -> tuple[Tensor, ...]:
    """Compute (r, c) of a matrix' moment, (v,) of a vector's, in float64.

    Example:
        >>> factors(torch.tensor([[1.0, 3.0], [5.0, 7.0]]))
        (tensor([2., 6.], dtype=torch.float64), tensor([3., 5.], dtype=torch.float64))
    """
    if not isinstance(moment, Tensor):
        return tuple(side.detach().to(torch.float64) for side in moment)
    v = moment.detach().to(torch.float64)
    return (v.mean(-1), v.mean(-2)) if v.ndim > 1 else (v,)


def entries(moment: Moment) -> Tensor:
    """Compute v of every entry, in float64; of factors, Adafactor's r cᵀ / mean(r)."""
    if isinstance(moment, Tensor):
        return moment.detach().to(torch.float64)
    r, c = factors(moment)
    mean = r.mean(-1, keepdim=True).clamp(min=torch.finfo(r.dtype).tiny)
    return (r / mean)[..., None] * c[..., None, :]


def _shape(moment: Moment) -> tuple[int, ...]:
    """Return the shape of the parameter that a moment belongs to."""
    return tuple(moment.shape) if isinstance(moment, Tensor) else (*moment[0].shape, moment[1].shape[-1])
