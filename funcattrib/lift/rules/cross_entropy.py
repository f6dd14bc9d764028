"""Rule for the fused head: G_W = Σ_n (∂ℓ/∂z)_n hᵀ_n, with the logit gradients projected chunk by chunk.

Where the left side is a matrix, (∂ℓ/∂z) Lᵀ comes out of the same pass that makes the loss. Otherwise (identity, a
diagonal, a statistic) one example's (V, d) gradient at a time is formed and read; token by token, ∂ℓ/∂z is kept whole;
for a function of the gradient's entries, which must know its scale, every example's (V, d).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from funcattrib.kernels.head_gradient import bias_gradients
from funcattrib.kernels.head_tokens import Operands
from funcattrib.kernels.linear_cross_entropy import head_loss, head_loss_forming, linear_cross_entropy
from funcattrib.kernels.logit_loss import Head
from funcattrib.lift.lifted import Lifted, Rule, plain
from funcattrib.lift.maps.base import GradientMap
from funcattrib.lift.rules.linear import by_example
from funcattrib.lift.tap import tap
from funcattrib.weights.stored import dense


def _head(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    hidden, weight, target, bias, token_weights, head, reference = args
    x = Operands(hidden, dense(plain(weight)), target, dense(plain(bias)), token_weights, *(reference or ()))
    loss = _tap_weight(x, weight, head) if isinstance(weight, Lifted) else head_loss(x, None, head)[0]
    return _tap_bias(loss, x, bias, head) if isinstance(bias, Lifted) else loss


def _tap_weight(x: Operands, weight: Lifted, head: Head) -> Tensor:
    gradient_map = weight.map
    left = gradient_map.row_side
    if gradient_map.by_token and (left is None or left.ndim == 1):
        loss, rows = head_loss(x, _whole(x), head)
        kept_whole: Any = gradient_map.reduce_cols(by_example(x.hidden, weight))
        return tap(loss, weight.theta, partial(_read_whole, gradient_map, weight.theta.shape[0]), rows, kept_whole)
    if left is not None and left.ndim == 2:
        loss, rows = head_loss(x, left, head)
        kept: Any = gradient_map.reduce_cols(by_example(x.hidden, weight))
        return tap(loss, weight.theta, partial(_read, gradient_map, weight.theta.shape[0]), rows, kept)
    if not gradient_map.homogeneous:
        loss, whole = head_loss_forming(x, head, _as_it_is)
        return tap(loss, weight.theta, partial(_read_scaled, gradient_map), whole)
    loss, formed = head_loss_forming(x, head, gradient_map.from_gradient)
    return tap(loss, weight.theta, partial(_read_formed, gradient_map), formed)


def _tap_bias(loss: Tensor, x: Operands, bias: Lifted, head: Head) -> Tensor:
    """Tap the loss for the bias: G_b = Σ_n (∂ℓ/∂z)_n."""
    if bias.map.by_token:
        rows = head_loss(x, _whole(x), head)[1]
        return tap(loss, bias.theta, partial(_read_whole, bias.map, bias.theta.shape[0]), rows, None)
    return tap(loss, bias.theta, partial(_read_bias, bias.map, head), *x)


def _whole(x: Operands) -> Tensor:
    """Return a left side that keeps the gradients of the logits as they are."""
    return torch.eye(x.weight.shape[0], dtype=x.weight.dtype, device=x.weight.device)


def _read_whole(gradient_map: GradientMap, examples: int, g: Tensor, rows: Tensor, cols: Tensor | None) -> Tensor:
    scaled: Any = gradient_map.reduce_rows(
        (rows * g[:, None, None].to(rows.dtype)).reshape(examples, -1, rows.shape[-1])
    )
    return gradient_map.from_factors(scaled, cols)


def _read(gradient_map: GradientMap, examples: int, g: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    scaled = rows * g[:, None, None].to(rows.dtype)
    return gradient_map.from_factors(scaled.reshape(examples, -1, rows.shape[-1]), cols)


def _as_it_is(gradient: Tensor) -> Tensor:
    return gradient


def _read_scaled(gradient_map: GradientMap, g: Tensor, whole: Tensor) -> Tensor:
    return gradient_map.from_gradient(whole * g[:, None, None].to(whole.dtype))


def _read_formed(gradient_map: GradientMap, g: Tensor, formed: Tensor) -> Tensor:
    return gradient_map.rescale(formed, g)


def _read_bias(gradient_map: GradientMap, head: Head, g: Tensor, *operands: Any) -> Tensor:
    return gradient_map.from_gradient(bias_gradients(g, Operands(*operands), head))


RULES: dict[Any, Rule] = {linear_cross_entropy: _head}
