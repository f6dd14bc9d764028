"""A transform of per-example gradients: a small tuple of pure functions on explicit state."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from funcattrib.lift import Readouts
from funcattrib.types import Grads, Leaf, Spec

State = Any


def stateless(spec: Spec) -> tuple[State, Spec]:
    """Return no state and the same spec: the ``init`` of a transform without state that keeps every shape."""
    return None, spec


def observe_nothing(state: State, grads: Grads) -> State:
    """Return the state as it is: the ``observe`` of a transform that is not fitted."""
    return state


def finalize_nothing(state: State) -> State:
    """Return the state as it is: the ``finalize`` of a transform that is not fitted."""
    return state


class Transform(NamedTuple):
    """A transform of per-example gradients: a small tuple of pure functions.

    Attributes:
        name: as in the manifest and in error messages.
        settings: the hyper-parameters as plain values, which the manifest keeps; None without any.
        init: spec → (state, spec of the result); shapes and random draws, no data; raises ChainError on a spec
            that does not fit.
        observe: folds one batch of incoming gradients (or of what ``measure`` makes of them) into the state. It adds to
            what ``init`` leaves at zero: states of several processes are merged by their sum.
        finalize: what is done once after the pass, e.g. an eigendecomposition.
        apply: pure, row by row.
        lower: the same as a linear map per parameter, where it is one. Parameters left out are dropped.
        measure: leaf by leaf, its name and gradients (B, *shape) → the statistic (B, …) that ``observe`` folds. Where
            given, the statistic is read in the backward pass and the gradients are never held together. A statistic is
            quadratic, f(s g) = s² f(g): second moments.
        precedes: names of stages that this one can only stand before; ``compose`` moves it before the first of them.
        condense: a map, linear or not, of each incoming leaf by itself, from which alone ``apply`` works: it then
            receives those in place of gradients, which are never held together.
        parts: names of leaves → part → the stage that fits that part alone, and its leaves. For a state that may be
            large: the parts' states, flattened and put together, are the stage's, so that several processes can fit
            some each; and none is moved to a device but by ``apply``, for its use.

    Example:
        >>> import torch
        >>> double = Transform("double", apply=lambda state, grads: {name: 2 * grad for name, grad in grads.items()})
        >>> state, _ = double.init({})
        >>> double.apply(state, {"w": torch.ones(1, 2)}), double.fitted
        ({'w': tensor([[2., 2.]])}, False)
    """

    name: str
    settings: Mapping[str, Any] | None = None
    init: Callable[[Spec], tuple[State, Spec]] = stateless
    observe: Callable[[State, Grads], State] = observe_nothing
    finalize: Callable[[State], State] = finalize_nothing
    apply: Callable[[State, Grads], Grads] = lambda state, grads: grads
    lower: Callable[[State, Spec], Readouts] | None = None
    measure: Callable[[str, Tensor], Tensor] | None = None
    precedes: tuple[str, ...] = ()
    condense: Callable[[State, Spec], Readouts] | None = None
    parts: Callable[[Iterable[str]], Mapping[str, tuple["Transform", list[str]]]] | None = None

    @property
    def fitted(self) -> bool:
        """Return whether this transform needs a pass over data."""
        return self.observe is not observe_nothing

    def describe(self) -> dict[str, Any]:
        """Return name and settings, as the manifest keeps them."""
        return {"name": self.name, **(self.settings or {})}


def applied(stage: Transform, state: State, grads: Grads) -> Grads:
    """Apply one stage to gradients that are already there."""
    if stage.condense is None:
        return stage.apply(state, grads)
    maps = stage.condense(state, {name: Leaf(tuple(grad.shape[1:]), grad.dtype) for name, grad in grads.items()})
    return stage.apply(state, {name: maps[name].map.from_gradient(grad) for name, grad in grads.items()})
