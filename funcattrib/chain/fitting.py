"""Fitting a chain: a pass over the data for each fitted stage, everything before it frozen.

A stage's statistics are those of the gradients that reach it, so they need the states of the stages before it, and each
pass can be kept once it is made: ``passes`` gives the chain's state after every one, and goes on from any of them.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Protocol, TypeAlias

from torch import Tensor

from funcattrib.chain.per_example import Source
from funcattrib.chain.state_tree import flatten, restore
from funcattrib.chain.statistics import reader
from funcattrib.chain.transform import State, Transform
from funcattrib.errors import ChainError
from funcattrib.lift import Measured, Readouts, TwoSided, readout
from funcattrib.runtime.signals import defer_sigterm
from funcattrib.runtime.world import SINGLE_PROCESS, World
from funcattrib.types import Batch, Grads, Loss, Params, PerExample, Spec
from funcattrib.weights.lockstep import Lockstep

Pieces: TypeAlias = Callable[[Callable[[Batch], PerExample], Batch], Iterable[PerExample]]
"""(read, batch) → what ``read`` makes of consecutive parts of the batch."""


def whole(read: Callable[[Batch], PerExample], batch: Batch) -> Iterable[PerExample]:
    """Read the batch in one piece."""
    return (read(batch),)


class Fold(Protocol):
    """A computation of a stage's state from the gradients that reach it."""

    def __call__(self, stage: Transform, spec: Spec, rows: Iterable[Grads], world: World) -> State:
        """Return the finalized state, the same on every process, from the rows that each of them has."""


class Fittable(Protocol):
    """The parts of a chain that fitting uses: its stages, and the gradients before a stage."""

    @property
    def stages(self) -> tuple[Transform, ...]:
        """Return the transforms in order."""

    def started(self) -> Source:
        """Return the source of the gradients."""

    def init(self, spec: Spec) -> tuple[tuple[State, ...], Spec]:
        """Return states before fitting, and the spec of the result."""

    def before(self, at: int) -> "Fittable":
        """Return the chain up to a stage."""

    def lowered(self, params: Params, state: tuple[State, ...] | None = None) -> tuple[Readouts, int]:
        """Lower the longest linear prefix, and count the stages it covers."""

    def bind(self, loss: Loss, params: Params, state: tuple[State, ...] | None = None) -> Callable[[Batch], PerExample]:
        """Return the chain as a function of the batch."""


def fit(chain: Fittable, loss: Loss, params: Params, batches: Iterable[Batch]) -> tuple[State, ...]:
    """Return the chain's state after all its passes; see ``Chain.fit``."""
    state = chain.init(chain.started().spec(params))[0]
    for after in passes(chain, loss, params, batches, state):
        state = after
    return state


def fit_all_reduced(stage: Transform, spec: Spec, rows: Iterable[Grads], world: World) -> State:
    """Fold rows into a state on every process, add the states up, and finalize once for all."""
    state = stage.init(spec)[0]
    for grads in rows:
        state = stage.observe(state, grads)
    state = restore(state, world.all_reduce(flatten(state)))
    if world.size == 1:
        return stage.finalize(state)
    made = world.on_rank_zero(lambda: flatten(stage.finalize(state)))
    shared = world.broadcast(made)
    assert shared is not None, "rank 0 has made it"
    return restore(state, shared)


def passes(
    chain: Fittable,
    loss: Loss,
    params: Params,
    batches: Iterable[Batch],
    state: tuple[State, ...] | None = None,
    done: int = 0,
    world: World = SINGLE_PROCESS,
    pieces: Pieces = whole,
    step: Lockstep = Lockstep(),
    fold: Fold = fit_all_reduced,
) -> Iterator[tuple[State, ...]]:
    """Yield the chain's state after each pass that is still to be made.

    Examples whose loss is NaN or infinite are passed over.

    Args:
        batches: anything that can be iterated once a pass.
        state: the state after ``done`` passes, with which an interrupted fit goes on.
        world: processes that each have some of the batches.
        pieces: how a batch is read.
        step: of processes that hold the parameters together.
        fold: how a state is computed from the rows of all processes.

    Raises:
        ChainError: no batches although a stage must be fitted; a one-shot iterator and several fitted stages.
    """
    source = chain.started()
    state = chain.init(source.spec(params))[0] if state is None else state
    to_fit = [at for at, stage in enumerate(chain.stages) if stage.fitted][done:]
    if len(to_fit) > 1 and isinstance(batches, Iterator):
        raise ChainError(
            f"fitting iterates over the batches {len(to_fit)} times, and they are a one-shot iterator; pass a list"
        )
    for at in to_fit:
        stage, before = chain.stages[at], chain.before(at)
        read = step.of(_reading(partial(statistics, before, stage, loss, params, state[:at])))
        rows = step.through(_gradients(read, batches, pieces))
        arriving = before.init(source.spec(params))[1]
        own_state = fold(stage, arriving, _some(stage, rows, world), world)
        state = (*state[:at], own_state, *state[at + 1 :])
        yield state


def _gradients(read: Callable[[Batch], PerExample], batches: Iterable[Batch], pieces: Pieces) -> Iterator[Grads]:
    """Read the batches, without examples whose loss is not finite; SIGTERM waits until a batch is folded."""
    for batch in batches:
        for part in pieces(read, batch):
            counted = _finite(part)
            if len(counted.losses):
                with defer_sigterm():
                    yield counted.grads


def _some(stage: Transform, rows: Iterator[Grads], world: World) -> Iterator[Grads]:
    """Yield the rows, of which there must be some."""
    seen = 0
    for grads in rows:
        seen += len(next(iter(grads.values())))
        yield grads
    if not sum(world.all_gather_object(seen)):
        raise ChainError(f"{stage.name} cannot be fitted: no example has a finite loss")


def _reading(begin: Callable[[Batch], Callable[[Batch], PerExample]]) -> Callable[[Batch], PerExample]:
    """Return a function that learns of the first batch how to read that batch and all others."""
    made: list[Callable[[Batch], PerExample]] = []

    def read(batch: Batch) -> PerExample:
        if not made:
            made.append(begin(batch))
        return made[0](batch)

    return read


def statistics(
    before: Fittable, stage: Transform, loss: Loss, params: Params, state: tuple[State, ...], batch: Batch
) -> Callable[[Batch], PerExample]:
    """Return what ``stage.observe`` folds, as a function of the batch: gradients after ``before``, or their measure.

    Where everything before the stage is linear and a weight is used once, its statistic is read inside the
    backward pass; for the other weights the gradients are read and measured afterwards.
    """
    if stage.measure is None:
        return before.bind(loss, params, state)
    measure, (lowered, depth) = stage.measure, before.lowered(params, state)
    if depth < len(before.stages):
        bound = before.bind(loss, params, state)
        return lambda batch: _each(measure, bound(batch))
    leaves = [leaf for how in lowered.values() for leaf in how.leaves]
    measured = {leaf: readout(leaf, Measured(TwoSided(), partial(measure, leaf))) for leaf in leaves}
    return reader(before.started(), loss, params, lowered, measured, batch)


def _each(measure: Callable[[str, Tensor], Tensor], rows: PerExample) -> PerExample:
    return rows._replace(grads={name: measure(name, grad) for name, grad in rows.grads.items()})


def _finite(rows: PerExample) -> PerExample:
    """Return the rows whose loss is finite."""
    finite = rows.losses.isfinite()
    if bool(finite.all()):
        return rows
    return PerExample({name: grad[finite] for name, grad in rows.grads.items()}, rows.losses[finite])
