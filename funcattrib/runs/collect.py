"""Collection of a data set's per-example gradients into a store, for ``funcattrib build`` and ``funcattrib fit``.

documents → batches by length → chain (one backward pass a batch) → rows in the data set's order → shards
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
from torch import nn

from funcattrib.chain.chain import Chain
from funcattrib.data.records import Records
from funcattrib.losses.script import in_script
from funcattrib.runs.config import GradientConfig
from funcattrib.runs.prepare import Inputs, Model, prepare, read_inputs, shard_rows, state_of
from funcattrib.runs.processor import Processor, with_processor
from funcattrib.runs.run_folder import run_folder
from funcattrib.runs.settings import GradientSettings, Source, resolve
from funcattrib.runs.token_budget import with_budget
from funcattrib.runs.token_rows import MOST_ROWS, as_tokens, by_token, fill_tokens
from funcattrib.runs.workload import fill, fit_state
from funcattrib.store import GradientStore, open_store
from funcattrib.store.nonfinite import named_rows, nonfinite_rows
from funcattrib.types import Loss, Params

log = logging.getLogger(__name__)


def collect_gradients(
    model: Model,
    data: Records | Inputs,
    *,
    path: str | Path,
    chain: Chain | None = None,
    state: str | Path | None = None,
    processor: Processor | None = None,
    granularity: Literal["example", "token"] = "example",
    source: Source | None = None,
    gradients: GradientConfig | None = None,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
    **settings: Unpack[GradientSettings],
) -> GradientStore:
    """Compute the gradient of every document and store it; continues a run that was interrupted.

    Args:
        model: a causal language model, its hub id or folder, or ``(loss, params)``: any ``loss(params, example) ->
            scalar`` with the parameters to attribute. For the latter, ``data`` holds its examples as numbers.
        data: a data set, a list of records, or whatever ``--dataset`` takes.
        path: the folder of the store.
        chain: transforms in place of normalizer and projection.
        state: a folder with a fitted state (``fit_chain``, or an earlier store); fitted here when not given.
        processor: either of the two by its type: a tokenizer, or a fitted state as an open store or its folder.
        granularity: ``token`` makes a row of every token; a document's rows add up to its gradient.
        source, gradients: settings passed whole: which documents are read, and what is computed.
        overwrite: start over where the folder holds another run.
        config: saved as ``config.yaml``.
        settings: fields of ``Source`` (tokenizer, columns, split, truncation, max_length, loading, quiet, …) and of
            ``GradientConfig`` (projection_dim, normalizer, loss, modules, token_batch_size, dtype, …) by name. ``loss``
            may be a function, ``reference_model`` a model or its name.

    Returns:
        The open store: one row a document, in the data set's order.

    Raises:
        FuncattribError: bad input of any kind; what is finished is kept.

    Example:
        >>> import tempfile, torch
        >>> loss = lambda params, example: (params["w"] * example["x"]).sum() ** 2
        >>> with tempfile.TemporaryDirectory() as run:
        ...     store = collect_gradients((loss, {"w": torch.ones(3)}), [{"x": [1.0, 2.0, 3.0]}], path=run, quiet=True)
        ...     store.gradients("w")
        tensor([[12., 24., 36.]])
    """
    source, gradients = resolve(source, gradients or GradientConfig(), settings)
    source, state = with_processor(processor, source, state)
    prepared = prepare(model, data, source, gradients, chain, state)
    if in_script(prepared.manifest.loss["kind"]) and not source.quiet and prepared.work.world.is_rank_zero:
        log.warning(
            "the loss `%s` is defined in a script (__main__), where `funcattrib query` cannot find it; "
            "move it to a module, or ask from Python with Attributor, in this script",
            prepared.manifest.loss["kind"].partition(":")[2],
        )
    tried, filled = prepared.work, fill
    if granularity == "token":
        rows = gradients.rows_per_shard or shard_rows(prepared.manifest.width, MOST_ROWS)
        prepared = prepared._replace(manifest=by_token(prepared.manifest, prepared.work, rows))
        tried, filled = as_tokens(prepared.work), fill_tokens
    prepared = with_budget(prepared, path, overwrite=overwrite, tried=tried)
    with run_folder(path, prepared.manifest, prepared.work.world, overwrite=overwrite, config=config) as writer:
        if writer.pending:
            filled(prepared.work, writer, state_of(prepared, writer, gradients.fit_documents))
    store = open_store(path)
    if not source.quiet and prepared.work.world.is_rank_zero:
        _warn(store)
    return store


def collect_both(
    model: nn.Module | tuple[Loss, Params],
    data: Records | Inputs,
    query_data: Records,
    *,
    path: Path,
    chain: Chain,
    sources: tuple[Source, Source],
    gradients: GradientConfig,
    overwrite: bool,
) -> tuple[GradientStore, GradientStore]:
    """Store the gradients of documents and of queries, in ``train`` and ``query``, with one chain and one state.

    Args:
        sources: of the documents and of the queries.

    Raises:
        FuncattribError: as ``collect_gradients``, whose other arguments these are.
    """
    collect = partial(collect_gradients, model, chain=chain, gradients=gradients, overwrite=overwrite)
    if not isinstance(data, Inputs):
        data = read_inputs(model, data, sources[0], gradients)
    queries = read_inputs(model, query_data, sources[1], gradients)  # both, before anything is computed
    train = collect(data, path=path / "train", source=sources[0])
    return train, collect(queries, path=path / "query", source=sources[1], state=train.path)


def fit_chain(
    model: Model,
    data: Records | Inputs,
    *,
    path: str | Path,
    chain: Chain | None = None,
    source: Source | None = None,
    gradients: GradientConfig | None = None,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
    **settings: Unpack[GradientSettings],
) -> GradientStore:
    """Fit a chain's state on a data set and keep it at ``path``: a store with a state and no rows.

    The state is kept after every pass over the data; the same call goes on with the pass that was interrupted.

    Arguments and errors are those of ``collect_gradients``, whose ``state`` takes the folder.

    Returns:
        The open store; its ``state()`` is the chain's.

    Raises:
        FuncattribError: bad input of any kind; what is finished is kept.

    Example:
        >>> import tempfile, torch
        >>> loss = lambda params, example: (params["w"] @ example["x"]).sum() ** 2
        >>> model, data = (loss, {"w": torch.ones(2, 3)}), [{"x": [1.0, 2.0, 3.0]}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fitted = fit_chain(model, data, path=f"{folder}/fit", normalizer="adafactor", quiet=True)
        ...     built = collect_gradients(
        ...         model, data, path=f"{folder}/run", normalizer="adafactor", state=fitted.path, quiet=True
        ...     )
        ...     len(fitted), len(built)
        (0, 1)
    """
    source, gradients = resolve(source, gradients or GradientConfig(), settings)
    prepared = with_budget(prepare(model, data, source, gradients, chain, None), path, overwrite=overwrite)
    manifest = replace(prepared.manifest, kind="state", rows=0)
    with run_folder(path, manifest, prepared.work.world, overwrite=overwrite, config=config) as writer:
        if not writer.manifest.complete:
            fit_state(prepared.work, gradients.fit_documents, writer)
    return open_store(path)


def _warn(store: GradientStore) -> None:
    lost = np.flatnonzero(np.isnan(np.asarray(store.examples["loss"][:], dtype=float)))
    if len(lost):
        log.warning(
            "the loss is NaN or infinite in %s; their rows are stored as NaN and come last in a search",
            named_rows(store, lost),
        )
    counted = store.manifest
    if counted.clipped:
        log.warning("%d entries were outside the range of %s and were clipped", counted.clipped, counted.dtype)
    if counted.nonfinite > len(lost) * store.width:
        log.warning(
            "the gradient is NaN or infinite in %s; they come last in a search",
            named_rows(store, np.setdiff1d(nonfinite_rows(store), lost)),
        )
