"""Stages lowered into the source of their gradients: done in the backward pass as far as can be.

linear maps        the longest prefix of stages that are nothing else: one map per parameter
the next's maps    a statistic, leaf by leaf: where one operation can hand it over, else of the gradients read
the rest           applied to what is read
"""

from collections.abc import Callable, Sequence
from functools import partial

from funcattrib.chain.per_example import GradientSource, spec
from funcattrib.chain.stages import apply_all, init_all, ready
from funcattrib.chain.statistics import reader
from funcattrib.chain.transform import State, Transform
from funcattrib.errors import ChainError
from funcattrib.lift import Readouts, TwoSided, extend, readout
from funcattrib.models.functional import device_of
from funcattrib.types import Batch, Loss, Params, PerExample, Spec


def bind(
    source: GradientSource,
    stages: Sequence[Transform],
    loss: Loss,
    params: Params,
    state: tuple[State, ...] | None = None,
) -> Callable[[Batch], PerExample]:
    """Return the stages after a source as a function of the batch alone, lowered once.

    Raises:
        ChainError: no state for stages that must be fitted, or other stages'.
    """
    named = source.named(params)
    state = ready(stages, spec(named), device_of(named), state)
    maps, depth = lower(stages, spec(named), state)
    rest, remaining = tuple(stages[depth:]), state[depth:]
    if not rest or rest[0].maps is None:
        return partial(_rows, source.bind(loss, params, maps), rest, remaining)
    arriving = init_all(stages[:depth], spec(named))[1][-1]
    read = reader(source, loss, params, maps, rest[0].maps(remaining[0], arriving))
    return partial(_rows, read, (rest[0]._replace(maps=None), *rest[1:]), remaining)


def lower(stages: Sequence[Transform], spec: Spec, state: tuple[State, ...]) -> tuple[Readouts, int]:
    """Return the longest linear prefix as one map per parameter (the identity without one), and its stages' number.

    Raises:
        ChainError: a state of other leaves.
    """
    maps: Readouts = {name: readout(name, TwoSided()) for name in spec}
    depth = 0
    for stage, its_state, given in zip(stages, state, init_all(stages, spec)[1], strict=False):
        further = _linear(stage, its_state, given)
        extended = None if further is None else extend(maps, further)
        if extended is None:
            break
        maps, depth = extended, depth + 1
    return {name: how._replace(map=how.map.to(spec[name].dtype)) for name, how in maps.items()}, depth


def nonlinear(stages: Sequence[Transform], spec: Spec) -> list[str]:
    """Return the names of the stages that are more than one linear map per leaf."""
    states, specs = init_all(stages, spec)
    return [
        stage.name
        for stage, its_state, given in zip(stages, states, specs, strict=False)
        if stage.linear_maps(its_state, given) is None
    ]


def _linear(stage: Transform, state: State, spec: Spec) -> Readouts | None:
    try:
        return stage.linear_maps(state, spec)
    except KeyError as error:  # states are dicts by parameter
        name = error.args[0] if error.args[0] in spec else "one of them"
        raise ChainError(
            f"the state of {stage.name} has no entry for {name}, one of {len(spec)} leaves; fit it on these leaves"
        ) from error


def _rows(
    read: Callable[[Batch], PerExample], rest: Sequence[Transform], state: tuple[State, ...], batch: Batch
) -> PerExample:
    result = read(batch)
    return PerExample(apply_all(rest, state, result.grads), result.losses)
