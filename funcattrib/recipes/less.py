"""LESS: the examples of a training set to select for a task that a few queries stand for.

    Inf(z, z′) = Σ_i η_i cos(P Γ(∇ℓ(z; θ_i)), P ∇ℓ(z′; θ_i))

over checkpoints θ_i with learning rates η_i; Γ is the step that Adam would take next on z alone, from the checkpoint's
optimizer (``transforms/adam_update.py``), P the projection, the same on both sides. The two sides have different chains
on purpose: what a training step does is compared with what the query asks for.

A document's score is the largest over the queries or subtasks (``nearest``), or the mean over queries. A subtask is the
mean of its queries' cosines, as in the authors' code; the paper writes the cosine with their mean gradient.

Reference: LESS, arXiv 2402.04333.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import datasets
import numpy as np
import torch
from torch import nn

from funcattrib.chain.chain import compose
from funcattrib.chain.per_example import per_example_grad
from funcattrib.checkpoints.adam_state import adam_state
from funcattrib.checkpoints.training_run import Shapes, check_same, shapes_of
from funcattrib.checkpoints.training_run import learning_rates as rates_of
from funcattrib.data import Columns
from funcattrib.data.records import Records, open_records
from funcattrib.errors import FuncattribError
from funcattrib.recipes.less_selected import SELECTED, save_selected
from funcattrib.recipes.query_halves import Members, agreement, half_columns
from funcattrib.runs.collect import collect_gradients
from funcattrib.runs.config import RowConfig, refuse
from funcattrib.runs.default_chain import projection_of
from funcattrib.runs.prepare import load_named, prepare, read_inputs, shard_rows
from funcattrib.runs.query_rows import as_leaves, query_rows
from funcattrib.runs.run_folder import run_folder
from funcattrib.runs.score import ending_in, opened_scores
from funcattrib.runs.settings import RowSettings, Source, as_gradient_config, resolve
from funcattrib.runs.token_budget import with_budget
from funcattrib.runs.workload import fill, template
from funcattrib.runtime.world import world
from funcattrib.scores import Scores, check_gradients, open_scores, scores_manifest
from funcattrib.store import require_shared
from funcattrib.store.create import PARTS, check_free
from funcattrib.transforms import AdamState, adam_update, inner_products

log = logging.getLogger(__name__)

ScoreKind = Literal["nearest", "mean"]

DEFAULTS = RowConfig(loss_reduction="mean")
"""The settings of a run where nothing else is asked for."""

_LEAST_SPREAD = 1.5
"""The spread of scores, in units of their noise, below which a line is logged; 1 is noise alone."""


def less(
    checkpoints: Sequence[str | Path],
    data: Records,
    query_data: Records,
    *,
    path: str | Path,
    learning_rates: Sequence[float] = (),
    fraction: float = 0.05,
    score: ScoreKind = "nearest",
    subtask_column: str | None = None,
    unique: bool = True,
    query_columns: Columns | None = None,
    query_split: str | None = None,
    source: Source | None = None,
    gradients: RowConfig = DEFAULTS,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
    **settings: Unpack[RowSettings],
) -> Scores:
    """Score every document and select the best; a run that was interrupted continues with the checkpoint it was in.

    Args:
        checkpoints: folders with a model and its ``optimizer.pt`` (Adam, AdamW), as transformers' Trainer leaves them.
        data, query_data: as in ``collect_gradients``; ``query_columns`` and ``query_split`` are of the queries.
        path: folder for the scores, one column; each checkpoint's lie in its sub-folder ``gradients``, and the selected
            documents, best first, in ``selected``, which ``datasets.load_from_disk`` loads: their columns, and
            ``score``, ``rank`` (from 1) and ``source_row``, their place in ``data``.
        learning_rates: η_i; by default what each checkpoint's ``trainer_state.json`` logged (``learning_rates``).
        fraction: of the documents that is selected.
        score: the nearest query (or subtask), or the mean over all queries.
        subtask_column: column of the queries; those with the same value are one subtask.
        unique: of documents with the same text, whatever its case, white space and unicode form, select the best alone.
        source, gradients, overwrite, config, settings: as in ``collect_gradients``. The loss is the mean over an
            example's tokens unless asked otherwise, as in training: Γ weighs it against the momentum.

    Raises:
        FuncattribError: bad input of any kind; what is finished is kept.

    Reference: LESS, arXiv 2402.04333.

    Example:
        >>> import tempfile, torch
        >>> from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
        >>> size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> _ = torch.manual_seed(0)
        >>> model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=10, max_position_embeddings=8, **size))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> model(input_ids=ids, labels=ids).loss.backward()
        >>> optimizer.step()
        >>> data = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6]}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(f"{folder}/checkpoint-1")
        ...     torch.save(optimizer.state_dict(), f"{folder}/checkpoint-1/optimizer.pt")
        ...     scores = less(
        ...         [f"{folder}/checkpoint-1"], data, data[:1], path=f"{folder}/out", learning_rates=[1.0], quiet=True
        ...     )
        ...     scores.topk(1).rows
        tensor([[0]])
    """
    path, folders = Path(path), [Path(checkpoint).expanduser() for checkpoint in checkpoints]
    source, gradients = resolve(source, gradients, settings)
    _check_checkpoints(folders, fraction, score, subtask_column)
    require_shared(path, world())
    check_free(path, "scores", overwrite=overwrite)
    weights = rates_of(folders, learning_rates)
    records = open_records(data, source.split, subset=source.subset)
    columns = _columns(open_records(query_data, query_split), score, subtask_column)
    every = {**columns, **half_columns(columns)}
    parts: list[Scores] = []
    shapes: Shapes | None = None
    for number, folder in enumerate(folders):
        model, here = load_named(folder, source)
        assert isinstance(model, nn.Module), "it was loaded by name"
        shapes = shapes or shapes_of(model)
        check_same(shapes, shapes_of(model), folder)
        sides = ((data, here), (query_data, here.for_queries(query_columns, query_split)))
        states, part = adam_state(folder, model), path / PARTS / str(number)
        parts.append(_score_one(model, states, sides, every, gradients, part, overwrite))
        del model
    _add_up(path, parts, weights, score, list(columns), overwrite, config)
    scores = opened_scores(path, quiet=source.quiet)
    world().on_rank_zero(lambda: save_selected(records, scores, fraction, path / SELECTED, unique, source.quiet))
    if not source.quiet and world().is_rank_zero:
        _say_where_noise(parts, weights, columns)
    return scores


def _score_one(
    model: nn.Module,
    states: Mapping[str, AdamState],
    sides: tuple[tuple[Records, Source], tuple[Records, Source]],
    columns: Members,
    gradients: RowConfig,
    path: Path,
    overwrite: bool,
) -> Scores:
    """Return one checkpoint's cosines, (documents, columns); ``sides`` are the data and the queries."""
    (data, source), (query_data, query_source) = sides
    rows_config, projection = as_gradient_config(gradients), projection_of(gradients)
    inputs = read_inputs(model, data, source, rows_config)  # both sides, before anything is computed
    queries = read_inputs(model, query_data, query_source, rows_config)
    of_queries = compose(per_example_grad, *projection)
    of_documents = compose(per_example_grad, adam_update(states, *projection))
    store = collect_gradients(
        model,
        queries,
        path=path / PARTS / "query",
        chain=of_queries,
        source=query_source,
        gradients=replace(rows_config, dtype="float32"),
        overwrite=overwrite,
    )
    rows, _ = query_rows([store], unit_norm=True)
    wanted = torch.stack([rows[list(members)].mean(0) for members in columns.values()])
    prepared = prepare(model, inputs, source, rows_config, of_documents, None)
    last = inner_products(as_leaves(wanted, store, prepared.work.device), unit_norm=True)
    # the update is on one side alone; in all else the two sides must agree
    check_gradients(replace(prepared.manifest, chain=of_queries.identity()), store.manifest)
    method = {
        "name": "less, one checkpoint",
        "columns": [list(members) for members in columns.values()],
        "queries": store.manifest.data["fingerprint"],
    }
    manifest = scores_manifest(prepared.manifest, method=method, queries=[{"id": name} for name in columns])
    per_shard = gradients.rows_per_shard or shard_rows(manifest.width)
    prepared = prepared._replace(manifest=replace(manifest, rows_per_shard=per_shard))
    tried = prepared.work._replace(chain=compose(of_documents, last))
    prepared = with_budget(prepared, path, overwrite=overwrite, tried=tried)
    with run_folder(path, prepared.manifest, prepared.work.world, overwrite=overwrite) as writer:
        if writer.pending:
            work, state = ending_in(prepared.work, template(prepared.work), [last])  # nothing is fitted
            fill(work, writer, state, "less")
    return open_scores(path)


