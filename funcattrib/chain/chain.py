"""Chains: a source of per-example gradients followed by transforms.

``compose(per_example_grad, project(16), adafactor_norm)`` is a chain. Its longest linear prefix is lowered into one
linear map per parameter and read off the backward pass; the remaining stages are applied to the result. The
plain form (every stage on the full gradients) is kept and must agree to rounding.

A transform sees what precedes it: its ``init`` receives the spec that the previous stage announces, and its
statistics are fitted on the gradients that reach it, everything before it frozen.
"""

import reprlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from funcattrib.chain.fitting import fit
from funcattrib.chain.lowering import bind
from funcattrib.chain.per_example import GradientSource, per_example_grad, spec
from funcattrib.chain.stages import apply_all, init_all, ready
from funcattrib.chain.transform import State, Transform
from funcattrib.errors import ChainError
from funcattrib.models.functional import device_of
from funcattrib.types import Batch, Grads, Loss, Params, PerExample, Spec


class Chain(NamedTuple):
    """A source and its transforms; without a source, a chain of transforms to compose further.

    Attributes:
        source: where the gradients come from; None of a chain to compose further.
        stages: the transforms, in order.

    Example:
        >>> import torch
        >>> from funcattrib.chain.per_example import per_example_grad
        >>> from funcattrib.transforms import adafactor_norm
        >>> loss = lambda params, example: (params["w"] @ example["x"]).square().sum()
        >>> params = {"w": torch.ones(2, 3)}
        >>> batch = {"x": torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 0.0]])}
        >>> chain = compose(per_example_grad, adafactor_norm)
        >>> state = chain.fit(loss, params, [batch])
        >>> chain(loss, params, batch, state)["w"].shape
        torch.Size([2, 2, 3])
        >>> chain.describe()
        [{'name': 'adafactor_norm', 'eps': 1e-30}]
    """

    source: GradientSource | None
    stages: tuple[Transform, ...]

    def __repr__(self) -> str:
        source = self.source
        first = [] if source is None else ["per_example_grad" if source is per_example_grad else source.name]
        return f"Chain({' → '.join([*first, *map(_in_words, self.stages)])})"

    def init(self, spec: Spec) -> tuple[tuple[State, ...], Spec]:
        """Return states before fitting, and the spec of the result."""
        states, specs = init_all(self.stages, spec)
        return states, specs[-1]

    def fit(self, loss: Loss, params: Params, batches: Iterable[Batch] = ()) -> tuple[State, ...]:
        """Make one pass over ``batches`` for each fitted stage, upstream stages frozen; return the chain's state.

        Args:
            batches: anything that can be iterated once per fitted stage (a list, a data loader).

        Raises:
            ChainError: no batches although a stage must be fitted; a one-shot iterator and several fitted stages.
        """
        return fit(self.started(), self.stages, loss, params, batches)

    def bind(self, loss: Loss, params: Params, state: tuple[State, ...] | None = None) -> Callable[[Batch], PerExample]:
        """Return the chain as a function of the batch alone, lowered once."""
        return bind(self.started(), self.stages, loss, params, state)

    def __call__(self, loss: Loss, params: Params, batch: Batch, state: tuple[State, ...] | None = None) -> Grads:
        """Compute transformed per-example gradients, name → (B, *shape)."""
        return self.bind(loss, params, state)(batch).grads

    def plain(self, loss: Loss, params: Params, batch: Batch, state: tuple[State, ...] | None = None) -> Grads:
        """Compute the same without lowering: full gradients, then every stage on them. Slow; the tests' oracle."""
        source = self.started()
        named = source.named(params)
        state = self.ready(spec(named), device_of(named), state)
        return self.apply(state, source(loss, params, batch))

    def apply(self, state: tuple[State, ...], grads: Grads) -> Grads:
        """Apply every stage in order, to gradients that are already there."""
        return apply_all(self.stages, state, grads)

    def describe(self) -> list[dict[str, Any]]:
        """Return name and settings of every stage, as the manifest keeps them."""
        return [stage.describe() for stage in self.stages]

    def identity(self) -> list[dict[str, Any]]:
        """Return the manifest's entry of every stage: its description, and a hash of code that is a user's."""
        return [stage.identity() for stage in self.stages]

    def started(self) -> GradientSource:
        """Return the source.

        Raises:
            ChainError: a chain of transforms alone.
        """
        if self.source is None:
            raise ChainError(
                "this chain has transforms and no source of gradients; begin it with one: compose(per_example_grad, …)"
            )
        return self.source

    def ready(self, spec: Spec, device: torch.device, state: tuple[State, ...] | None = None) -> tuple[State, ...]:
        """Return ``state``, or the one that needs no fitting, on a device; what is in parts stays where it is.

        Raises:
            ChainError: no state for a chain that must be fitted, or another chain's.
        """
        return ready(self.stages, spec, device, state)


Stage = Transform | Chain | GradientSource | Callable[..., Any]


def compose(*stages: Stage) -> Chain:
    """Chain stages left to right; nested chains flatten, so composition is associative.

    A stage that can only stand before some others (``split_heads`` before ``project``) is moved before the first of
    them, with those between in their order.

    Args:
        stages: optionally a source first (``per_example_grad``), then transforms, or factories of transforms
            (``adafactor_norm``), which are called with their defaults.

    Raises:
        ChainError: a source that is not first; something that is no stage.

    Example:
        >>> from funcattrib.chain.per_example import per_example_grad
        >>> from funcattrib.transforms import project, unit_norm
        >>> [stage.name for stage in compose(per_example_grad, compose(project(4), unit_norm)).stages]
        ['project', 'unit_norm']
    """
    source: GradientSource | None = None
    transforms: list[Transform] = []
    for number, stage in enumerate(stages, 1):
        resolved = _resolve(stage, number)
        if isinstance(resolved, GradientSource) or (isinstance(resolved, Chain) and resolved.source is not None):
            if number > 1:
                raise ChainError(
                    f"a source of gradients must be the first stage, and this one is stage {number} of compose"
                )
            source = resolved if isinstance(resolved, GradientSource) else resolved.source
        if isinstance(resolved, Chain):
            transforms.extend(resolved.stages)
        elif isinstance(resolved, Transform):
            transforms.append(resolved)
    return Chain(source, _in_order(transforms))


def _in_order(transforms: Iterable[Transform]) -> tuple[Transform, ...]:
    """Move every stage that can only precede others before the first of those."""
    ordered: list[Transform] = []
    for stage in transforms:
        at = next((i for i, earlier in enumerate(ordered) if earlier.name in stage.precedes), len(ordered))
        ordered.insert(at, stage)
    return tuple(ordered)


def _in_words(stage: Transform) -> str:
    settings = {name: value for name, value in stage.describe().items() if name != "name"}
    return f"{stage.name}({', '.join(f'{name}={reprlib.repr(value)}' for name, value in settings.items())})"


def _resolve(stage: Any, number: int) -> Transform | Chain | GradientSource:
    if not isinstance(stage, (Transform, Chain, GradientSource)) and callable(stage):
        stage = stage()
    if not isinstance(stage, (Transform, Chain, GradientSource)):
        raise ChainError(f"expected a transform, a chain or a source as stage {number}, found {type(stage).__name__}")
    return stage
