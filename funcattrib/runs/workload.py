"""The computation of rows: documents through a chain, batch by batch, in the data set's order.

Every command that visits a corpus stands on this file: fit a chain's state, compute the rows of some documents, fill a
store's pending shards.
"""

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from funcattrib.chain import state_tree
from funcattrib.chain.chain import Chain
from funcattrib.chain.fitting import finite_rows, passes, rows_at
from funcattrib.chain.transform import State
from funcattrib.data import plan, some_rows
from funcattrib.data.corpus import Corpus
from funcattrib.errors import StoreError
from funcattrib.kernels.safe_norm import as_rows
from funcattrib.models.functional import device_of
from funcattrib.runs.blockwise_fit import by_owner, forget_parts
from funcattrib.runs.oom_retry import Pieces
from funcattrib.runtime.memory import trim
from funcattrib.runtime.progress import Progress
from funcattrib.runtime.world import World
from funcattrib.store import StoreWriter
from funcattrib.types import Batch, Loss, Params, PerExample
from funcattrib.weights.lockstep import Lockstep

log = logging.getLogger(__name__)

_TRIM_EVERY = 8  # batches: often enough to bound what is held, too seldom to be noticed in the time

Count = Callable[[int, int], None]
"""Called with the tokens and documents just finished."""


class Work(NamedTuple):
    """A computation: a loss, its parameters, the chain, the documents, the tokens of a batch; and its processes.

    ``budget`` is 0 until ``token_budget.with_budget`` has found it; ``pieces`` computes batches too large for memory.
    """

    loss: Loss
    params: Params
    chain: Chain
    corpus: Corpus
    budget: int
    quiet: bool
    pieces: Pieces
    world: World
    step: Lockstep

    def bind(self, state: State) -> Callable[[Batch], PerExample]:
        """Return the chain as a function of the batch; inside ``step``, ranks that share the model compute together."""
        return self.step.of(self.chain.bind(self.loss, self.params, state))

    def plan(self, lengths: np.ndarray) -> list[list[int]]:
        """Group documents of some lengths into batches."""
        return plan(lengths, self.budget, equal_lengths=getattr(self.loss, "equal_lengths", False))

    @property
    def device(self) -> torch.device:
        """Return the device of the parameters."""
        return device_of(self.chain.started().named(self.params))


def template(work: Work) -> State:
    """Return the chain's state before fitting: the shapes that a saved state must have."""
    return work.chain.init(work.chain.started().spec(work.params))[0]


def fit_state(work: Work, most: int, writer: StoreWriter) -> State:
    """Fit the chain's state on at most ``most`` documents spread evenly over the corpus (all where 0).

    It is saved after every pass, and an interrupted fit goes on with the pass that it was in. Of several processes each
    takes every n-th batch; when a pass is done their sums are added, and the result is mapped from the run's
    folder by all. Documents whose loss or gradient is not finite are left out and named.
    """
    world, start = work.world, template(work)
    if (saved := writer.load_state()) is not None:
        return state_tree.restore(start, saved)
    fitted = [at for at, stage in enumerate(work.chain.stages, 1) if stage.fitted]
    state, done = start, 0
    if (progressed := writer.load_progress()) is not None:
        kept, done = progressed
        if not 0 < done <= len(fitted):
            raise StoreError(f"the progress kept in {writer.path} is damaged: pass {done} of {len(fitted)}; delete it")
        reached = fitted[done - 1]
        state = (*state_tree.restore(start[:reached], kept), *start[reached:])
    lengths = work.corpus.lengths
    chosen = np.asarray(spread(len(lengths), most))
    tokens = int(lengths[chosen].sum())
    if done < len(fitted):
        forget_parts(writer, world)  # those of a run that was killed
        with progress(work, "fit", tokens * len(fitted), tokens * done) as bar:
            batches = Batches(work, chosen, bar.update)
            fold = partial(by_owner, writer)
            made = (work.chain.started(), work.chain.stages, work.loss, work.params, batches)
            for after in passes(*made, state, done, world, batches.pieces, work.step, fold):
                state, done = after, done + 1
                if done < len(fitted):
                    writer.save_progress(state_tree.flatten(state[: fitted[done - 1]]), done)
        lost = sorted(set[int]().union(*world.all_gather_object(sorted(batches.lost))))
        if lost and not work.quiet and world.is_rank_zero:
            log.warning("the fitted state leaves out documents whose gradient is NaN or infinite: %s", some_rows(lost))
    writer.save_state(state_tree.flatten(state))
    saved = writer.load_state()
    assert saved is not None, "it has just been saved"
    state = state_tree.restore(start, saved)
    forget_parts(writer, world)
    return state


