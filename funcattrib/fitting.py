"""Fitting a chain: a pass over the data for each fitted stage, everything before it frozen.

A stage's statistics are those of the gradients that reach it, so they need the states of the stages before it, and each
pass can be kept once it is made: ``passes`` gives the chain's state after every one, and goes on from any of them.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from funcattrib.condensed import reader
from funcattrib.errors import ChainError
from funcattrib.functional import Loss, Params
from funcattrib.lift import Measured, TwoSided, own
from funcattrib.per_example import Batch, Grads

if TYPE_CHECKING:
    from funcattrib.compose import Chain, Transform

State = Any


def fit(chain: "Chain", loss: Loss, params: Params, batches: Iterable[Batch]) -> tuple[State, ...]:
    """The chain's state after all its passes; see ``Chain.fit``."""
    state = chain.init(chain.started().spec(params))[0]
    for after in passes(chain, loss, params, batches, state):
        state = after
    return state


def passes(
    chain: "Chain",
    loss: Loss,
    params: Params,
    batches: Iterable[Batch],
    state: tuple[State, ...] | None = None,
    done: int = 0,
) -> Iterator[tuple[State, ...]]:
    """The chain's state after each pass that is still to be made.

    Args:
        batches: anything that can be iterated once a pass.
        state: the state after ``done`` passes, with which an interrupted fit goes on.

    Raises:
        ChainError: no batches although a stage must be fitted; a one-shot iterator and several fitted stages.
    """
    source = chain.started()
    state = chain.init(source.spec(params))[0] if state is None else state
    to_fit = [at for at, stage in enumerate(chain.stages) if stage.fitted][done:]
    if len(to_fit) > 1 and isinstance(batches, Iterator):
        raise ChainError(
            f"expected batches that can be iterated {len(to_fit)} times, found a one-shot iterator; pass a list"
        )
    for at in to_fit:
        stage = chain.stages[at]
        before = chain._replace(stages=chain.stages[:at])
        own_state, seen = state[at], 0
        read: Callable[[Batch], Grads] | None = None
        for batch in batches:
            read = read or statistics(before, stage, loss, params, state[:at], batch)
            own_state = stage.observe(own_state, read(batch))
            seen += 1
        if not seen:
            raise ChainError(f"expected batches to fit {stage.name} on, found none")
        state = (*state[:at], stage.finalize(own_state), *state[at + 1 :])
        yield state


def statistics(
    before: "Chain", stage: "Transform", loss: Loss, params: Params, state: tuple[State, ...], batch: Batch
) -> Callable[[Batch], Grads]:
    """What ``stage.observe`` folds, as a function of the batch: gradients after ``before``, or their measure.

    Where everything before the stage is linear and a weight is used once, its statistic is read inside the
    backward pass; for the other weights the gradients are read and measured afterwards.
    """
    if stage.measure is None:
        bound = before.bind(loss, params, state)
        return lambda batch: bound(batch).grads
    measure, (lowered, depth) = stage.measure, before.lowered(params, state)
    if depth < len(before.stages):
        bound = before.bind(loss, params, state)
        return lambda batch: {name: measure(name, grad) for name, grad in bound(batch).grads.items()}
    leaves = [leaf for how in lowered.values() for leaf in how.leaves]
    measured = {leaf: own(leaf, Measured(TwoSided(), partial(measure, leaf))) for leaf in leaves}
    read = reader(before.started(), loss, params, lowered, measured, batch)
    return lambda batch: read(batch).grads
