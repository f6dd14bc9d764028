"""A stage's gradient maps, read inside the backward pass where they can be.

    linear        the gradient of a probe, whatever uses the weight: always
    a statistic   of a weight that one tapped operation alone uses, which can hand it over: a square, a norm

A weight that is used twice, or through an operation without a rule, has its gradient read first and its statistic taken
afterwards.
"""

from collections.abc import Callable

from funcattrib.chain.per_example import GradientSource
from funcattrib.lift import Readouts, extend, from_gradients
from funcattrib.types import Batch, Loss, Params, PerExample

Read = Callable[[Batch], PerExample]


def reader(source: GradientSource, loss: Loss, params: Params, maps: Readouts, following: Readouts) -> Read:
    """Return, as a function of the batch, what ``following`` reads of what comes out of ``maps``.

    Args:
        maps: the linear maps before, by parameter.
        following: leaf → the map of what comes out of them, linear or not. Leaves without one are dropped.
    """
    begun: list[Read] = []

    def read(batch: Batch) -> PerExample:
        if not begun:  # any batch shows which weights are used once
            begun.append(_begin(source, loss, params, maps, following, batch))
        return begun[0](batch)

    return read


def _begin(
    source: GradientSource, loss: Loss, params: Params, maps: Readouts, following: Readouts, batch: Batch
) -> Read:
    both = extend(maps, following)
    kept = maps if both is None else {name: maps[name] for name in both}
    both = both or {}
    linear = {name for name, how in both.items() if how.map.linear}
    inside = linear | source.measurable(loss, params, both.keys() - linear, batch)
    finished = {leaf for name in inside for leaf in both[name].leaves}
    outside = {name: how for name, how in kept.items() if name not in inside}
    later = {leaf: following[leaf] for how in outside.values() for leaf in how.leaves if leaf in following}
    rows = source.bind(loss, params, {name: both[name] if name in inside else how for name, how in kept.items()})

    def read(batch: Batch) -> PerExample:
        grads, losses = rows(batch)
        found = {leaf: grads[leaf] for leaf in finished}
        for leaf, value in from_gradients(later, grads).items():
            found[leaf] = found[leaf] + value if leaf in found else value
        return PerExample({leaf: found[leaf] for how in following.values() for leaf in how.leaves}, losses)

    return read
