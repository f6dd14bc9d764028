"""The rows of query stores, as one matrix."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcattrib.errors import FuncattribError
from funcattrib.kernels.safe_norm import divisors
from funcattrib.store import GradientStore
from funcattrib.store.nonfinite import named_rows, nonfinite_rows

log = logging.getLogger(__name__)


def as_leaves(rows: Tensor, store: GradientStore, device: torch.device) -> dict[str, Tensor]:
    """Convert rows (K, D) to leaves as ``inner_products`` takes them: leaf → (K, *shape)."""
    return {
        name: rows[:, leaf.start : leaf.stop].reshape(len(rows), *leaf.shape).to(device)
        for name, leaf in store.leaves.items()
    }


def check_finite(queries: GradientStore) -> None:
    """Refuse queries that are not finite.

    Raises:
        FuncattribError: naming the first of them.
    """
    if len(bad := nonfinite_rows(queries)):
        raise FuncattribError(
            f"the queries in {queries.path} are NaN or infinite; check their loss ({named_rows(queries, bad)})"
        )


def query_rows(stores: Sequence[GradientStore], unit_norm: bool) -> tuple[Tensor, list[dict[str, Any]]]:
    """Return every query, (K, D) float32, and the metadata of each.

    Raises:
        FuncattribError: a query that is not finite.
    """
    rows, metadata = [], []
    for store in stores:
        check_finite(store)
        matrix = store.matrix().tensor(0, len(store)).float()
        norms = torch.linalg.vector_norm(matrix, dim=1, keepdim=True)
        if zero := (norms[:, 0] == 0).nonzero().flatten().tolist():
            log.warning("the gradients of queries %s in %s are zero, and so are their scores", zero[:5], store.path)
        rows.append(matrix / divisors(norms) if unit_norm else matrix)
        metadata += [dict(entry) for entry in store.examples]
    return torch.cat(rows), metadata
