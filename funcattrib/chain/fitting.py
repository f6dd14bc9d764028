"""Fitting a chain: a pass over the data for each fitted stage, everything before it frozen.

A stage's statistics are those of the gradients that reach it, so they need the states of the stages before it, and each
pass can be kept once it is made: ``passes`` gives the chain's state after every one, and goes on from any of them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from funcattrib.chain.lowering import bind
from funcattrib.chain.per_example import GradientSource
from funcattrib.chain.stages import init_all
from funcattrib.chain.state_tree import flatten, restore
from funcattrib.chain.transform import State, Transform
from funcattrib.errors import ChainError
from funcattrib.lift import Readouts
from funcattrib.runtime.signals import defer_sigterm
from funcattrib.runtime.world import SINGLE_PROCESS, World
from funcattrib.types import Batch, Grads, Loss, Params, PerExample, Spec
from funcattrib.weights.lockstep import Lockstep

SplitBatch: TypeAlias = Callable[[Callable[[Batch], PerExample], Batch], Iterable[PerExample]]
"""(read, batch) → what ``read`` makes of consecutive parts of the batch, its finite examples alone."""


def whole_batch(read: Callable[[Batch], PerExample], batch: Batch) -> Iterable[PerExample]:
    """Read the batch in one piece."""
    rows = read(batch)
    return (rows_at(rows, finite_rows(rows)),)


def finite_rows(rows: PerExample) -> Tensor:
    """Return which examples have a loss and a gradient without NaN or infinity, (B,) bool.

    Example:
        >>> grads, nan = {"w": torch.tensor([[1.0, torch.inf], [1.0, 2.0], [3.0, 4.0]])}, float("nan")
        >>> finite_rows(PerExample(grads, torch.tensor([1.0, nan, 1.0])))
        tensor([False, False,  True])
    """
    total = torch.zeros_like(rows.losses, dtype=torch.float32)
    each = [grad.unsqueeze(1).flatten(1) for grad in rows.grads.values()]
    for grad in each:  # a sum is read once and holds whatever is not finite
        total = total + grad.sum(1, dtype=torch.promote_types(grad.dtype, torch.float32)).to(total.device)
    finite = rows.losses.isfinite()
    if not bool(total.isfinite().all()):  # or it overflowed
        for grad in each:
            finite = finite & grad.isfinite().all(1).to(finite.device)
    return finite


def rows_at(rows: PerExample, which: Tensor) -> PerExample:
    """Return the chosen examples of a batch; the batch itself where they are all of it."""
    if bool(which.all()):
        return rows
    return PerExample({name: grad[which.to(grad.device)] for name, grad in rows.grads.items()}, rows.losses[which])


class FoldRows(Protocol):
    """A computation of a stage's state from the gradients that reach it."""

    def __call__(self, stage: Transform, spec: Spec, rows: Iterable[Grads], world: World) -> State:
        """Return the finalized state, the same on every process, from the rows that each of them has."""


def fit(
    source: GradientSource, stages: Sequence[Transform], loss: Loss, params: Params, batches: Iterable[Batch]
) -> tuple[State, ...]:
    """Return the stages' state after all their passes; see ``Chain.fit``."""
    state = init_all(stages, source.spec(params))[0]
    for after in passes(source, stages, loss, params, batches, state):
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
    source: GradientSource,
    stages: Sequence[Transform],
    loss: Loss,
    params: Params,
    batches: Iterable[Batch],
    state: tuple[State, ...] | None = None,
    done: int = 0,
    world: World = SINGLE_PROCESS,
    pieces: SplitBatch = whole_batch,
    step: Lockstep | None = None,
    fold: FoldRows = fit_all_reduced,
) -> Iterator[tuple[State, ...]]:
    """Yield the stages' state after each pass that is still to be made.

    Examples whose loss or gradient is NaN or infinite are passed over.

    Args:
        source: of the gradients that reach the first stage.
        batches: anything that can be iterated once a pass.
        state: the state after ``done`` passes, with which an interrupted fit goes on.
        world: processes that each have some of the batches.
        pieces: how a batch is read.
        step: of processes that hold the parameters together; None where each has all of them.
        fold: how a state is computed from the rows of all processes.

    Raises:
        ChainError: no batches although a stage must be fitted; a one-shot iterator and several fitted stages.
    """
    step = Lockstep() if step is None else step
    first, specs = init_all(stages, source.spec(params))
    state = first if state is None else state
    to_fit = [at for at, stage in enumerate(stages) if stage.fitted][done:]
    if len(to_fit) > 1 and isinstance(batches, Iterator):
        raise ChainError(
            f"fitting iterates over the batches {len(to_fit)} times, and they are a one-shot iterator; pass a list"
        )
    for at in to_fit:
        read = step.of(bind_observed(source, stages[: at + 1], loss, params, state[:at]))
        rows = step.through(_gradients(read, batches, pieces))
        fitted = fold(stages[at], specs[at], _some(stages[at], rows, world), world)
        state = (*state[:at], fitted, *state[at + 1 :])
        yield state


def bind_observed(
    source: GradientSource, stages: Sequence[Transform], loss: Loss, params: Params, state: tuple[State, ...]
) -> Callable[[Batch], PerExample]:
    """Return, as a function of the batch, what the last of ``stages`` observes; ``state`` is of those before it.

    Where everything before it is linear and a weight is used once, its statistic is read inside the backward pass.
    """
    *before, last = stages
    maps = None if last.statistics is None else partial(_statistics, last.statistics)
    observed = Transform(last.name, maps=maps)
    return bind(source, (*before, observed), loss, params, (*state, None))


def _statistics(statistics: Callable[[Spec], Readouts], state: None, spec: Spec) -> Readouts:
    return statistics(spec)


def _gradients(read: Callable[[Batch], PerExample], batches: Iterable[Batch], pieces: SplitBatch) -> Iterator[Grads]:
    """Read the batches, without examples that are not finite; SIGTERM waits until a batch is folded."""
    for batch in batches:
        for part in pieces(read, batch):
            if len(part.losses):
                with defer_sigterm():
                    yield part.grads


def _some(stage: Transform, rows: Iterator[Grads], world: World) -> Iterator[Grads]:
    """Yield the rows, of which there must be some."""
    seen = 0
    for grads in rows:
        seen += len(next(iter(grads.values())))
        yield grads
    if not sum(world.all_gather_object(seen)):
        raise ChainError(f"{stage.name} cannot be fitted: no example has a finite loss and gradient")
