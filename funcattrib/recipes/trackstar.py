"""TrackStar: the training examples that a language model has a fact from.

    train, query   Adafactor second moments of the training data → projection to (16, 16)      (one pass each)
    H              a H_query + (1 − a) H_train, a from the 1000th pooled eigenvalue
    score          ⟨u(H^-½ train), u(H^-½ query)⟩, u(x) = x / ‖x‖ over all parameters together

Of several processes each owns some of the parameters: their H is summed, decomposed and applied there alone, and what
the processes make of their columns, products and squared lengths, is added up.

Reference: TrackStar, arXiv 2410.17413. Its loss is cross-entropy; here it is the log-odds unless asked
otherwise, because a fact that is known by heart has no cross-entropy remaining to attribute.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from funcattrib.chain.chain import compose
from funcattrib.chain.per_example import per_example_grad
from funcattrib.chain.transform import State, Transform
from funcattrib.data import Columns
from funcattrib.data.records import Records
from funcattrib.errors import FuncattribError
from funcattrib.kernels.safe_norm import as_rows, divisors
from funcattrib.models.selection import choose
from funcattrib.runs.collect import collect_both
from funcattrib.runs.config import FittedConfig
from funcattrib.runs.default_chain import projection_of
from funcattrib.runs.prepare import Model, load_named
from funcattrib.runs.query_rows import as_leaves, check_finite
from funcattrib.runs.run_folder import run_folder
from funcattrib.runs.score import opened_scores
from funcattrib.runs.settings import FittedSettings, Source, as_gradient_config, resolve
from funcattrib.runtime.assignment import owned
from funcattrib.runtime.world import world
from funcattrib.scores import Scores, scores_manifest
from funcattrib.store import GradientStore, require_shared
from funcattrib.store.create import PARTS, check_free
from funcattrib.store.nonfinite import nonfinite_rows
from funcattrib.transforms import adafactor_norm, precondition, split_experts
from funcattrib.transforms.gram import gram_matrices
from funcattrib.transforms.leaf_shapes import is_stack
from funcattrib.transforms.mixed_gram import mix_grams
from funcattrib.types import Leaf, Loss, Params, Spec

DEFAULTS = FittedConfig(loss="log_odds")
"""The settings of a run where nothing else is asked for."""

_BLOCK_ROWS = 1024


def trackstar(
    model: Model,
    data: Records,
    query_data: Records,
    *,
    path: str | Path,
    query_columns: Columns | None = None,
    query_split: str | None = None,
    score: Literal["individual", "mean"] = "individual",
    mixing_rank: int = 1000,
    damping: float = 0.1,
    moments: Mapping[str, Any] | None = None,
    source: Source | None = None,
    gradients: FittedConfig = DEFAULTS,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
    **settings: Unpack[FittedSettings],
) -> Scores:
    """Score every document of ``data`` against every query; an interrupted run is continued.

    Args:
        model, data, query_data: as in ``collect_gradients``; ``query_columns`` and ``query_split`` are of the queries.
        path: folder for the scores; the gradients lie in its sub-folder ``gradients``.
        score: a column for every query, or one for their mean gradient.
        mixing_rank: k of the mixed preconditioner.
        damping: in units of the mean eigenvalue.
        moments: Adafactor moments of an optimizer (``optimizer_state``) in place of a pass over the data.
        source, gradients, overwrite, config, settings: as in ``collect_gradients``; the loss is the log-odds unless
            asked otherwise, and the parameters are the matrices of the model's blocks and its head.

    Raises:
        FuncattribError: bad input of any kind; what is finished is kept.

    Example:
        >>> import tempfile
        >>> from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=11, max_position_embeddings=8, **sizes)).eval()
        >>> data = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6, 7]}]
        >>> with tempfile.TemporaryDirectory() as out:
        ...     trackstar(model, data, data[:1], path=out, projection_dim=2, quiet=True).shape
        (2, 1)
    """
    path, here = Path(path), world()
    require_shared(path, here)
    check_free(path, "scores", overwrite=overwrite)
    source, gradients = resolve(source, gradients, settings)
    model, source = load_named(model, source)  # once, for the documents and for the queries
    if isinstance(model, nn.Module) and not gradients.modules:
        gradients = replace(gradients, modules=tuple(blocks_and_head(model, gradients.exclude)), exclude=())
    normalizer = adafactor_norm(moments) if moments is not None else adafactor_norm()
    experts = [split_experts()] if _has_stacks(model, gradients) else []  # each has its Gram matrix
    chain = compose(per_example_grad, normalizer, *experts, *projection_of(gradients))
    train, query = collect_both(
        model,
        data,
        query_data,
        path=path / PARTS,
        chain=chain,
        sources=(source, source.for_queries(query_columns, query_split)),
        gradients=as_gradient_config(gradients),
        overwrite=overwrite,
    )
    check_finite(query)
    mine = owned({name: math.prod(leaf.shape) for name, leaf in train.leaves.items()}, here)
    mixed = mix_grams(gram_of_store(query, mine), gram_of_store(train, mine), mixing_rank, here)
    after = precondition(gram=mixed.gram, power=-0.5, damping=damping)
    read = partial(_transformed, after, after.init({name: _spec(train)[name] for name in mine})[0], mine)
    columns = torch.cat([read(query, block) for block in query.matrix().blocks(_BLOCK_ROWS)])
    columns = columns / _lengths(here.all_reduce({"squares": columns.double().square().sum(1)})["squares"])
    queries = [dict(entry) for entry in query.examples]
    if score == "mean":
        columns, queries = columns.mean(0, keepdim=True), [{"id": f"mean of {len(queries)} queries"}]
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
        queries=queries,
    )
    with run_folder(path, manifest, here, overwrite=overwrite, config=config) as writer:
        for number, shard in enumerate(writer.pending):  # all processes together: each has some of the columns
            span = writer.shard_range(shard)
            block = read(train, train.matrix().tensor(span.start, span.stop))
            both = here.all_reduce({"products": block @ columns.T, "squares": block.double().square().sum(1)})
            if number % here.size == here.rank:
                examples = train.examples.select(span)
                kept = {name: examples[name][:] for name in examples.column_names}
                writer.put(shard, both["products"] / _lengths(both["squares"]), kept)
    return opened_scores(path, quiet=source.quiet)


def blocks_and_head(model: nn.Module, exclude: Sequence[str] = ()) -> list[str]:
    """Return the matrices of the model's blocks, and its head."""
    names = choose(model, None, exclude)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    shared = {id(tensor): name for name, tensor in reversed(list(model.named_parameters()))}
    chosen = names | ({shared[id(head.weight)]} if head is not None and id(head.weight) in shared else set())
    return [name for name, _ in model.named_parameters() if name in chosen]


