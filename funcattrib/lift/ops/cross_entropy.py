"""Rule for the fused head: G_W = Σ_n (∂ℓ/∂z)_n hᵀ_n, with the logit gradients projected chunk by chunk.

Where the left side is a matrix, (∂ℓ/∂z) Lᵀ comes out of the same pass that makes the loss. Otherwise (identity, a
diagonal, a statistic) one example's (V, d) gradient at a time is formed and read; token by token, ∂ℓ/∂z is kept whole.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from funcattrib.kernels.cross_entropy import head_loss, linear_cross_entropy
from funcattrib.kernels.head_gradient import read_weight_gradients
from funcattrib.kernels.head_tokens import Operands
from funcattrib.kernels.logit_loss import Head
from funcattrib.lift.coordinates import Reading, Then, TwoSided
from funcattrib.lift.factors import Side
from funcattrib.lift.ops.linear import by_example
from funcattrib.lift.parameter import Lifted, Rule, plain
from funcattrib.lift.per_token import PerToken
from funcattrib.lift.tap import tap


def _head(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    hidden, weight, target, bias, token_weights, head, reference = args
    dense_bias = bias.dense("the head's bias") if isinstance(bias, Lifted) else bias
    if not isinstance(weight, Lifted):
        return linear_cross_entropy(hidden, weight, target, dense_bias, token_weights, head, reference)
    x = Operands(hidden, plain(weight), target, dense_bias, token_weights, *(reference or ()))
    reading = weight.reading
    left = _left(reading)
    if isinstance(reading, PerToken) and (left is None or left.ndim == 1):
        whole = torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)
        loss, rows = head_loss(x, whole, head)
        kept_whole: Any = reading.keep_cols(by_example(hidden, weight))
        return tap(loss, weight.theta, partial(_read_whole, reading, weight.theta.shape[0]), rows, kept_whole)
    if left is not None and left.ndim == 2:
        loss, rows = head_loss(x, left, head)
        kept: Any = reading.keep_cols(by_example(hidden, weight))
        return tap(loss, weight.theta, partial(_read, reading, weight.theta.shape[0]), rows, kept)
    loss, _ = head_loss(x, None, head)
    return tap(loss, weight.theta, partial(_read_formed, reading, head), *x)


def _left(reading: Reading) -> Side:
    """The left side that rows are given first."""
    if isinstance(reading, PerToken):
        return _left(reading.inner)
    if isinstance(reading, Then):
        return _left(reading.first)
    return reading.left if isinstance(reading, TwoSided) else None


def _read_whole(reading: Reading, examples: int, g: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    scaled: Any = reading.keep_rows((rows * g[:, None, None].to(rows.dtype)).reshape(examples, -1, rows.shape[-1]))
    return reading.read(scaled, cols)


def _read(reading: Reading, examples: int, g: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    scaled = rows * g[:, None, None].to(rows.dtype)
    return reading.read(scaled.reshape(examples, -1, rows.shape[-1]), cols)


def _read_formed(reading: Reading, head: Head, g: Tensor, *operands: Any) -> Tensor:
    return read_weight_gradients(g, Operands(*operands), head, reading.of_gradient)


RULES: dict[Any, Rule] = {linear_cross_entropy: _head}
