"""Stages one after the other: their first states, where those are, and what they make of gradients."""

from collections.abc import Sequence

import torch

from funcattrib.chain.state_tree import map_tensors
from funcattrib.chain.transform import State, Transform
from funcattrib.errors import ChainError
from funcattrib.types import Grads, Spec


def init_all(stages: Sequence[Transform], spec: Spec) -> tuple[tuple[State, ...], list[Spec]]:
    """Return every stage's state before fitting, and the spec before every stage and after the last.

    Raises:
        ChainError: a spec that does not fit a stage.
    """
    states, specs = [], [spec]
    for number, stage in enumerate(stages, 1):
        try:
            state, following = stage.init(specs[-1])
        except ChainError as error:
            raise ChainError(f"stage {number} ({stage.name}) {error}") from None
        states.append(state)
        specs.append(following)
    return tuple(states), specs


def ready(
    stages: Sequence[Transform], spec: Spec, device: torch.device, state: tuple[State, ...] | None = None
) -> tuple[State, ...]:
    """Return ``state``, or the one that needs no fitting, on a device; what is in parts stays where it is.

    Raises:
        ChainError: no state for stages that must be fitted, or other stages'.
    """
    if state is None:
        if unfitted := [stage.name for stage in stages if stage.fitted]:
            raise ChainError(f"{unfitted[0]} must be fitted before it is used; call fit(loss, params, batches) first")
        state = init_all(stages, spec)[0]
    if len(state) != len(stages):
        raise ChainError(
            f"expected a state of {len(stages)} stages, found {len(state)}; it was fitted for another chain"
        )
    return tuple(
        its_state if stage.parts else map_tensors(lambda tensor: tensor.to(device), its_state)
        for stage, its_state in zip(stages, state, strict=True)
    )


def apply_all(stages: Sequence[Transform], state: tuple[State, ...], grads: Grads) -> Grads:
    """Return what the stages make of gradients that are there already."""
    for stage, its_state in zip(stages, state, strict=True):
        grads = stage(its_state, grads)
    return grads