def _has_stacks(model: nn.Module | tuple[Loss, Params], gradients: FittedConfig) -> bool:
    if not isinstance(model, nn.Module):
        return any(is_stack(name, tuple(tensor.shape)) for name, tensor in per_example_grad.named(model[1]).items())
    names = choose(model, gradients.modules, gradients.exclude)
    return any(is_stack(name, tuple(tensor.shape)) for name, tensor in model.named_parameters() if name in names)


def gram_of_store(store: GradientStore, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Compute H = E[c cᵀ] over the finite rows of a store, leaf → (D, D) float64; of all leaves where none are named.

    Raises:
        FuncattribError: no row is finite.
    """
    wanted = list(store.leaves) if names is None else names
    if not wanted:
        return {}
    stage = precondition()
    state = stage.init({name: _spec(store)[name] for name in wanted})[0]
    lost, start = nonfinite_rows(store), 0
    if len(store) and len(lost) == len(store):
        raise FuncattribError(f"no document in {store.path} has a finite gradient; check their loss")
    for block in store.matrix().blocks(_BLOCK_ROWS):
        finite = ~np.isin(np.arange(start, start + len(block)), lost)
        start += len(block)
        state = stage.observe(state, _some(block if finite.all() else block[torch.from_numpy(finite)], store, wanted))
    return gram_matrices(state)


def _spec(store: GradientStore) -> Spec:
    return {name: Leaf(tuple(leaf.shape), torch.float32) for name, leaf in store.leaves.items()}


def _some(block: Tensor, store: GradientStore, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the named leaves of rows (n, D)."""
    leaves = as_leaves(block, store, block.device)
    return {name: leaves[name].float() for name in names}


def _transformed(after: Transform, state: State, names: Sequence[str], store: GradientStore, block: Tensor) -> Tensor:
    """Precondition the named leaves of rows (n, D), one after the other, float32."""
    if not names:
        return block.new_empty(len(block), 0, dtype=torch.float32)
    return torch.cat([as_rows(grad) for grad in after(state, _some(block, store, names)).values()], 1)


def _lengths(squares: Tensor) -> Tensor:
    """Return divisors that give rows unit length, (n, 1), from their squared lengths (n,)."""
    return divisors(squares.sqrt().float()[:, None])
