"""Rules for matrix products: ``F.linear``, W (out, in), and ``torch.addmm``, W (in, out), which HF ``Conv1D`` uses.

y = x Wᵀ + b        G_W = Σ_n g_n xᵀ_n        G_b = Σ_n g_n
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from funcattrib.errors import ChainError
from funcattrib.lift.factors import alike
from funcattrib.lift.lifted import Lifted, Rule, plain
from funcattrib.lift.maps.base import GradientMap
from funcattrib.lift.maps.per_token import summed
from funcattrib.lift.rules.frozen_linear import frozen_linear
from funcattrib.lift.tap import tap
from funcattrib.weights.stored import bind_arguments


def _linear(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, bias = bind_arguments(("input", "weight", "bias"), args, kwargs)
    if isinstance(x, Lifted):
        return NotImplemented
    if _frozen(weight):
        by_example(x, weight)
        y = frozen_linear(x, weight.weight, plain(bias), weight.theta, weight.map, False)
        return tap_bias(y, bias)
    y = F.linear(x, plain(weight), plain(bias))
    if isinstance(weight, Lifted):
        kept: Any = weight.map.reduce_cols(by_example(x.detach(), weight))  # no graph of what only the probe reads
        y = tap(y, weight.theta, partial(_read_rows, weight.map, weight.theta.shape[0]), kept)
    return tap_bias(y, bias)


def _addmm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    bias, x, weight = bind_arguments(("input", "mat1", "mat2"), args, kwargs)
    if isinstance(x, Lifted) or kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
        return NotImplemented
    if _frozen(weight):
        by_example(x, weight)
        y = frozen_linear(x, weight.weight, plain(bias), weight.theta, weight.map, True)
        return tap_bias(y, bias)
    y = torch.addmm(plain(bias), x, plain(weight))
    if isinstance(weight, Lifted):
        flat = by_example(x.detach(), weight)  # HF Conv1D flattens examples in their order
        kept: Any = weight.map.reduce_rows(flat)
        y = tap(y, weight.theta, partial(read_cols, weight.map, weight.theta.shape[0]), kept)
    return tap_bias(y, bias)


def _frozen(weight: Any) -> bool:
    """Return whether a weight is lifted and not trained, so that its own gradient is not needed."""
    return isinstance(weight, Lifted) and not weight.weight.requires_grad


def tap_bias(y: Tensor, bias: Any) -> Tensor:
    """Tap ``y`` for a bias that was added along its last axis."""
    if not isinstance(bias, Lifted):
        return y
    return tap(y, bias.theta, partial(_read_bias, bias.map, bias.theta.shape[0]))


def by_example(x: Tensor, leaf: Lifted) -> Tensor:
    """Reshape (…, i) to (E, N, i).

    Raises:
        ChainError: one probe an example, and no axis of ``x`` that counts examples (gathered tokens).
    """
    examples = leaf.theta.shape[0]
    flattened = x.ndim == 2 and leaf.tokens is not None and x.shape[0] == examples * leaf.tokens
    if examples > 1 and x.shape[0] != examples and not flattened:
        raise ChainError(
            f"expected an input of {examples} examples for an attributed parameter, found shape {tuple(x.shape)}: the "
            "model gathers tokens across examples; leave this parameter out, or collect with per_example_grad"
        )
    return x.reshape(examples, -1, x.shape[-1])


def _matmul(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute W @ x with x (…, in, tokens), as Mamba writes it."""
    weight, x = args[:2]
    if not isinstance(weight, Lifted) or not isinstance(x, Tensor) or isinstance(x, Lifted) or x.ndim < 3:
        return NotImplemented
    return _linear((x.mT, weight), {}).mT if weight.ndim == 2 else NotImplemented


def _read_rows(gradient_map: GradientMap, examples: int, g: Tensor, cols: Tensor) -> Tensor:
    rows = gradient_map.reduce_rows(g.reshape(examples, -1, g.shape[-1]))
    return gradient_map.from_factors(*alike(rows, cols))


def read_cols(gradient_map: GradientMap, examples: int, g: Tensor, rows: Tensor) -> Tensor:
    """Return coordinates of the reduced row factor and of g, the column factor."""
    cols = gradient_map.reduce_cols(g.reshape(examples, -1, g.shape[-1]))
    return gradient_map.from_factors(*alike(rows, cols))


def _read_bias(gradient_map: GradientMap, examples: int, g: Tensor) -> Tensor:
    return gradient_map.from_factors(
        gradient_map.reduce_rows(summed(gradient_map, g.reshape(examples, -1, g.shape[-1]))), None
    )


RULES: dict[Any, Rule] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
}
