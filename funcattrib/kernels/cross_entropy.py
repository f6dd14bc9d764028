"""Loss and hidden-state gradient of a linear language-model head, without the (tokens, vocabulary) logits.

For one token with hidden state h, head W (V, d), bias b and logits z = cap(scale · (W h + b)):

    ce        ℓ = logsumexp(z) − (1 − ε) z_y − ε mean(z)        ∂ℓ/∂z = softmax(z) − (1 − ε) e_y − ε/V
    log_odds  ℓ = logsumexp_{j≠y}(z) − z_y                      ∂ℓ/∂z = softmax_{j≠y}(z) − e_y

Chunks of tokens go through one reused buffer, in float32 (float64 for float64 models) whatever the model's
dtype. Plain cross-entropy on a CPU is an attention over the vocabulary, softmax(h Wᵀ) W, and is computed by that
kernel. Tokens without a label are never computed.

Shapes: E examples, N tokens, d hidden width, V vocabulary, P rows of ``left``.
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from funcattrib.kernels.fold import fold, unfold

IGNORED = -100
Kind = Literal["ce", "log_odds"]


class Head(NamedTuple):
    """What the head does to its logits, and the loss taken of them."""

    kind: Kind = "ce"
    smoothing: float = 0.0
    scale: float = 1.0
    softcap: float | None = None


CROSS_ENTROPY = Head()


def linear_cross_entropy(
    hidden: Float[Tensor, "E N d"],
    weight: Float[Tensor, "V d"],
    target: Int[Tensor, "E N"],
    bias: Float[Tensor, " V"] | None = None,
    token_weights: Float[Tensor, "E N"] | None = None,
    head: Head = CROSS_ENTROPY,
) -> Float[Tensor, " E"]:
    """Sum over an example's labelled tokens of their loss, in nats; 0 where no token has a label.

    Args:
        target: the token to predict at each position, -100 where there is none.
        token_weights: multiplies each token's loss.

    Example:
        >>> h, w = torch.zeros(1, 2, 4), torch.zeros(8, 4)
        >>> loss = linear_cross_entropy(h, w, torch.tensor([[3, -100]]))
        >>> bool(torch.isclose(loss[0], torch.tensor(8.0).log()))
        True
    """
    if has_torch_function((weight, bias)):
        arguments = (hidden, weight, target, bias, token_weights, head)
        return handle_torch_function(linear_cross_entropy, (weight, bias), *arguments)
    return head_loss(hidden, weight, target, bias, token_weights, None, head)[0]


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    token_weights: Tensor | None,
    left: Tensor | None,
    head: Head,
) -> tuple[Tensor, Tensor]:
    """The losses (E,), and ∂loss/∂z · leftᵀ, (E, N, P), for ``left`` (P, V); (E, N, 0) where it is None."""
    loss, _, rows = _Head.apply(hidden, weight, bias, target, token_weights, left, head)
    return loss, rows


def head_weight_gradient(
    scale: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    token_weights: Tensor | None,
    head: Head,
    function: Any,
) -> Tensor:
    """``function`` of each example's gradient of W, (1, V, d), times ``scale`` (E,): formed one example at a time."""
    return _HeadWeight.apply(scale, hidden, weight, bias, target, token_weights, head, function)


