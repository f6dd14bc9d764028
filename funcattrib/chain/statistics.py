"""Statistics of gradients, read leaf by leaf inside the backward pass.

What is not linear in the gradient (squares, a norm) has no probe whose gradient it is, but one tapped operation can
hand it over all the same. A weight that is used twice, or through an operation without a rule, has its gradient read
first.
"""

from collections.abc import Callable

from funcattrib.chain.per_example import Source
from funcattrib.lift import Readouts, extend
from funcattrib.types import Batch, Loss, Params, PerExample


def reader(
    source: Source, loss: Loss, params: Params, maps: Readouts, statistics: Readouts, batch: Batch
) -> Callable[[Batch], PerExample]:
    """Return each leaf's statistic as a function of the batch.

    Args:
        maps: the linear maps before, by parameter.
        statistics: leaf → the map of what comes out of them, linear or not.
        batch: any batch: its first example shows which weights are used once.
    """
    behind = extend(maps, statistics)
    inside = set() if behind is None else source.measurable(loss, params, maps, batch)
    joined = {name: behind[name] if behind and name in inside else how for name, how in maps.items()}
    finished = {leaf for name in inside for leaf in maps[name].leaves}
    rows = source.bind(loss, params, joined)

    def read(batch: Batch) -> PerExample:
        result = rows(batch)
        grads = {
            leaf: grad if leaf in finished else statistics[leaf].map.from_gradient(grad)
            for leaf, grad in result.grads.items()
        }
        return PerExample(grads, result.losses)

    return read
