"""The step that Adam would take next on one example alone: LESS' training gradients.

    m̂ = (β₁ m + (1 − β₁) g) / (1 − β₁ᵗ)        v̂ = (β₂ v + (1 − β₂) g²) / (1 − β₂ᵗ)        Γ(g) = m̂ / (√v̂ + ε)

m and v as the optimizer has them after t − 1 steps. Entry by entry, and not linear: g is in the denominator, and every
example has the momentum m in common. Each weight's gradient is formed in its turn; a projection of the updates is read
with them, so that no example's updates are ever held together.

References: LESS, arXiv 2402.04333; Adam, arXiv 1412.6980.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from funcattrib.chain.transform import State, Transform, apply_nothing
from funcattrib.errors import ChainError
from funcattrib.kernels.safe_norm import float32_at_least
from funcattrib.lift import Readouts, readout
from funcattrib.lift.maps.elementwise import Elementwise
from funcattrib.types import Spec


class AdamState(NamedTuple):
    """Adam's state of one parameter.

    Attributes:
        first, second: m and v as saved, without bias correction, shaped like the parameter.
        step: steps made so far.
        betas, eps: of its group.
    """

    first: Tensor
    second: Tensor
    step: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


def adam_update(states: Mapping[str, AdamState], then: Transform | None = None) -> Transform:
    """Replace each example's gradient by the update that Adam would make on it, without learning rate or decay.

    Args:
        states: of each leaf, as ``adam_state`` reads an optimizer's. They are part of the state, not of the settings.
        then: a linear map of each updated leaf by itself, such as ``project``.

    Raises:
        ChainError: states that are missing or do not fit; a ``then`` that is not linear, or joins leaves.

    Example:
        >>> from funcattrib.types import Leaf
        >>> stage = adam_update({"w": AdamState(torch.zeros(2), torch.zeros(2), step=0)})
        >>> state, _ = stage.init({"w": Leaf((2,), torch.float32)})
        >>> stage(state, {"w": torch.tensor([[3.0, -0.2]])})["w"].round(decimals=3)
        tensor([[ 1., -1.]])
    """
    if then is not None and (then.maps is None or then.apply is not apply_nothing):
        raise _not_linear(then)
    return Transform(
        "adam_update",
        settings={"then": None if then is None else then.describe()},
        init=partial(_init, dict(states), then),
        maps=partial(_updates, then),
    )


def _init(states: Mapping[str, AdamState], then: Transform | None, spec: Spec) -> tuple[State, Spec]:
    """Return m and v as they are, and b, d, ε, a, c of each leaf's (a m + b g) / (√(c v + d g²) + ε). And the map's
    state.
    """
    kept = {}
    for name, leaf in spec.items():
        if name not in states:
            raise ChainError(f"has no Adam moments for {name}")
        first, second, step, (beta1, beta2), eps = states[name]
        if {tuple(first.shape), tuple(second.shape)} != {leaf.shape}:
            raise ChainError(f"expected moments of {name} of shape {leaf.shape}, found {tuple(first.shape)}")
        of_first, of_second = (1 - beta ** (step + 1) for beta in (beta1, beta2))
        rates = [(1 - beta1) / of_first, (1 - beta2) / of_second, eps, beta1 / of_first, beta2 / of_second]
        kept[name] = {"first": first, "second": second, "rates": torch.tensor(rates, dtype=torch.float64)}
    following, result = (None, spec) if then is None else then.init(spec)
    if then is not None and list(result) != list(spec):
        raise ChainError(f"cannot be followed by then={then.describe()}, which joins or divides leaves")
    if then is not None and then.linear_maps(following, spec) is None:  # maps that are not linear say so once made
        raise _not_linear(then)
    return {"adam": kept, "then": following}, result


def _not_linear(then: Transform) -> ChainError:
    return ChainError(f"then= of adam_update must be a linear stage, and {then.name} is not; put it after adam_update")


def _updates(then: Transform | None, state: State, spec: Spec) -> Readouts:
    updates = {name: Elementwise(partial(_update, **state["adam"][name])) for name in spec}
    if then is None or then.maps is None:
        return {name: readout(name, update) for name, update in updates.items()}
    maps = then.maps(state["then"], spec)
    return {name: readout(name, maps[name].map.to(spec[name].dtype) @ updates[name]) for name in spec}


def _update(gradient: Tensor, first: Tensor, second: Tensor, rates: Tensor) -> Tensor:
    """Compute the update, at least in float32: squares of small gradients vanish in float16."""
    g = float32_at_least(gradient)
    b, d, eps, a, c = rates.to(g.dtype)
    root = torch.addcmul((g * d).mul_(g), second.to(g.dtype), c).sqrt_().add_(eps)
    return torch.addcmul(g * b, first.to(g.dtype), a).div_(root).to(gradient.dtype)
