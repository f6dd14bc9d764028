"""One pass over documents that keeps the best rows of each query alone."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from funcattrib.runs.fold import Fold, Totals, fold_parts
from funcattrib.runs.workload import Work, rows_of
from funcattrib.runtime.progress import Progress
from funcattrib.scores.top_k import Best, best_of, keep_best, nothing, save_best
from funcattrib.store import StoreWriter
from funcattrib.types import Batch, PerExample

log = logging.getLogger(__name__)


def fill_best(work: Work, writer: StoreWriter, state: Any, top_k: int, groups: Tensor | None) -> None:
    """Make one pass that keeps the best alone, of a group of rows one; what it has so far is saved now and then."""
    compute = work.bind(state)
    start = {**nothing(len(writer.manifest.extra["queries"]))._asdict(), "lost": torch.zeros(1, dtype=torch.int64)}
    folded = Fold(start, partial(_take_best, work, compute, top_k, groups), partial(_merge_best, top_k, groups))
    found = fold_parts(work, writer, int(writer.manifest.computed_with["shard"]), folded, "score")
    if int(found["lost"]) and not work.quiet and work.world.is_rank_zero:
        log.warning("%d rows have scores that are NaN or infinite and are left out", int(found["lost"]))
    if groups is not None and not work.quiet and work.world.is_rank_zero:
        log.info("%d rows are left out because they have the text of one that is kept", _copies(found["rows"], groups))

    def metadata(row: int) -> dict[str, Any]:
        return {name: values[0] for name, values in work.corpus.metadata(range(row, row + 1)).items()}

    if writer.role.holds_lock:
        save_best(writer.path, Best(found["values"], found["rows"]), metadata)


def _copies(rows: Tensor, groups: Tensor) -> int:
    """Count the rows that are not kept and have the text of one that is."""
    kept = rows[rows >= 0].unique()
    return int(torch.isin(groups, groups[kept]).sum()) - len(kept)


def _take_best(
    work: Work,
    compute: Callable[[Batch], PerExample],
    count: int,
    groups: Tensor | None,
    best: Totals,
    part: range,
    bar: Progress,
) -> Totals:
    matrix, _ = rows_of(work, compute, part, bar.update)
    kept = keep_best(Best(best["values"], best["rows"]), matrix, part.start, count, groups)
    return {**kept._asdict(), "lost": best["lost"] + (~matrix.isfinite()).any(1).sum()}


def _merge_best(count: int, groups: Tensor | None, parts: Sequence[Totals]) -> Totals:
    kept = best_of([Best(part["values"], part["rows"]) for part in parts], count, groups)
    return {**kept._asdict(), "lost": torch.stack([part["lost"] for part in parts]).sum(0)}
