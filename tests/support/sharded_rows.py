"""Rows of a model in shards beside those of the same model in one process."""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

import funcattrib as fa
from funcattrib.models.identity import model_identity
from tests.support import cases

CHAINS = {
    "project": lambda: [fa.project(4)],
    "statistics": lambda: [fa.adafactor_norm, fa.project(3), fa.unit_norm],
    "influence": lambda: [fa.self_influence],
}
CELLS = [("project", None), ("project", "all"), ("statistics", None), ("influence", None)]
PROJECTED = fa.compose(fa.per_example_grad, fa.project(2))


def rows(model: nn.Module, chain: str, modules: str | None, batch: dict) -> dict[str, torch.Tensor]:
    loss, params = fa.causal_lm_loss(model, modules=modules)
    composed = fa.compose(fa.per_example_grad, *CHAINS[chain]())
    return composed(loss, params, batch, composed.fit(loss, params, [batch]))


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    return max(float((ours[name] - grad).norm() / grad.norm().clamp(min=1e-30)) for name, grad in theirs.items())


class Expected(NamedTuple):
    """What a model gives that one process holds, for the batch of a rank."""

    rows: dict[tuple[str, str | None], dict[str, torch.Tensor]]
    projected: dict[str, torch.Tensor]
    plain: dict[str, torch.Tensor]
    identity: object


@lru_cache(maxsize=1)
def expected(whole: nn.Module, rank: int) -> Expected:
    batch, (loss, params) = cases.batch((9, 5, 12), seed=rank), fa.causal_lm_loss(whole)
    return Expected(
        {(chain, modules): rows(whole, chain, modules, batch) for chain, modules in CELLS},
        PROJECTED(loss, params, batch),
        fa.per_example_grad(loss, params, batch),
        model_identity(whole, "x"),
    )


def compared(sharded: nn.Module, whole: nn.Module) -> dict[str, float]:
    """Differences by chain and parameters, each rank with a batch of its own."""
    batch = cases.batch((9, 5, 12), seed=dist.get_rank())
    wanted = expected(whole, dist.get_rank())
    found = {
        f"{chain} {modules}": difference(rows(sharded, chain, modules, batch), wanted.rows[chain, modules])
        for chain, modules in CELLS
    }
    loss, params = fa.causal_lm_loss(sharded)
    for _ in range(3):  # what is gathered ahead at the end of one is used by the next, outside of its transforms
        plain = fa.per_example_grad(loss, params, batch)
        found["alternating"] = difference(PROJECTED(loss, params, batch), wanted.projected)
    identity = model_identity(sharded, "x") == wanted.identity
    return {**found, "plain": difference(plain, wanted.plain), "identity": float(not identity)}
