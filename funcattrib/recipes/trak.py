"""TRAK: the change of a model's output on a query without a training example, from an ensemble of checkpoints.

    f(z; θ)    Σ_t log(p_t / (1 − p_t)) over labelled tokens, p_t of the right one; the loss ``log_odds`` is −f
    φ_m(z)     S_m ∇f(z; θ_m), (k,), one sketch of the whole gradient, drawn again for each of M checkpoints
    τ(z′)      [1/M Σ_m φ_m(z′)ᵀ (Φ_mᵀ Φ_m)⁻¹ Φ_mᵀ] · [1/M Σ_m diag(1 − p_m)], Φ_m (n, k) over all training examples

p_m of an example is the probability whose log-odds are the mean of its tokens', p = σ(f / #tokens). Of an example with
one label it is that label's, as in the paper's derivation; and it comes from the pass that makes the gradient.

Reference: TRAK, arXiv 2303.14186.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor

from funcattrib.chain.chain import compose
from funcattrib.chain.per_example import per_example_grad
from funcattrib.checkpoints.training_run import Shapes, check_same, shapes_of
from funcattrib.data import IGNORED, Columns
from funcattrib.data.corpus import Corpus
from funcattrib.data.documents import Documents
from funcattrib.data.records import Records
from funcattrib.data.source_target import Pairs
from funcattrib.errors import FuncattribError
from funcattrib.runs.collect import collect_both
from funcattrib.runs.config import RowConfig, refuse
from funcattrib.runs.default_chain import projection_of
from funcattrib.runs.prepare import Model, load_named, read_inputs, shard_rows
from funcattrib.runs.query_rows import query_rows
from funcattrib.runs.run_folder import run_folder
from funcattrib.runs.score import opened_scores
from funcattrib.runs.settings import RowSettings, Source, as_gradient_config, resolve
from funcattrib.runtime.world import world
from funcattrib.scores import Scores, scores_manifest
from funcattrib.store import GradientStore, require_shared
from funcattrib.store.create import PARTS, check_free
from funcattrib.transforms import sketch
from funcattrib.transforms.damping import inverse_power

log = logging.getLogger(__name__)

ScoreKind = Literal["individual", "mean"]

DEFAULTS = RowConfig(projection_dim=0, loss="log_odds", dtype="float32")
"""The settings of a run where nothing else is asked for."""

_BLOCK_ROWS = 1024


def trak(
    models: Sequence[Model],
    data: Records,
    query_data: Records,
    *,
    path: str | Path,
    sketch_dim: int = 4096,
    damping: float = 0.0,
    score: ScoreKind = "individual",
    query_columns: Columns | None = None,
    query_split: str | None = None,
    source: Source | None = None,
    gradients: RowConfig = DEFAULTS,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
    **settings: Unpack[RowSettings],
) -> Scores:
    """Score every document against every query; a run that was interrupted continues.

    Args:
        models: the ensemble: models, names or folders of models, or pairs (loss, params) where loss is −f, the negative
            log-odds of an example's label; one architecture. Several training runs, or checkpoints of one.
        data, query_data: as in ``collect_gradients``; ``query_columns`` and ``query_split`` are of the queries.
        path: folder for the scores; the sketches lie in its sub-folder ``gradients``.
        sketch_dim: k. ΦᵀΦ can be inverted where it is well below the number of documents.
        damping: added to the eigenvalues of ΦᵀΦ, in units of their mean; the paper has none.
        score: a column for every query, or one for their mean.
        source, gradients, overwrite, config, settings: as in ``collect_gradients``; ``projection_dim`` is that of a
            projection of each matrix before the sketch, which is faster; by default there is none.

    Raises:
        FuncattribError: bad input of any kind; what is finished is kept.

    Reference: TRAK, arXiv 2303.14186.

    Example:
        >>> import tempfile
        >>> def loss(params, example):  # −f, of a logistic regression: −y ⟨w, x⟩
        ...     return -example["y"] * (params["w"] * example["x"]).sum()
        >>> data = [{"x": [1.0, 0.0], "y": 1.0}, {"x": [0.0, 1.0], "y": 1.0}, {"x": [1.0, 0.2], "y": 1.0}]
        >>> with tempfile.TemporaryDirectory() as out:
        ...     scores = trak(
        ...         [(loss, {"w": torch.zeros(2)})], data, data[:1], path=out, sketch_dim=16, damping=0.1, quiet=True
        ...     )
        ...     scores.topk(2).rows
        tensor([[0, 2]])
    """
    path = Path(path)
    require_shared(path, world())
    check_free(path, "scores", overwrite=overwrite)
    source, gradients = resolve(source, gradients, settings)
    _check_models(models, gradients, score, sketch_dim, damping)
    rows_config = as_gradient_config(gradients)
    train: list[GradientStore] = []
    query: list[GradientStore] = []
    shapes: Shapes | None = None
    per_token: Tensor | None = None
    for number, named in enumerate(models):
        model, here = load_named(named, source)
        found = shapes_of(model[1] if isinstance(model, tuple) else model)
        shapes = shapes or found
        check_same(shapes, found, f"model {number + 1}")
        seed, part = gradients.seed + number, path / PARTS / str(number)
        chain = compose(per_example_grad, *projection_of(gradients, seed), sketch(sketch_dim, seed=seed))
        inputs = read_inputs(model, data, here, rows_config)
        per_token = _weights(inputs.corpus) if per_token is None else per_token
        both = collect_both(
            model,
            inputs,
            query_data,
            path=part,
            chain=chain,
            sources=(here, here.for_queries(query_columns, query_split)),
            gradients=rows_config,
            overwrite=overwrite,
        )
        train.append(both[0])
        query.append(both[1])
        del model  # before the next is loaded
    assert per_token is not None
    rows = len(train[0])
    if rows <= sketch_dim and not damping:
        log.warning(
            "%d documents are too few for a sketch of %d columns: use a smaller `sketch_dim`, or `damping`",
            *(rows, sketch_dim),
        )
    _score(path, train, query, per_token, damping, score, overwrite, config)
    return opened_scores(path, quiet=source.quiet)


def _score(
    path: Path,
    train: Sequence[GradientStore],
    query: Sequence[GradientStore],
    per_token: Tensor,
    damping: float,
    score: str,
    overwrite: bool,
    config: Mapping[str, Any] | None,
) -> None:
    wanted = [query_rows([store], unit_norm=False) for store in query]
    metadata = wanted[0][1]
    if score == "mean":
        metadata = [{"id": f"mean of {len(metadata)} queries"}]
    method = {
        "name": "trak",
        "score": score,
        "damping": damping,
        "models": [store.manifest.model["fingerprint"] for store in train],
    }
    manifest = scores_manifest(train[0].manifest, of=[query[0].manifest], method=method, queries=metadata)
    manifest = replace(manifest, rows_per_shard=shard_rows(manifest.width))
    with run_folder(path, manifest, world(), overwrite=overwrite, config=config) as writer:
        columns = (
            [_columns(store, rows, damping, score) for store, (rows, _) in zip(train, wanted, strict=True)]
            if writer.pending
            else []
        )
        for shard in writer.claims():
            span = writer.shard_range(shard)
            blocks = [store.matrix().tensor(span.start, span.stop).double() for store in train]
            products = torch.stack([block @ solved for block, solved in zip(blocks, columns, strict=True)]).mean(0)
            losses = torch.stack([_losses(store, span) for store in train])
            missing = torch.sigmoid(losses * per_token[span.start : span.stop]).mean(0)  # 1 − p
            examples = train[0].examples.select(span)
            kept = {name: examples[name][:] for name in examples.column_names}
            writer.put(shard, (products * missing[:, None]).float(), kept)


def _columns(train: GradientStore, queries: Tensor, damping: float, score: str) -> Tensor:
    """Compute (ΦᵀΦ)⁻¹ φ(z′) of every query, (k, K) float64. Documents whose gradient is not finite are not in Φ."""
    wanted = queries.double().mean(0, keepdim=True) if score == "mean" else queries.double()
    here, total, count = world(), torch.zeros(train.width, train.width, dtype=torch.float64), 0
    for number, block in enumerate(train.matrix().blocks(_BLOCK_ROWS)):
        if number % here.size == here.rank:
            finite = block[block.isfinite().all(1)].double()
            total.addmm_(finite.T, finite)
            count += len(finite)
    total = here.all_reduce({"gram": total})["gram"]
    if not sum(here.all_gather_object(count)):
        raise FuncattribError(f"no document in {train.path} has a finite gradient; check their loss")
    return inverse_power(total, -1, damping) @ wanted.T


def _losses(store: GradientStore, span: range) -> Tensor:
    """Read −f of some documents, float64."""
    return torch.tensor(store.examples[span.start : span.stop]["loss"], dtype=torch.float64)


def _weights(corpus: Corpus) -> Tensor:
    """Return the factors that make −f of every document its tokens' mean, (rows,) float64.

    1 / Σ_t a_t over labelled tokens, a_t the weight that the loss gives them; 0 where there is none. 1 for a
    label, and for a user's loss: it is that of one label.
    """
    count = len(corpus.lengths)
    if isinstance(corpus, Pairs):
        counted = torch.tensor([int((row["labels"] != IGNORED).sum()) for row in corpus.targets.rows]).double()
        return torch.where(counted != 0, 1 / counted, 0.0)
    if not isinstance(corpus, Documents):
        return torch.ones(count, dtype=torch.float64)
    sums = []
    for start in range(0, count, _BLOCK_ROWS):
        batch = corpus.batch(range(start, min(start + _BLOCK_ROWS, count)))
        weights = (batch["labels"][:, 1:] != IGNORED).double()
        if "token_weights" in batch:
            weights = weights * batch["token_weights"][:, 1:]
        sums.append(weights.sum(1) * batch["advantage"] if "advantage" in batch else weights.sum(1))
    total = torch.cat(sums)
    return torch.where(total != 0, 1 / total, 0.0)


def _check_models(models: Sequence[Model], gradients: RowConfig, score: str, sketch_dim: int, damping: float) -> None:
    refuse(
        (not models, "no model was given; name at least one in `models`"),
        (
            gradients.loss != "log_odds" or gradients.loss_reduction != "sum",
            "expected `loss='log_odds'` with `loss_reduction='sum'`, TRAK's model output, found "
            f"{gradients.loss}, {gradients.loss_reduction}",
        ),
        (score not in get_args(ScoreKind), f"expected `score` of individual or mean, found {score!r}"),
        (sketch_dim < 1, f"expected `sketch_dim` of at least 1, found {sketch_dim}"),
        (not 0 <= damping < math.inf, f"expected `damping` of at least 0, found {damping}"),
    )