def _add_up(
    path: Path,
    parts: Sequence[Scores],
    weights: Sequence[float],
    score: str,
    columns: Sequence[str],
    overwrite: bool,
    config: Mapping[str, Any] | None,
) -> None:
    """Sum η_i times the checkpoints' scores, and take the largest of the columns that are named, their first."""
    manifests = [part.manifest for part in parts]
    column = {"id": f"{score} of {len(columns)} queries" if score == "nearest" else columns[0]}
    manifest = scores_manifest(
        manifests[-1],
        method={
            "name": "less",
            "score": score,
            "learning_rates": list(weights),
            "checkpoints": [one.model["fingerprint"] for one in manifests],
            "optimizers": [one.computed_with["given"] for one in manifests],
            **{key: manifests[-1].computed_with["method"][key] for key in ("columns", "queries")},
        },
        queries=[column],
    )
    with run_folder(path, manifest, world(), overwrite=overwrite, config=config) as writer:
        for shard in writer.claims():
            span = writer.shard_range(shard)
            rows = sum(
                weight * torch.from_numpy(np.array(part[span.start : span.stop, : len(columns)]))
                for weight, part in zip(weights, parts, strict=True)
            )
            examples = parts[-1].examples.select(span)
            kept = {name: examples[name][:] for name in examples.column_names}
            writer.put(shard, torch.as_tensor(rows).amax(1, keepdim=True), kept)


