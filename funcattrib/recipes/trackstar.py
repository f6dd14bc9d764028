"""TrackStar: which training examples a language model has a fact from.

    train, query   Adafactor second moments of the training data → projection to (16, 16)      (one pass each)
    H              a H_query + (1 − a) H_train, a from the 1000th pooled eigenvalue
    score          ⟨u(H^-½ train), u(H^-½ query)⟩, u(x) = x / ‖x‖ over all parameters together

Reference: TrackStar, arXiv 2410.17413. Its loss is cross-entropy; here it is the log-odds unless asked
otherwise, because a fact that is known by heart has no cross-entropy left to attribute.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from funcattrib.compose import Chain, State, compose
from funcattrib.curvature import gram_of, mix
from funcattrib.data import Columns
from funcattrib.functional import choose
from funcattrib.per_example import Leaf, Spec, per_example_grad
from funcattrib.recipes.collect import collect_gradients
from funcattrib.recipes.documents import Records
from funcattrib.recipes.score import as_leaves
from funcattrib.score import Scores, open_scores, scores_manifest
from funcattrib.store import GradientStore, create_store
from funcattrib.store.create import PARTS
from funcattrib.transforms import adafactor_norm, precondition, project, split_experts, unit_norm
from funcattrib.transforms.kinds import is_stack

_BLOCK_ROWS = 1024


def trackstar(
    model: nn.Module,
    data: Records | str,
    queries: Records | str,
    *,
    path: str | Path,
    query_columns: Columns | None = None,
    query_split: str | None = None,
    score: Literal["individual", "mean"] = "individual",
    projection_dim: int = 16,
    mixing_rank: int = 1000,
    damping: float = 0.1,
    moments: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Scores:
    """Score every document of ``data`` against every query; an interrupted run is continued.

    Args:
        model: a causal language model.
        data, queries: as in ``collect_gradients``; ``query_columns`` and ``query_split`` are the queries' own.
        path: folder for the scores; the gradients lie in its sub-folder ``gradients``.
        score: a column for every query, or one for their mean gradient.
        mixing_rank: k of the mixed preconditioner.
        damping: in units of the mean eigenvalue.
        moments: Adafactor moments of an optimizer (``optimizer_state``) in place of a pass over the data.
        settings: further ones of ``collect_gradients``: tokenizer, columns, loss, modules, token_batch_size, dtype, …

    Raises:
        FuncattribError: bad input of any kind; what is finished is kept.
    """
    path = Path(path)
    settings.setdefault("loss", "log_odds")
    settings.setdefault("modules", blocks_and_head(model, settings.pop("exclude", ())))
    seed = settings.get("seed", 0)
    normalizer = adafactor_norm(moments) if moments is not None else adafactor_norm()
    kind = settings.get("projection_type", "rademacher")
    experts = [split_experts()] if _has_stacks(model, settings) else []  # each has a Gram matrix of its own
    chain = compose(per_example_grad, normalizer, *experts, project(projection_dim, kind=kind, seed=seed))
    train = collect_gradients(model, data, path=path / PARTS / "train", chain=chain, overwrite=overwrite, **settings)
    own = {"columns": query_columns or settings.get("columns"), "split": query_split, "subset": None}
    query = collect_gradients(
        model,
        queries,
        path=path / PARTS / "query",
        chain=chain,
        state=train.path,
        overwrite=overwrite,
        **{**settings, **own},
    )
    mixed = mix(gram_of_store(query), gram_of_store(train), mixing_rank)
    after = compose(precondition(gram=mixed.gram, power=-0.5, damping=damping), unit_norm)
    state = after.init(_spec(train))[0]
    columns = torch.cat([_rows(after, state, query, block) for block in query.matrix().blocks(_BLOCK_ROWS)])
    told = [dict(entry) for entry in query.examples]
    if score == "mean":
        columns, told = columns.mean(0, keepdim=True), [{"id": f"mean of {len(told)} queries"}]
    manifest = scores_manifest(
        train.manifest,
        of=[query.manifest],
        method={
            "name": "trackstar",
            "unit_norm": True,
            "score": score,
            "mixing_rank": mixing_rank,
            "mixing_weight": mixed.weight,
            "mixing_component": mixed.component,
            "damping": damping,
        },
        queries=told,
    )
    with create_store(path, manifest, overwrite=overwrite) as writer:
        if config is not None:
            writer.save_config(config)
        for shard in writer.pending:
            span = writer.shard_range(shard)
            block = train.matrix().tensor(span.start, span.stop)
            examples = train.examples.select(span)
            kept = {name: examples[name][:] for name in examples.column_names}
            writer.put(shard, _rows(after, state, train, block) @ columns.T, kept)
        writer.finish()
    return open_scores(path)


def blocks_and_head(model: nn.Module, exclude: Any = ()) -> list[str]:
    """The matrices of the model's blocks, and its head."""
    names = choose(model, None, exclude)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    shared = {id(tensor): name for name, tensor in reversed(list(model.named_parameters()))}
    chosen = names | ({shared[id(head.weight)]} if head is not None and id(head.weight) in shared else set())
    return [name for name, _ in model.named_parameters() if name in chosen]


def _has_stacks(model: nn.Module, settings: Mapping[str, Any]) -> bool:
    names = choose(model, settings["modules"], settings.get("exclude", ()))
    return any(is_stack(name, tuple(tensor.shape)) for name, tensor in model.named_parameters() if name in names)


def gram_of_store(store: GradientStore) -> dict[str, Tensor]:
    """H = E[c cᵀ] of every leaf over the rows of a store, (D, D) float64."""
    stage = precondition()
    state = stage.init(_spec(store))[0]
    for block in store.matrix().blocks(_BLOCK_ROWS):
        state = stage.observe(state, as_leaves(block.float(), store, block.device))
    return gram_of(state)


def _spec(store: GradientStore) -> Spec:
    return {name: Leaf(tuple(leaf.shape), torch.float32) for name, leaf in store.leaves.items()}


def _rows(after: Chain, state: State, store: GradientStore, block: Tensor) -> Tensor:
    """Rows of a store (n, D) with the last stages applied, float32."""
    return torch.cat(
        [grad.flatten(1) for grad in after.apply(state, as_leaves(block.float(), store, block.device)).values()], 1
    )