def fill(work: Work, writer: StoreWriter, state: State, label: str = "build") -> None:
    """Compute and hand over every pending shard."""
    lengths = work.corpus.lengths
    bound = work.bind(state)
    compute = bound if work.quiet else warn_unused_leaves(bound)
    todo = sum(int(lengths[list(writer.shard_range(i))].sum()) for i in writer.pending)
    total = int(lengths.sum())
    with progress(work, label, total, total - todo) as bar:
        for shard in work.step.through(writer.claims()):
            span = writer.shard_range(shard)
            matrix, losses = rows_of(work, compute, span, bar.update)
            metadata = work.corpus.metadata(span)
            writer.put(shard, matrix, {**metadata, "loss": losses.numpy(), "tokens": lengths[list(span)]})
            if not work.world.is_rank_zero:  # whose progress line is for all
                log.info("%s: shard %d, rows %d to %d", label, shard, span.start, span.stop - 1)


def rows_of(
    work: Work, compute: Callable[[Batch], PerExample], rows: Sequence[int], count: Count
) -> tuple[Tensor, Tensor]:
    """Compute (matrix (rows, D) float32 on the CPU, losses (rows,)) of some documents, in their order.

    Where the loss is NaN or infinite, both are NaN.
    """
    matrix, losses = torch.zeros(0), torch.zeros(len(rows))
    lengths = work.corpus.lengths[list(rows)]
    for number, chosen in enumerate(work.plan(lengths)):
        if number % _TRIM_EVERY == 0:
            trim()
        documents = [rows[i] for i in chosen]
        batch = work.corpus.batch(documents, work.device)
        parts = [*work.pieces(lambda part: flat(compute(part)), batch, documents, work.device)]
        if not len(matrix):
            matrix = parts[0][0].new_empty(len(rows), parts[0][0].shape[1])
        matrix[chosen], losses[chosen] = (torch.cat(each) for each in zip(*parts, strict=True))
        count(int(lengths[chosen].sum()), len(chosen))
    lost = ~losses.isfinite()  # such a row says nothing, whatever its gradient looks like
    matrix[lost], losses[lost] = torch.nan, torch.nan
    return matrix, losses


def flat(result: PerExample) -> tuple[Tensor, Tensor]:
    """Join a batch's rows (B, D) and losses (B,), float32 on the CPU."""
    return torch.cat([as_rows(grad).float() for grad in result.grads.values()], 1).cpu(), result.losses.float().cpu()


def warn_unused_leaves(compute: Callable[[Batch], PerExample]) -> Callable[[Batch], PerExample]:
    """Return ``compute``, which logs once what has no gradient in the first batch with any: its columns are zero."""
    warned = False

    def watched(batch: Batch) -> PerExample:
        nonlocal warned
        result = compute(batch)
        if not warned:
            zero = [name for name, grad in result.grads.items() if not bool(grad.any())]
            warned = len(zero) < len(result.grads)
            if warned and zero:
                log.warning(
                    "%d of %d leaves have no gradient in the first batch (%s%s): the loss does not use them, or no "
                    "token reached them; their columns are zero",
                    *(len(zero), len(result.grads), ", ".join(zero[:3]), ", …" if zero[3:] else ""),
                )
        return result

    return watched


class Batches:
    """Batches of some documents by the token budget, counted as they are used; can be iterated again and again.

    Of several processes, each has its part of them.

    Attributes:
        lost: the documents that were left out, as their loss or gradient is not finite.
    """

    def __init__(self, work: Work, indices: np.ndarray, count: Count) -> None:
        self.work, self.indices, self.count = work, indices, count
        self.plan = work.plan(work.corpus.lengths[indices])[work.world.rank :: work.world.size]
        self.lost: set[int] = set()
        self._rows = indices[:0]  # of the batch in hand

    def __iter__(self) -> Iterator[Batch]:
        for chosen in self.plan:
            self._rows = self.indices[chosen]
            yield self.work.corpus.batch(self._rows.tolist(), self.work.device)
            self.count(int(self.work.corpus.lengths[self._rows].sum()), len(self._rows))

    def pieces(self, read: Callable[[Batch], PerExample], batch: Batch) -> Iterator[PerExample]:
        """Yield what is read of the current batch, in as many pieces as memory asks for, its finite examples alone."""
        start, documents = 0, self._rows.tolist()
        for part in self.work.pieces(read, batch, documents, self.work.device):
            finite = finite_rows(part)
            self.lost.update(documents[start + i] for i in (~finite).nonzero().flatten().tolist())
            start += len(finite)
            yield rows_at(part, finite)


def spread(count: int, most: int) -> list[int]:
    """Return at most ``most`` of ``count`` row numbers, evenly spaced (all where ``most`` is 0).

    Example:
        >>> spread(10, 4)
        [0, 2, 5, 7]
    """
    if not most or most >= count:
        return list(range(count))
    return [i * count // most for i in range(most)]


@contextmanager
def progress(work: Work, label: str, tokens: int, done: int = 0) -> Iterator[Progress]:
    """Show a line on stderr for all processes together, from rank 0, nothing where the work is quiet; all leave
    together.
    """
    silent = work.quiet or not work.world.is_rank_zero
    shared = work.world.counter() if work.world.size > 1 else None
    with Progress(tokens, label=label, done=done, stream=io.StringIO() if silent else None, shared=shared) as bar:
        yield bar
        work.world.barrier(lambda: bar.update(0))
        bar.update(0)  # what the others have done
