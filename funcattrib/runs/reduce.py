"""A data set's gradient as one query row, for ``funcattrib reduce``.

    sum    Σ_b g_b          mean    Σ_b g_b / #documents          with unit norm, g_b / ‖g_b‖ in place of g_b

Summed in float64, a part of the documents at a time, in their order.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

import torch

from funcattrib.chain.chain import Chain
from funcattrib.chain.transform import State
from funcattrib.data.records import Records
from funcattrib.errors import FuncattribError
from funcattrib.kernels.safe_norm import divisors
from funcattrib.runs.config import GradientConfig
from funcattrib.runs.fold import Fold, Totals, fold_parts
from funcattrib.runs.prepare import Model, prepare, shard_rows, state_of
from funcattrib.runs.run_folder import run_folder
from funcattrib.runs.settings import GradientSettings, Source, resolve
from funcattrib.runs.token_budget import with_budget
from funcattrib.runs.workload import Work, rows_of
from funcattrib.runtime.progress import Progress
from funcattrib.store import GradientStore, StoreWriter, open_store
from funcattrib.types import Batch, PerExample

log = logging.getLogger(__name__)

Method = Literal["mean", "sum"]


def reduce_gradients(
    model: Model,
    data: Records,
    *,
    path: str | Path,
    method: Method = "mean",
    unit_norm: bool = False,
    chain: Chain | None = None,
    state: str | Path | None = None,
    source: Source | None = None,
    gradients: GradientConfig | None = None,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
    **settings: Unpack[GradientSettings],
) -> GradientStore:
    """Compute the mean or sum of every document's gradient, as a store of one row; continues a run that was
    interrupted.

    Documents whose gradient is NaN or infinite are left out and counted.

    Args:
        model, data, chain, state, source, gradients, overwrite, config, settings: as in ``collect_gradients``.
        path: the folder of the store, which ``score_gradients`` takes as queries.
        method: ``mean`` or ``sum``.
        unit_norm: scale each gradient to unit length, all leaves together, before it is added.

    Raises:
        FuncattribError: bad input of any kind; no document with a finite gradient.

    Example:
        >>> import tempfile
        >>> loss = lambda params, example: (params["w"] * example["x"]).sum() ** 2
        >>> data = [{"x": [1.0, 0.0]}, {"x": [0.0, 2.0]}]
        >>> with tempfile.TemporaryDirectory() as run:
        ...     reduce_gradients((loss, {"w": torch.ones(2)}), data, path=run, quiet=True).matrix()[:]
        array([[1., 4.]], dtype=float32)
    """
    source, gradients = resolve(source, gradients or GradientConfig(), settings)
    prepared = with_budget(prepare(model, data, source, gradients, chain, state), path, overwrite=overwrite)
    manifest = prepared.manifest
    step = gradients.rows_per_shard or shard_rows(manifest.width)
    reduced = {"reduced": method, "unit_normalize": unit_norm, "documents": manifest.rows, "part": step}
    manifest = replace(
        manifest,
        rows=1,
        rows_per_shard=1,
        dtype="float32",
        computed_with={**manifest.computed_with, **reduced},
        text_columns=(),
    )
    with run_folder(path, manifest, prepared.work.world, overwrite=overwrite, config=config) as writer:
        if writer.pending:
            fitted = state_of(prepared, writer, gradients.fit_documents)
            _reduce(prepared.work, writer, fitted, method, unit_norm, step)
    return open_store(path)


def _reduce(work: Work, writer: StoreWriter, state: State, method: Method, unit: bool, step: int) -> None:
    compute, lengths = work.bind(state), work.corpus.lengths
    start = {"sum": torch.zeros(writer.manifest.width, dtype=torch.float64), "facts": torch.zeros(2).double()}
    found = fold_parts(work, writer, step, Fold(start, partial(_add, work, compute, unit), _add_up), "reduce")
    count, loss = int(found["facts"][0]), float(found["facts"][1])
    if not count:
        raise FuncattribError("no document has a finite gradient; check the model's loss on them")
    if (lost := len(lengths) - count) and work.world.is_rank_zero:
        log.warning("%d of %d documents have gradients that are NaN or infinite; they are left out", lost, len(lengths))
    row = found["sum"] / count if method == "mean" else found["sum"]
    metadata: dict[str, Any] = {
        "id": [f"{method} of {count} documents"],
        "loss": [loss],
        "tokens": [int(lengths.sum())],
    }
    for shard in writer.claims():
        writer.put(shard, row[None].float(), metadata)


def _add(
    work: Work, compute: Callable[[Batch], PerExample], unit: bool, total: Totals, part: range, bar: Progress
) -> Totals:
    """Add a part of the documents to the sum; ``facts`` are the documents added, and the sum of their losses."""
    rows, losses = rows_of(work, compute, part, bar.update)
    finite = rows.isfinite().all(1)
    rows, losses = rows[finite].double(), losses[finite].double()
    if unit:
        rows = rows / divisors(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
    facts = torch.stack([torch.tensor(float(len(rows)), dtype=torch.float64), losses.sum()])
    return {"sum": total["sum"] + rows.sum(0), "facts": total["facts"] + facts}


def _add_up(totals: Sequence[Totals]) -> Totals:
    return {name: torch.stack([each[name] for each in totals]).sum(0) for name in ("sum", "facts")}
