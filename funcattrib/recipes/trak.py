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
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from funcattrib.chain.chain import compose
from funcattrib.chain.per_example import per_example_grad
from funcattrib.chain.transform import Transform
from funcattrib.checkpoints.loading import Shapes, check_same, load_checkpoint, shapes_of
from funcattrib.data import IGNORED, Columns
from funcattrib.data.documents import Documents, Records
from funcattrib.errors import FuncattribError
from funcattrib.runs.collect import collect_gradients, split_settings
from funcattrib.runs.prepare import Model, prepare, shard_rows
from funcattrib.runs.query_rows import query_rows
from funcattrib.runtime.world import world
from funcattrib.scores import Scores, open_scores, scores_manifest
from funcattrib.store import GradientStore, require_shared, share_store
from funcattrib.store.create import PARTS
from funcattrib.transforms import project, sketch
from funcattrib.transforms.damping import inverse_power
from funcattrib.types import Loss, Params

log = logging.getLogger(__name__)

_BLOCK_ROWS = 1024


def trak(
    models: Sequence[Model],
    data: Records | str,
    queries: Records | str,
    *,
    path: str | Path,
    sketch_dim: int = 4096,
    damping: float = 0.0,
    score: Literal["individual", "mean"] = "individual",
    query_columns: Columns | None = None,
    query_split: str | None = None,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    load_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Scores:
    """Score every document against every query; a run that was interrupted continues.

    Args:
        models: the ensemble: models, names or folders of models, or pairs (loss, params) where loss is −f, the negative
            log-odds of an example's label; one architecture. Several training runs, or checkpoints of one.
        data, queries: as in ``collect_gradients``; ``query_columns`` and ``query_split`` are the queries' own.
        path: folder for the scores; the sketches lie in its sub-folder ``gradients``.
        sketch_dim: k. ΦᵀΦ can be inverted where it is well below the number of documents.
        damping: added to the eigenvalues of ΦᵀΦ, in units of their mean; the paper has none.
        score: a column for every query, or one for their mean.
        tokenizer, load_options: where ``models`` names them: in the place of their own; and of ``load_model``.
        settings: further ones of ``collect_gradients``: columns, modules, token_batch_size, seed, projection_dim (a
            projection of each matrix before the sketch, which is faster; by default none), …

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
    settings = {"loss": "log_odds", "projection_dim": 0, "dtype": "float32", **settings}
    _check_asked(models, settings, score, sketch_dim, damping)
    seed, common = settings.get("seed", 0), {"overwrite": overwrite, **settings}
    own = {"columns": query_columns or settings.get("columns"), "split": query_split, "subset": None}
    train: list[GradientStore] = []
    query: list[GradientStore] = []
    shapes: Shapes | None = None
    per_token: Tensor | None = None
    for number, named in enumerate(models):
        model, of_model = _opened(named, tokenizer, load_options or {})
        found = shapes_of(model[1] if isinstance(model, tuple) else model)
        shapes = shapes or found
        check_same(shapes, found, f"model {number + 1}")
        chain = compose(per_example_grad, *_projection(settings, seed + number), sketch(sketch_dim, seed=seed + number))
        both, here = {**common, **of_model, "chain": chain}, path / PARTS / str(number)
        per_token = _weights(model, data, both) if per_token is None else per_token
        train.append(collect_gradients(model, data, path=here / "train", **both))
        query.append(collect_gradients(model, queries, path=here / "query", state=train[-1].path, **{**both, **own}))
        del model, both  # before the next is loaded
    assert per_token is not None
    rows = len(train[0])
    if rows <= sketch_dim and not damping:
        log.warning(
            "%d documents are too few for a sketch of %d columns: use a smaller --sketch-dim, or --damping",
            *(rows, sketch_dim),
        )
    return _score(path, train, query, per_token, damping, score, overwrite, config)


def _score(
    path: Path,
    train: Sequence[GradientStore],
    query: Sequence[GradientStore],
    per_token: Tensor,
    damping: float,
    score: str,
    overwrite: bool,
    config: Mapping[str, Any] | None,
) -> Scores:
    wanted = [query_rows([store], unit_norm=False) for store in query]
    told = wanted[0][1]
    if score == "mean":
        told = [{"id": f"mean of {len(told)} queries"}]
    method = {
        "name": "trak",
        "score": score,
        "damping": damping,
        "models": [store.manifest.model["fingerprint"] for store in train],
    }
    manifest = scores_manifest(train[0].manifest, of=[query[0].manifest], method=method, queries=told)
    manifest = replace(manifest, rows_per_shard=shard_rows(manifest.width))
    with share_store(path, manifest, world(), overwrite=overwrite) as writer:
        if config is not None:
            writer.save_config(config)
        columns = (
            [_columns(store, rows, damping, score) for store, (rows, _) in zip(train, wanted, strict=True)]
            if writer.pending
            else []
        )
        for shard in writer.claims():
            span = writer.shard_range(shard)
            blocks = [store.matrix().tensor(span.start, span.stop).double() for store in train]
            products = torch.stack([block @ own for block, own in zip(blocks, columns, strict=True)]).mean(0)
            losses = torch.stack([_losses(store, span) for store in train])
            missing = torch.sigmoid(losses * per_token[span.start : span.stop]).mean(0)  # 1 − p
            examples = train[0].examples.select(span)
            kept = {name: examples[name][:] for name in examples.column_names}
            writer.put(shard, (products * missing[:, None]).float(), kept)
        writer.finish()
    return open_scores(path)


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


def _weights(model: Model, data: Records | str, settings: Mapping[str, Any]) -> Tensor:
    """Compute the factors that turn −f of every document into its tokens' mean, (rows,) float64.

    1 / Σ_t a_t over labelled tokens, a_t the weight that the loss gives them; 0 where there is none. 1 for a
    user's loss: it is that of one label.
    """
    given = {name: value for name, value in settings.items() if name not in ("chain", "overwrite")}
    source, gradients = split_settings(data, {**given, "quiet": True})
    corpus = prepare(model, source, gradients, settings["chain"], None).work.corpus
    rows = len(corpus.lengths)
    if not isinstance(corpus, Documents):
        return torch.ones(rows, dtype=torch.float64)
    sums = []
    for start in range(0, rows, _BLOCK_ROWS):
        batch = corpus.batch(range(start, min(start + _BLOCK_ROWS, rows)))
        weights = (batch["labels"][:, 1:] != IGNORED).double()
        if "token_weights" in batch:
            weights = weights * batch["token_weights"][:, 1:]
        sums.append(weights.sum(1) * batch["advantage"] if "advantage" in batch else weights.sum(1))
    total = torch.cat(sums)
    return torch.where(total != 0, 1 / total, 0.0)


def _projection(settings: Mapping[str, Any], seed: int) -> list[Transform]:
    k, kind = settings["projection_dim"], settings.get("projection_type", "rademacher")
    return [project(k, kind=kind, seed=seed)] if k else []


def _opened(
    model: Model | Path, tokenizer: str | PreTrainedTokenizerBase | None, options: Mapping[str, Any]
) -> tuple[nn.Module | tuple[Loss, Params], dict[str, Any]]:
    if isinstance(model, str | Path):
        return load_checkpoint(model, tokenizer, options)
    if isinstance(tokenizer, str):
        raise FuncattribError("expected a tokenizer object with a model object, found a name; load the tokenizer first")
    return model, {"tokenizer": tokenizer}


def _check_asked(
    models: Sequence[Model], settings: Mapping[str, Any], score: str, sketch_dim: int, damping: float
) -> None:
    if not models:
        raise FuncattribError("no model was given; name at least one with --checkpoint")
    if settings["loss"] != "log_odds" or settings.get("loss_reduction", "sum") != "sum":
        raise FuncattribError(
            "expected --loss log_odds with --loss-reduction sum, TRAK's model output, found "
            f"{settings['loss']}, {settings.get('loss_reduction', 'sum')}"
        )
    if score not in ("individual", "mean"):
        raise FuncattribError(f"expected --score individual or mean, found {score!r}")
    if sketch_dim < 1:
        raise FuncattribError(f"expected --sketch-dim of at least 1, found {sketch_dim}")
    if not 0 <= damping < math.inf:
        raise FuncattribError(f"expected --damping of at least 0, found {damping}")