class _Head(torch.autograd.Function):
    """(loss, ∂loss/∂hidden, ∂loss/∂z · leftᵀ); the last two are made in forward, from the same logits."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        token_weights: Tensor | None,
        left: Tensor | None,
        head: Head,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(hidden, weight, bias, target, token_weights, left, head)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, weight, bias, target, token_weights, _, ctx.head = inputs
        _, d_hidden, rows = output
        ctx.mark_non_differentiable(d_hidden, rows)
        ctx.save_for_backward(d_hidden, hidden, weight, bias, target, token_weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        d_hidden, hidden, weight, bias, target, token_weights = ctx.saved_tensors
        d_weight = d_bias = None
        if ctx.needs_input_grad[1]:
            operands = (grad, hidden, weight, bias, target, token_weights, ctx.head)
            d_weight = _HeadWeight.apply(*operands, _itself).sum(0)
        if ctx.needs_input_grad[2]:
            d_bias = _HeadBias.apply(grad, hidden, weight, bias, target, token_weights, ctx.head).sum(0)
        return d_hidden * grad[:, None, None].to(d_hidden.dtype), d_weight, d_bias, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *operands: Any) -> tuple[Any, Any]:
        size = info.batch_size
        folded = _fold_at((0, 3, 4), size, in_dims, operands)
        outputs = _Head.apply(*folded)
        return tuple(unfold(x, size) for x in outputs), (0, 0, 0)


class _HeadWeight(torch.autograd.Function):
    """Per-example gradients of W, each passed through ``function`` as soon as it is formed."""

    @staticmethod
    def forward(
        scale: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        token_weights: Tensor | None,
        head: Head,
        function: Any,
    ) -> Tensor:
        rows = []
        for e in range(hidden.shape[0]):
            gradient = weight.new_zeros(weight.shape)
            for at, d_logits in _logit_gradients(
                hidden[e : e + 1], weight, bias, target[e : e + 1], token_weights, e, head
            ):
                gradient.addmm_(d_logits.T.to(weight.dtype), hidden[e][at])
            rows.append(function(gradient[None] * scale[e].to(weight.dtype)))
        return torch.cat(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *operands: Any) -> tuple[Any, Any]:
        return _fold_weight_call(_HeadWeight, info, in_dims, operands)


class _HeadBias(torch.autograd.Function):
    """Per-example gradients of b, (E, V)."""

    @staticmethod
    def forward(
        scale: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        target: Tensor,
        token_weights: Tensor | None,
        head: Head,
    ) -> Tensor:
        gradient = bias.new_zeros(hidden.shape[0], bias.shape[0])
        for e in range(hidden.shape[0]):
            for _, d_logits in _logit_gradients(
                hidden[e : e + 1], weight, bias, target[e : e + 1], token_weights, e, head
            ):
                gradient[e] += d_logits.sum(0).to(bias.dtype)
        return gradient * scale[:, None].to(bias.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *operands: Any) -> tuple[Any, Any]:
        return _fold_weight_call(_HeadBias, info, in_dims, operands)


def _fold_weight_call(function: Any, info: Any, in_dims: tuple[Any, ...], operands: tuple[Any, ...]) -> tuple[Any, Any]:
    size = info.batch_size
    folded = _fold_at((0, 1, 4, 5), size, in_dims, operands)
    return unfold(function.apply(*folded), size), 0


def _fold_at(positions: tuple[int, ...], size: int, axes: tuple[Any, ...], operands: tuple[Any, ...]) -> list[Any]:
    """``fold`` for the operands with an example axis; the head itself is shared by all examples."""
    return [
        fold(x, axis, size) if i in positions else x for i, (x, axis) in enumerate(zip(operands, axes, strict=True))
    ]


def _itself(gradient: Tensor) -> Tensor:
    return gradient


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weights: Tensor | None,
    left: Tensor | None,
    head: Head,
) -> tuple[Tensor, Tensor, Tensor]:
    examples, tokens, width = hidden.shape
    at = _labelled(target, token_weights)
    compute = _compute_dtype(hidden)
    h, y = hidden.reshape(-1, width)[at].to(compute), target.reshape(-1)[at]
    factor = None if token_weights is None else token_weights.reshape(-1)[at].to(compute)
    w = weight.to(compute)
    if _as_attention(head, bias, h) and left is None:
        losses, d_h = _by_attention(h, w, y, head.scale)
        d_left = h.new_empty(len(at), 0)
        if factor is not None:
            losses, d_h = losses * factor, d_h * factor[:, None]
    else:
        losses, d_h = h.new_empty(len(at)), torch.empty_like(h)
        d_left = h.new_empty(len(at), 0 if left is None else left.shape[0])
        side = None if left is None else left.to(compute)
        for span, loss, d_logits in _chunks(h, w, None if bias is None else bias.to(compute), y, factor, head):
            losses[span] = loss
            torch.mm(d_logits, w, out=d_h[span])
            if side is not None:
                torch.mm(d_logits, side.T, out=d_left[span])
    per_token = h.new_zeros(examples * tokens).index_copy_(0, at, losses)
    d_hidden = h.new_zeros(examples * tokens, width).index_copy_(0, at, d_h)
    rows = h.new_zeros(examples * tokens, d_left.shape[1]).index_copy_(0, at, d_left)
    shape = (examples, tokens, -1)
    d_rows = rows.reshape(examples, tokens, d_left.shape[1]).to(hidden.dtype)
    return per_token.reshape(examples, tokens).sum(1), d_hidden.reshape(shape).to(hidden.dtype), d_rows


def _logit_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weights: Tensor | None,
    e: int,
    head: Head,
) -> Any:
    """(token positions, ∂loss/∂z) of one example, chunk by chunk."""
    factors = None if token_weights is None else token_weights[e : e + 1]
    at = _labelled(target, factors)
    compute = _compute_dtype(hidden)
    h, y = hidden[0][at].to(compute), target[0][at]
    factor = None if factors is None else factors[0][at].to(compute)
    for span, _, d_logits in _chunks(
        h, weight.to(compute), None if bias is None else bias.to(compute), y, factor, head
    ):
        yield at[span], d_logits


def _chunks(h: Tensor, w: Tensor, b: Tensor | None, y: Tensor, factor: Tensor | None, head: Head) -> Any:
    """(slice, losses, ∂loss/∂z) chunk by chunk; the gradient lies in a buffer that the next chunk overwrites."""
    rows = 128 if h.device.type == "cpu" else max(128, 2**28 // w.shape[0])
    buffer = h.new_empty(min(rows, len(h)), w.shape[0])
    for start in range(0, len(h), rows):
        span = slice(start, min(start + rows, len(h)))
        z = buffer[: span.stop - start]
        torch.mm(h[span], w.T, out=z)
        losses = _loss_in_place(z, y[span, None], b, head)
        if factor is not None:
            losses = losses * factor[span]
            z.mul_(factor[span, None])
        yield span, losses, z


def _loss_in_place(z: Tensor, y: Tensor, b: Tensor | None, head: Head) -> Tensor:
    """Turns raw products ``z`` into ∂loss/∂(raw product) and returns the losses."""
    if b is not None:
        z.add_(b)
    if head.scale != 1.0:
        z.mul_(head.scale)
    slope = None
    if head.softcap is not None:
        z.div_(head.softcap).tanh_()
        slope = 1 - z * z
        z.mul_(head.softcap)
    z_y = z.gather(1, y)[:, 0]
    target, mean = z_y, z.mean(1) if head.smoothing else None
    if head.kind == "log_odds":
        z.scatter_(1, y, float("-inf"))
    # log-sum-exp from the largest logit and its probability: neither can underflow
    largest = z.amax(1)
    torch.softmax(z, 1, out=z)
    lse = largest - z.amax(1).log()
    if mean is not None:
        target = (1 - head.smoothing) * z_y + head.smoothing * mean
        z.sub_(head.smoothing / z.shape[1])
    z.scatter_add_(1, y, torch.full_like(y, head.smoothing - 1.0, dtype=z.dtype))
    if slope is not None:
        z.mul_(slope)
    if head.scale != 1.0:
        z.mul_(head.scale)
    return lse - target


def _as_attention(head: Head, bias: Tensor | None, h: Tensor) -> bool:
    plain = head.kind == "ce" and not head.smoothing and head.softcap is None and bias is None
    return plain and h.device.type == "cpu" and len(h) > 0


def _by_attention(h: Tensor, w: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Queries h, keys and values W: the output is E_p[W], its log-sum-exp that of the logits."""
    vocabulary = w[None, None]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        h[None, None], vocabulary, vocabulary, 0.0, False, scale=scale
    )
    target = w[y]
    return lse[0, 0].to(h.dtype) - scale * (h * target).sum(1), (out[0, 0] - target).mul_(scale)


def _labelled(target: Tensor, token_weights: Tensor | None) -> Tensor:
    """Flat positions of the tokens that have a label and a weight."""
    flat = target.reshape(-1) != IGNORED
    if token_weights is not None:
        flat = flat & (token_weights.reshape(-1) != 0)
    return flat.nonzero()[:, 0]


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