def _say_where_noise(parts: Sequence[Scores], weights: Sequence[float], columns: Members) -> None:
    """Warn where two halves of the queries agree on little."""
    total = sum(weight * np.asarray(part, dtype=float) for weight, part in zip(weights, parts, strict=True))
    found = agreement(np.asarray(total), columns)
    if found is not None and found.spread < _LEAST_SPREAD * found.noise:
        log.warning(
            "the queries hardly separate the documents: the scores by two halves of the queries differ by %.2g, and "
            "their mean spreads by %.2g\ngive more queries of the task, or compare `score='mean'` with "
            "`score='nearest'`",
            *(found.noise, found.spread),
        )


def _columns(queries: datasets.Dataset, score: str, subtask_column: str | None) -> Members:
    """Return each column's name, and the queries that it is the mean of."""
    everything = range(len(queries))
    if score == "mean":
        return {f"mean of {len(queries)} queries": everything}
    if subtask_column is None:
        return {str(number): [number] for number in everything}
    if subtask_column not in queries.column_names:
        raise FuncattribError(
            f"the queries have no column {subtask_column!r} of subtasks; they have {', '.join(queries.column_names)}"
        )
    members: dict[str, list[int]] = {}
    for number, value in enumerate(queries[subtask_column][:]):
        members.setdefault(str(value), []).append(number)
    return members


def _check_checkpoints(folders: Sequence[Path], fraction: float, score: str, subtask_column: str | None) -> None:
    refuse(
        (not folders, "no checkpoint was given; name at least one in `checkpoints`"),
        (not 0 < fraction <= 1, f"expected `fraction` above 0 and at most 1, found {fraction}"),
        (score not in get_args(ScoreKind), f"expected `score` of nearest or mean, found {score!r}"),
        (
            subtask_column is not None and score == "mean",
            "`subtask_column` requires `score='nearest'`: the mean is over all queries together",
        ),
    )
    for folder in folders:
        if not os.path.isdir(folder):
            raise FuncattribError(f"the checkpoint {folder} is not a folder; check its path")
        if not (folder / "optimizer.pt").is_file():
            raise FuncattribError(
                f"{folder} has no optimizer.pt, and LESS needs Adam's moments; give a checkpoint that transformers' "
                "Trainer saved without save_only_model"
            )
