"""A transform of per-example gradients: a small tuple of pure functions on explicit state."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from funcattrib.chain.code_hash import code_hash, is_own
from funcattrib.lift import Readouts, from_gradients
from funcattrib.types import Grads, Leaf, Spec

State = Any
_FUNCTIONS = ("init", "statistics", "observe", "finalize", "maps", "apply", "parts")


def stateless(spec: Spec) -> tuple[State, Spec]:
    """Return no state and the same spec: the ``init`` of a transform without state that keeps every shape."""
    return None, spec


def observe_nothing(state: State, grads: Grads) -> State:
    """Return the state as it is: the ``observe`` of a transform that is not fitted."""
    return state


def finalize_nothing(state: State) -> State:
    """Return the state as it is: the ``finalize`` of a transform that is not fitted."""
    return state


def apply_nothing(state: State, grads: Grads) -> Grads:
    """Apply nothing more: the ``apply`` of a transform that is its maps alone."""
    return grads


class Transform(NamedTuple):
    """A transform of per-example gradients: a small tuple of pure functions.

    What is done leaf by leaf is given as gradient maps. They are read in the backward pass, where no gradient is held
    whole, or of gradients that are there already. What needs all leaves at once is given as a function.

        result    apply(state, maps(state, spec) of the gradients)
        state     finalize(observe(state, statistics(spec) of the gradients), …)

    Attributes:
        name: as in the manifest and in error messages.
        settings: the hyper-parameters as plain values, which the manifest keeps; None without any.
        init: spec → (state, spec of the result); shapes and random draws, no data; raises ChainError on a spec
            that does not fit.
        statistics: gradient maps of incoming leaves, most often ``Measured``; without, ``observe`` has the gradients.
        observe: folds one batch of what ``statistics`` read into the state. It adds to what ``init`` leaves at zero:
            states of several processes are merged by their sum.
        finalize: what is done once after the pass, e.g. an eigendecomposition.
        maps: gradient maps of incoming leaves, linear or not; leaves without one are dropped. Linear ones join the
            chain's linear prefix. Without, ``apply`` has the gradients.
        apply: pure, row by row, of what ``maps`` read.
        precedes: names of stages that this one can only stand before; ``compose`` moves it before the first of them.
        parts: names of leaves → part → the stage that fits that part alone, and its leaves. For a state that may be
            large: the parts' states, flattened and put together, are the stage's, so that several processes can fit
            some each; and none is moved to a device but by ``apply``, for its use.

    Example:
        >>> import torch
        >>> double = Transform("double", apply=lambda state, grads: {name: 2 * grad for name, grad in grads.items()})
        >>> state, _ = double.init({})
        >>> double(state, {"w": torch.ones(1, 2)}), double.fitted
        ({'w': tensor([[2., 2.]])}, False)
    """

    name: str
    settings: Mapping[str, Any] | None = None
    init: Callable[[Spec], tuple[State, Spec]] = stateless
    statistics: Callable[[Spec], Readouts] | None = None
    observe: Callable[[State, Grads], State] = observe_nothing
    finalize: Callable[[State], State] = finalize_nothing
    maps: Callable[[State, Spec], Readouts] | None = None
    apply: Callable[[State, Grads], Grads] = apply_nothing
    precedes: tuple[str, ...] = ()
    parts: Callable[[Iterable[str]], Mapping[str, tuple["Transform", list[str]]]] | None = None

    @property
    def fitted(self) -> bool:
        """Return whether this transform needs a pass over data."""
        return self.observe is not observe_nothing

    def describe(self) -> dict[str, Any]:
        """Return name and settings, as the manifest keeps them."""
        return {"name": self.name, **(self.settings or {})}

    def identity(self) -> dict[str, Any]:
        """Return the manifest's entry: the description, and of a user's transform a hash of its code."""
        described = self.describe()
        functions = [getattr(self, name) for name in _FUNCTIONS]
        if not any(map(is_own, functions)):
            return described
        code = code_hash(functions, f"the transform {self.name!r}")
        return described if code is None else {**described, "code": code}

    def linear_maps(self, state: State, spec: Spec) -> Readouts | None:
        """Return the maps where they are linear and all there is; None where something else is done too."""
        if self.maps is None or self.apply is not apply_nothing:
            return None
        maps = self.maps(state, spec)
        return maps if all(each.map.linear for each in maps.values()) else None

    def observed(self, grads: Grads) -> Grads:
        """Return what ``observe`` folds of gradients that are there already, name → (B, *shape)."""
        return grads if self.statistics is None else from_gradients(self.statistics(_spec(grads)), grads)

    def __call__(self, state: State, grads: Grads) -> Grads:
        """Return the result of gradients that are there already, name → (B, *shape)."""
        read = grads if self.maps is None else from_gradients(self.maps(state, _spec(grads)), grads)
        return self.apply(state, read)


def _spec(grads: Grads) -> Spec:
    return {name: Leaf(tuple(grad.shape[1:]), grad.dtype) for name, grad in grads.items()}
