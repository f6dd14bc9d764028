"""Scores of a data set against query gradients in one pass, for ``funcattrib score``. No gradient is stored.

documents → batches by length → chain → ⟨·, queries⟩, read in the backward pass → scores in the data set's order
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Unpack

from funcattrib.chain.chain import Chain, compose
from funcattrib.chain.transform import State, Transform
from funcattrib.data import Columns
from funcattrib.data.records import Records
from funcattrib.runs.best_rows import fill_best
from funcattrib.runs.collect import collect_gradients, fit_chain
from funcattrib.runs.config import GradientConfig, refuse
from funcattrib.runs.default_chain import chain_of
from funcattrib.runs.prepare import Model, Prepared, load_named, prepare, read_inputs, shard_rows, state_of, with_state
from funcattrib.runs.query_rows import as_leaves, query_rows
from funcattrib.runs.run_folder import run_folder
from funcattrib.runs.settings import GradientSettings, Source, resolve
from funcattrib.runs.text_groups import text_groups
from funcattrib.runs.token_budget import with_budget
from funcattrib.runs.token_rows import MOST_ROWS, as_tokens, by_token, fill_tokens
from funcattrib.runs.workload import Work, fill
from funcattrib.runtime.world import world
from funcattrib.scores import Scores, check_gradients, open_scores, scores_manifest
from funcattrib.store import GradientStore, StoreWriter, open_store, require_shared
from funcattrib.store.compatibility import check_kind, loss_differences
from funcattrib.store.create import PARTS, check_free
from funcattrib.store.nonfinite import named_rows, nonfinite_rows
from funcattrib.transforms import inner_products, max_score, self_influence

log = logging.getLogger(__name__)

How = Literal["individual", "mean", "nearest", "self"]
Granularity = Literal["example", "module", "token"]


def score_gradients(
    model: Model,
    data: Records,
    *,
    path: str | Path,
    query_stores: Sequence[str | Path] | str | Path = (),
    query_data: Records | None = None,
    query_columns: Columns | None = None,
    query_split: str | None = None,
    score: How = "individual",
    unit_norm: bool = False,
    granularity: Granularity = "example",
    top_k: int | None = None,
    unique: bool = False,
    chain: Chain | None = None,
    state: str | Path | None = None,
    source: Source | None = None,
    gradients: GradientConfig | None = None,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
    **settings: Unpack[GradientSettings],
) -> Scores:
    """Score every document against query gradients; continues a run that was interrupted.

    Args:
        model, data, chain, source, gradients, overwrite, config, settings: as in ``collect_gradients``; they must be
            those that made the queries.
        path: the folder of the scores.
        query_stores: stores of query gradients, whose rows are the queries one after the other.
        query_data: or the queries' data set, whose gradients are computed first, into a sub-folder of ``path``;
            ``query_columns`` and ``query_split`` are its own.
        score: a column for every query, or one for their mean, or for the nearest of them (the largest score); ``self``
            takes no queries: ⟨g, g⟩, each document's influence on itself.
        unit_norm: cosines: documents and queries are scaled to unit length, all leaves together. For ``self`` refused.
        granularity: ``module`` keeps the part of every parameter (or head), ``token`` has a row for every token: their
            sum is the score.
        top_k: keep the best rows of each query alone, and nothing else.
        unique: of rows with the same text, whatever its case, white space and unicode form, ``top_k`` keeps the best.
        state: a folder with a fitted state; by default that of the queries, or one fitted on ``data``.

    Raises:
        FuncattribError: bad input of any kind; queries of another model, chain or state, or that are not finite.

    Example:
        >>> import tempfile, torch
        >>> loss = lambda params, example: (params["w"] * example["x"]).sum() ** 2
        >>> model, data = (loss, {"w": torch.ones(2)}), [{"x": [1.0, 0.0]}, {"x": [1.0, 2.0]}]
        >>> with tempfile.TemporaryDirectory() as out:
        ...     score_gradients(model, data, path=out, score="self", quiet=True)[:, 0]
        array([  4., 180.], dtype=float32)
    """
    path = Path(path)
    paths = [query_stores] if isinstance(query_stores, str | Path) else list(query_stores)
    _check_queries(score, paths, query_data, unit_norm, granularity, top_k)
    refuse((unique and top_k is None, "`unique` requires `top_k`; of scores of all rows, topk takes `unique`"))
    source, gradients = resolve(source, gradients or GradientConfig(), settings)
    model, source = load_named(model, source)  # once, for the documents and for the queries
    check_free(path, "scores", overwrite=overwrite)
    inputs = read_inputs(model, data, source, gradients)
    if query_data is not None:
        query_source = source.for_queries(query_columns, query_split)
        query_inputs = read_inputs(model, query_data, query_source, gradients)  # before anything is computed
        require_shared(path, world())
        parts = path / PARTS
        stages = (chain or chain_of(gradients, model[1] if isinstance(model, tuple) else model)).stages
        if state is None and any(stage.fitted for stage in stages):
            state = fit_chain(
                model,
                inputs,
                path=parts / "state",
                chain=chain,
                source=source,
                gradients=gradients,
                overwrite=overwrite,
            ).path
        of_queries = collect_gradients(
            model,
            query_inputs,
            path=parts / "query",
            chain=chain,
            state=state,
            source=query_source,
            gradients=gradients,
            overwrite=overwrite,
        )
        paths = [of_queries.path]
    stores = [_gradients_at(each) for each in paths]
    prepared = prepare(model, inputs, source, gradients, chain, state)
    for store in stores:
        check_gradients(prepared.manifest, store.manifest)
        _say_other_loss(prepared, store)
    if state is None and stores and stores[0].manifest.state is not None:
        prepared = with_state(prepared, stores[0])
    last, queries = _last_stages(stores, score, unit_norm, granularity, prepared)
    leaves = list(_spec(prepared, last)) if granularity == "module" else []
    manifest = scores_manifest(
        prepared.manifest,
        of=[store.manifest for store in stores],
        method={"name": "score", "score": score, "unit_norm": unit_norm},
        queries=queries,
        modules=leaves,
    )
    width = manifest.leaves[-1].stop
    manifest = replace(manifest, rows_per_shard=gradients.rows_per_shard or shard_rows(width))
    if granularity == "token":
        manifest = by_token(manifest, prepared.work, gradients.rows_per_shard or shard_rows(width, MOST_ROWS))
    tried = prepared.work._replace(chain=compose(prepared.work.chain, *last))
    tried = as_tokens(tried) if granularity == "token" else tried
    prepared = with_budget(prepared._replace(manifest=manifest), path, overwrite=overwrite, tried=tried)
    manifest = prepared.manifest
    if top_k is not None:
        kept = {"top_k": top_k, "shard": manifest.rows_per_shard, "scored": manifest.rows}
        kept |= {"unique": True} if unique else {}
        manifest = replace(manifest, rows=0, computed_with={**manifest.computed_with, **kept})
    with run_folder(path, manifest, prepared.work.world, overwrite=overwrite, config=config) as writer:
        if not writer.manifest.complete:
            _compute(prepared, last, writer, gradients.fit_documents, top_k, granularity)
    return opened_scores(path, quiet=source.quiet)


def opened_scores(path: Path, *, quiet: bool) -> Scores:
    """Open the scores of a run that is done; a line names the rows whose score says nothing."""
    scores = open_scores(path)
    if scores.manifest.nonfinite and not quiet and world().is_rank_zero:
        store = open_store(path)
        log.warning(
            "the scores are NaN or infinite in %s; they are left out of top-k", named_rows(store, nonfinite_rows(store))
        )
    return scores


def _compute(
    prepared: Prepared,
    last: Sequence[Transform],
    writer: StoreWriter,
    fit_documents: int,
    top_k: int | None,
    granularity: str,
) -> None:
    work, state = ending_in(prepared.work, state_of(prepared, writer, fit_documents), last)
    if top_k is None:
        (fill_tokens if granularity == "token" else fill)(work, writer, state, "score")
    else:
        unique = bool(writer.manifest.computed_with.get("unique"))
        fill_best(work, writer, state, top_k, text_groups(work.corpus) if unique else None)


def ending_in(work: Work, fitted: State, last: Sequence[Transform]) -> tuple[Work, State]:
    """Append stages that score the chain's result to the work, and their states to the chain's."""
    arriving = work.chain.init(work.chain.started().spec(work.params))[1]
    return work._replace(chain=compose(work.chain, *last)), (*fitted, *compose(*last).init(arriving)[0])


def _last_stages(
    stores: Sequence[GradientStore], score: How, unit_norm: bool, granularity: Granularity, prepared: Prepared
) -> tuple[list[Transform], list[dict[str, Any]]]:
    """Return the last stages of the chain, and metadata of each column."""
    if score == "self":
        return [self_influence()], [{"id": "self"}]
    rows, queries = query_rows(stores, unit_norm)
    if score == "mean":
        rows, queries = rows.mean(0, keepdim=True), [{"id": f"mean of {len(queries)} queries"}]
    leaves = as_leaves(rows, stores[0], prepared.work.device)
    by: Literal["example", "leaf"] = "leaf" if granularity == "module" else "example"
    last = [inner_products(leaves, unit_norm=unit_norm, by=by)]
    if score == "nearest":
        return [*last, max_score()], [{"id": f"nearest of {len(queries)} queries"}]
    return last, queries


def _spec(prepared: Prepared, last: Sequence[Transform]) -> Mapping[str, Any]:
    arriving = prepared.work.chain.init(prepared.work.chain.started().spec(prepared.work.params))[1]
    return compose(*last).init(arriving)[1]


def _gradients_at(path: str | Path) -> GradientStore:
    store = open_store(path)
    check_kind(store.manifest, path, "gradients")
    return store


def _say_other_loss(prepared: Prepared, store: GradientStore) -> None:
    """Warn where the losses differ: two may be meant (a task's own for the queries), or a flag was forgotten."""
    for name, ours, theirs in loss_differences(prepared.manifest, store.manifest):
        log.warning(
            "the queries in %s were computed with loss %s %s, the documents with %s", store.path, name, theirs, ours
        )


def _check_queries(
    score: str, paths: Sequence[Any], query_data: Any, unit_norm: bool, granularity: str, top_k: int | None
) -> None:
    given = bool(paths) + (query_data is not None)
    refuse(
        (score == "self" and given, "`score='self'` compares each document with itself and takes no queries"),
        (
            score == "self" and unit_norm,
            "`score='self'` and `unit_norm` cannot be combined: every score would be 1",
        ),
        (
            score == "self" and granularity != "example",
            f"`score='self'` and `granularity='{granularity}'` cannot be combined",
        ),
        (score != "self" and not given, "queries are required: give `query_stores` or `query_data`"),
        (given == 2, "`query_stores` and `query_data` cannot be combined"),
        (top_k is not None and top_k < 1, f"expected `top_k` of at least 1, found {top_k}"),
        (
            top_k is not None and granularity != "example",
            f"`top_k` and `granularity='{granularity}'` cannot be combined",
        ),
        (
            score == "nearest" and granularity != "example",
            f"`score='nearest'` and `granularity='{granularity}'` cannot be combined: the parts of a maximum do not "
            "add up",
        ),
        (
            unit_norm and granularity == "token",
            "`unit_norm` and `granularity='token'` cannot be combined: the norm is of the whole document's gradient",
        ),
    )
