"""Scores against fixed queries, as the last step of a chain: what a corpus is scored with as it streams by.

    inner_products  g ↦ (⟨Q_1, g⟩, …, ⟨Q_K, g⟩)                  over all leaves together, or leaf by leaf
    … unit_norm     g ↦ (⟨Q_1, g⟩, …, ⟨Q_K, g⟩) / ‖g‖            ‖g‖ over all leaves; 0 for a zero gradient
    self_influence  g ↦ ⟨g, g⟩
    max_score       s ↦ max_k s_k                                of each leaf's scores

The first is linear, and the others add up over leaves but for one division at the end, so each is read leaf by leaf in
the backward pass: no example's gradients are ever held together.

Reference: influence by inner products of gradients, arXiv 2002.08484; in one streaming pass, LoGra, arXiv 2405.13954.
"""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from funcattrib.chain.transform import State, Transform
from funcattrib.errors import ChainError
from funcattrib.kernels.safe_norm import float32_at_least
from funcattrib.lift import InnerProducts, Readout, Readouts, readout
from funcattrib.types import Grads, Leaf, Spec

SCORES = "scores"
"""The leaf of scores that are over all leaves together."""


def inner_products(
    queries: Mapping[str, Tensor], unit_norm: bool = False, by: Literal["example", "leaf"] = "example"
) -> Transform:
    """Compute inner products with K query gradients.

    Args:
        queries: name → (K, *shape), the leaves that arrive here. They are part of the state, not of the settings.
        unit_norm: divide by the norm of the incoming gradient, all leaves together. Queries are taken as they are.
        by: ``example`` gives one leaf ``scores`` (K,), float32; ``leaf`` each leaf's part (K,), which add up to it.

    Raises:
        ChainError: leaves that are missing, too many, or of another shape.

    Example:
        >>> stage = inner_products({"w": torch.tensor([[1.0, 0.0], [1.0, 1.0]])})
        >>> state, _ = stage.init({"w": Leaf((2,), torch.float32)})
        >>> stage(state, {"w": torch.tensor([[3.0, 4.0]])})["scores"]
        tensor([[3., 7.]])
    """
    if by not in ("example", "leaf"):
        raise ChainError(f"expected scores by example or leaf, found {by!r}")
    made = Transform(
        "inner_products", settings={"by": by, "unit_norm": unit_norm}, init=partial(_init, dict(queries), by=by)
    )
    if unit_norm:
        return made._replace(maps=_with_norm, apply=partial(_divide, by=by))
    return made._replace(maps=partial(_maps, by=by))


def self_influence() -> Transform:
    """Compute the squared norm of each example's gradient, all leaves together: its influence on itself.

    Example:
        >>> stage = self_influence()
        >>> stage(None, {"a": torch.tensor([[3.0]]), "b": torch.tensor([[4.0]])})["scores"]
        tensor([[25.]])
    """
    return Transform("self_influence", init=_init_self, maps=_squares, apply=_sum_squares)


def max_score() -> Transform:
    """Take the largest of each leaf's scores: the score against the nearest query.

    Example:
        >>> max_score()(None, {"scores": torch.tensor([[3.0, 7.0]])})["scores"]
        tensor([[7.]])
    """
    return Transform("max_score", init=_init_nearest, apply=_largest)


def _init(queries: Mapping[str, Tensor], spec: Spec, by: str) -> tuple[State, Spec]:
    if missing := [name for name in spec if name not in queries]:
        raise ChainError(f"has no query gradient for {missing[0]}, one of {len(spec)} leaves")
    if extra := [name for name in queries if name not in spec]:
        raise ChainError(f"has a query gradient for {extra[0]}, which is none of the {len(spec)} leaves that arrive")
    for name, leaf in spec.items():
        if tuple(queries[name].shape[1:]) != leaf.shape:
            raise ChainError(
                f"expected queries of {name} of shape {leaf.shape}, found {tuple(queries[name].shape[1:])}"
            )
    counts = {len(query) for query in queries.values()}
    if len(counts) != 1:
        raise ChainError(f"expected equally many queries for every leaf, found {sorted(counts)}")
    leaf = Leaf((counts.pop(),), _dtype(spec))
    return {"queries": {name: queries[name] for name in spec}}, {SCORES: leaf} if by == "example" else dict.fromkeys(
        spec, leaf
    )


def _maps(state: State, spec: Spec, by: str) -> Readouts:
    products = {name: InnerProducts(state["queries"][name]) for name in spec}
    if by == "leaf":
        return {name: readout(name, gradient_map) for name, gradient_map in products.items()}
    return {name: Readout(gradient_map, SCORES, (SCORES,)) for name, gradient_map in products.items()}


def _with_norm(state: State, spec: Spec) -> Readouts:
    return {name: readout(name, InnerProducts(state["queries"][name], norm=True)) for name in spec}


def _divide(state: State, products: Grads, by: str) -> Grads:
    wide = {name: float32_at_least(part) for name, part in products.items()}
    norm = torch.stack([part[:, -1] for part in wide.values()]).sum(0).sqrt()[:, None]
    inverse = torch.where(norm > 0, 1 / norm, torch.where(norm.isnan(), norm, 0.0))
    parts = {name: part[:, :-1] * inverse for name, part in wide.items()}
    return parts if by == "leaf" else {SCORES: torch.stack(list(parts.values())).sum(0)}


def _init_self(spec: Spec) -> tuple[State, Spec]:
    return None, {SCORES: Leaf((1,), _dtype(spec))}


def _squares(state: State, spec: Spec) -> Readouts:
    return {name: readout(name, InnerProducts(torch.zeros(0, *leaf.shape), norm=True)) for name, leaf in spec.items()}


def _sum_squares(state: State, squares: Grads) -> Grads:
    return {SCORES: torch.stack([float32_at_least(part) for part in squares.values()]).sum(0)}


def _init_nearest(spec: Spec) -> tuple[State, Spec]:
    if wrong := [name for name, leaf in spec.items() if len(leaf.shape) != 1]:
        raise ChainError(
            f"requires scores of shape (queries,), as inner_products returns them, and {wrong[0]} has another shape"
        )
    return None, {name: leaf._replace(shape=(1,)) for name, leaf in spec.items()}


def _largest(state: State, scores: Grads) -> Grads:
    return {name: score.amax(1, keepdim=True) for name, score in scores.items()}


def _dtype(spec: Spec) -> torch.dtype:
    """Return the scores' dtype, at least float32: the sum is over all leaves."""
    dtype = torch.float32
    for leaf in spec.values():
        dtype = torch.promote_types(dtype, leaf.dtype)
    return dtype
