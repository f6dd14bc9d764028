"""Rule for the fused head: G_W = Σ_n (∂ℓ/∂z)_n hᵀ_n, with the logit gradients projected chunk by chunk.

Where the left side is a matrix, (∂ℓ/∂z) Lᵀ comes out of the same pass that makes the loss. Otherwise (identity, a
diagonal, a statistic) one example's (V, d) gradient at a time is formed and read.
"""

from functools import partial
from typing import Any

from torch import Tensor

from funcattrib.kernels.cross_entropy import Head, head_loss, head_weight_gradient, linear_cross_entropy
from funcattrib.lift.coordinates import Reading, TwoSided
from funcattrib.lift.ops.linear import by_example
from funcattrib.lift.parameter import Lifted, Rule, plain
from funcattrib.lift.tap import tap


def _head(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    hidden, weight, target, bias, token_weights, head = args
    dense_bias = bias.dense("the head's bias") if isinstance(bias, Lifted) else bias
    if not isinstance(weight, Lifted):
        return linear_cross_entropy(hidden, weight, target, dense_bias, token_weights, head)
    reading = weight.reading
    left = reading.left if isinstance(reading, TwoSided) else None
    if left is not None and left.ndim == 2:
        loss, rows = head_loss(hidden, plain(weight), target, dense_bias, token_weights, left, head)
        kept: Any = reading.keep_cols(by_example(hidden, weight))
        return tap(loss, weight.theta, partial(_read, reading, weight.theta.shape[0]), rows, kept)
    loss, _ = head_loss(hidden, plain(weight), target, dense_bias, token_weights, None, head)
    formed = partial(_read_formed, reading, head)
    return tap(loss, weight.theta, formed, hidden, plain(weight), target, dense_bias, token_weights)


def _read(reading: Reading, examples: int, g: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    scaled = rows * g[:, None, None].to(rows.dtype)
    return reading.read(scaled.reshape(examples, -1, rows.shape[-1]), cols)


def _read_formed(
    reading: Reading,
    head: Head,
    g: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    token_weights: Tensor | None,
) -> Tensor:
    return head_weight_gradient(g, hidden, weight, target, bias, token_weights, head, reading.of_gradient)


RULES: dict[Any, Rule] = {linear_cross_entropy: _head}
