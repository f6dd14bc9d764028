"""A pass that ends in one small result: parts of the documents are folded into it, by one process or several.

    result = merge of (start, take(·, part) for every part)

Each process folds the parts that it claims and saves what it has; a run that is continued, by however many processes,
starts from what all of them had.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from funcattrib.runs.workload import Work, progress
from funcattrib.runtime.progress import Progress
from funcattrib.store import StoreWriter
from funcattrib.store.progress_files import load_parts, replace_parts, save_parts

_SAVE_EVERY = 30.0  # seconds of work that a kill may cost

Totals = Mapping[str, Tensor]


class Fold(NamedTuple):
    """The functions by which parts become a result.

    Attributes:
        start: of no part.
        take: a result, a span of documents and what counts them → the result with it.
        merge: several results, of other parts each, in one.
    """

    start: Totals
    take: Callable[[Totals, range, Progress], Totals]
    merge: Callable[[Sequence[Totals]], Totals]


def fold_parts(work: Work, writer: StoreWriter, step: int, fold: Fold, label: str) -> Totals:
    """Compute the result over all documents, ``step`` of them a part, the same on every process."""
    world, lengths = work.world, work.corpus.lengths
    spans = [range(start, min(start + step, len(lengths))) for start in range(0, len(lengths), step)]
    saved = load_parts(writer.path) if world.is_rank_zero else []
    result, done = fold.start, [part for _, parts in saved for part in parts]
    if saved:
        result = fold.merge([tensors for tensors, _ in saved])
        replace_parts(writer.path, result, done)
    todo = sorted(set(range(len(spans))) - set(world.broadcast_object(done)))
    mine, last = list(done), time.monotonic()
    tokens = sum(int(lengths[spans[part]].sum()) for part in todo)
    total = int(lengths.sum())
    kept = len(mine)
    with progress(work, label, total, total - tokens) as bar:
        try:
            for number in work.step.through(world.claims(len(todo))):
                result = fold.take(result, spans[todo[number]], bar)
                mine.append(todo[number])
                if time.monotonic() - last > _SAVE_EVERY:
                    save_parts(writer.path, world.rank, result, mine)
                    last, kept = time.monotonic(), len(mine)
        finally:
            if len(mine) > kept:
                save_parts(writer.path, world.rank, result, mine)
    return _merged(result, fold, work)


def _merged(result: Totals, fold: Fold, work: Work) -> Totals:
    """Merge the results of all processes, in the order of their ranks."""
    world = work.world
    if world.size == 1:
        return result
    parts = {name: world.all_gather(tensor) for name, tensor in result.items()}
    return fold.merge([{name: tensors[rank] for name, tensors in parts.items()} for rank in range(world.size)])
