"""Rule for ``F.embedding``: G_W = Σ_n e_{id_n} gᵀ_n. The (V, d) gradient is not formed: a one-hot factor is its ids."""

from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from funcattrib.errors import ChainError
from funcattrib.lift.factors import OneHot
from funcattrib.lift.lifted import Rule
from funcattrib.lift.maps.base import GradientMap
from funcattrib.lift.rules.linear import read_cols
from funcattrib.lift.tap import tap


def _embedding(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    options = dict(
        zip(("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"), args, strict=False)
    )
    options |= kwargs
    ids, leaf = options.pop("input"), options.pop("weight")
    if options.get("max_norm") is not None or options.get("scale_grad_by_freq"):
        return NotImplemented
    y = F.embedding(ids, leaf.weight, options.get("padding_idx"))
    examples, size = leaf.theta.shape[0], leaf.weight.shape[0]
    _check(ids, leaf)
    index = ids.reshape(examples, -1)
    counted = None
    if (padding := options.get("padding_idx")) is not None:  # torch gives the padding row no gradient
        counted = (index != padding % size).to(leaf.weight.dtype)
    rows = leaf.map.reduce_rows(OneHot(index, size, counted))
    if isinstance(rows, Tensor):
        return tap(y, leaf.theta, partial(read_cols, leaf.map, examples), rows)
    return tap(y, leaf.theta, partial(_read_onehot, leaf.map, examples, size), rows.ids, rows.weight)


def _check(ids: Tensor, leaf: Any) -> None:
    """Refuse ids that no example owns (positions, common to all) where there is one probe an example."""
    examples = leaf.theta.shape[0]
    flattened = leaf.tokens is not None and ids.numel() == examples * leaf.tokens
    if examples > 1 and not flattened and (ids.ndim < 2 or ids.shape[0] != examples):
        raise ChainError(
            f"expected ids of {examples} examples for an attributed embedding, found shape {tuple(ids.shape)}: they "
            "are common to the batch; leave this parameter out, or collect with per_example_grad"
        )


def _read_onehot(
    gradient_map: GradientMap, examples: int, size: int, g: Tensor, index: Tensor, weight: Tensor | None
) -> Tensor:
    return gradient_map.from_factors(
        OneHot(index, size, weight), gradient_map.reduce_cols(g.reshape(examples, -1, g.shape[-1]))
    )


RULES: dict[Any, Rule] = {F.embedding: _embedding}
