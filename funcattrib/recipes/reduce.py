"""A data set's gradient as one query row: what ``funcattrib reduce`` does.

    sum    Σ_b g_b          mean    Σ_b g_b / #documents          with unit norm, g_b / ‖g_b‖ in place of g_b

Summed in float64, a part of the documents at a time, in their order.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from funcattrib.compose import Chain, State
from funcattrib.errors import FuncattribError
from funcattrib.recipes.collect import split_settings
from funcattrib.recipes.documents import Records
from funcattrib.recipes.explain import explained
from funcattrib.recipes.prepare import Model, prepare, shard_rows, state_of
from funcattrib.recipes.work import Work, progress, rows_of
from funcattrib.store import GradientStore, StoreWriter, create_store, open_store

log = logging.getLogger(__name__)

Method = Literal["mean", "sum"]

_SAVE_EVERY = 30.0  # seconds of work that an interruption may cost


def reduce_gradients(
    model: Model,
    data: Records | str,
    *,
    path: str | Path,
    method: Method = "mean",
    unit_normalize: bool = False,
    chain: Chain | None = None,
    state: str | Path | None = None,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
    **settings: Any,
) -> GradientStore:
    """The mean or sum of every document's gradient, as a store of one row; continues a run that was interrupted.

    Documents whose gradient is NaN or infinite are left out and counted.

    Args:
        model, data, chain, state, settings: as in ``collect_gradients``.
        path: the folder of the store, which ``score_gradients`` takes as queries.
        unit_normalize: scale each gradient to unit length, all leaves together, before it is added.

    Raises:
        FuncattribError: bad input of any kind; no document with a finite gradient.
    """
    source, gradients = split_settings(data, settings)
    prepared = prepare(model, source, gradients, chain, state)
    manifest = prepared.manifest
    step = gradients.rows_per_shard or shard_rows(manifest.width)
    how = {"reduced": method, "unit_normalize": unit_normalize, "documents": manifest.rows, "part": step}
    manifest = replace(
        manifest, rows=1, rows_per_shard=1, dtype="float32", computed_with={**manifest.computed_with, **how}
    )
    with create_store(path, manifest, overwrite=overwrite) as writer:
        if config is not None:
            writer.save_config(config)
        if writer.pending:
            with explained():
                fitted = state_of(prepared, writer, gradients.fit_documents)
                _reduce(prepared.work, writer, fitted, method, unit_normalize, step)
        writer.finish()
    return open_store(path)


def _reduce(work: Work, writer: StoreWriter, state: State, method: Method, unit: bool, step: int) -> None:
    compute, lengths = work.chain.bind(work.loss, work.params, state), work.corpus.lengths
    kept = writer.load_progress()
    total = torch.zeros(writer.manifest.width, dtype=torch.float64) if kept is None else kept[0]["sum"]
    facts = torch.zeros(2, dtype=torch.float64) if kept is None else kept[0]["facts"]  # documents, their losses
    done = 0 if kept is None else kept[1]
    saved = time.monotonic()
    with progress(work, "reduce", int(lengths.sum()), int(lengths[: done * step].sum())) as bar:
        for part in range(done, -(-len(lengths) // step)):
            rows, losses = rows_of(work, compute, range(part * step, min((part + 1) * step, len(lengths))), bar.update)
            finite = rows.isfinite().all(1)
            rows, losses = rows[finite].double(), losses[finite].double()
            if unit:
                norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
                rows = rows / norms.where(norms > 0, 1.0)
            total += rows.sum(0)
            facts += torch.stack([torch.tensor(float(len(rows)), dtype=torch.float64), losses.sum()])
            if time.monotonic() - saved > _SAVE_EVERY:
                writer.save_progress({"sum": total, "facts": facts}, part + 1)
                saved = time.monotonic()
    count = int(facts[0])
    if not count:
        raise FuncattribError("expected documents with finite gradients, found none; check the model's loss on them")
    if lost := len(lengths) - count:
        log.warning("%d of %d documents have gradients that are NaN or infinite and are left out", lost, len(lengths))
    row = total / count if method == "mean" else total
    told: dict[str, Any] = {
        "id": [f"{method} of {count} documents"],
        "loss": [float(facts[1])],
        "tokens": [int(lengths.sum())],
    }
    writer.put(0, row[None].float(), told)
