"""Loss and hidden-state gradient of a linear language-model head, without the (tokens, vocabulary) logits.

The formulas are those of ``logit_loss``; chunks of tokens go through one buffer (``head_tokens``). Plain cross-entropy
on a CPU is an attention over the vocabulary, softmax(h Wᵀ) W, and is computed by that kernel.

Shapes: E examples, N tokens, d hidden width, V vocabulary, P rows of ``left``.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from funcattrib.kernels.fold import unfold
from funcattrib.kernels.head_gradient import bias_gradient, weight_gradient
from funcattrib.kernels.head_tokens import Operands, chunks, compute_dtype, labelled
from funcattrib.kernels.logit_loss import Head

CROSS_ENTROPY = Head()


class Reference(NamedTuple):
    """Where the distributions that ``kl`` compares with come from: hidden states (E, N, d'), W (V, d'), b (V,)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


def linear_cross_entropy(
    hidden: Float[Tensor, "E N d"],
    weight: Float[Tensor, "V d"],
    target: Int[Tensor, "E N"],
    bias: Float[Tensor, " V"] | None = None,
    token_weights: Float[Tensor, "E N"] | None = None,
    head: Head = CROSS_ENTROPY,
    reference: Reference | None = None,
) -> Float[Tensor, " E"]:
    """Sum over an example's labelled tokens of their loss, in nats; 0 where no token has a label.

    Args:
        target: the token to predict at each position, -100 where there is none.
        token_weights: multiplies each token's loss.
        reference: for ``kl``, a constant.

    Example:
        >>> h, w = torch.zeros(1, 2, 4), torch.zeros(8, 4)
        >>> loss = linear_cross_entropy(h, w, torch.tensor([[3, -100]]))
        >>> bool(torch.isclose(loss[0], torch.tensor(8.0).log()))
        True
    """
    if has_torch_function((weight, bias)):
        arguments = (hidden, weight, target, bias, token_weights, head, reference)
        return handle_torch_function(linear_cross_entropy, (weight, bias), *arguments)
    return head_loss(Operands(hidden, weight, target, bias, token_weights, *(reference or ())), None, head)[0]


def head_loss(x: Operands, left: Tensor | None, head: Head) -> tuple[Tensor, Tensor]:
    """The losses (E,), and ∂loss/∂z · leftᵀ, (E, N, P), for ``left`` (P, V); (E, N, 0) where it is None."""
    loss, _, rows = _Head.apply(*x, left, head)
    return loss, rows


class _Head(torch.autograd.Function):
    """(loss, ∂loss/∂hidden, ∂loss/∂z · leftᵀ); the last two are made in forward, from the same logits."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        *operands, left, head = inputs
        return _forward(Operands(*operands), left, head)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *operands, _, ctx.head = inputs
        _, d_hidden, rows = output
        ctx.mark_non_differentiable(d_hidden, rows)
        ctx.save_for_backward(d_hidden, *operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        d_hidden, *operands = ctx.saved_tensors
        x, wanted = Operands(*operands), dict(zip(Operands._fields, ctx.needs_input_grad, strict=False))
        gradients: dict[str, Tensor] = {"hidden": d_hidden * grad[:, None, None].to(d_hidden.dtype)}
        if wanted["weight"]:
            gradients["weight"] = weight_gradient(grad, x, ctx.head)
        if wanted["bias"]:
            gradients["bias"] = bias_gradient(grad, x, ctx.head)
        return *(gradients.get(name) for name in Operands._fields), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        *operands, left, head = inputs
        size = info.batch_size
        x = Operands(*operands).folded(Operands(*in_dims[:-2]), size)
        return tuple(unfold(out, size) for out in _Head.apply(*x, left, head)), (0, 0, 0)


def _forward(x: Operands, left: Tensor | None, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    examples, tokens, width = x.hidden.shape
    compute, count = compute_dtype(x.hidden), examples * tokens
    per_token = x.hidden.new_zeros(count, dtype=compute)
    d_hidden = x.hidden.new_zeros(count, width, dtype=compute)
    rows = x.hidden.new_zeros(count, 0 if left is None else left.shape[0], dtype=compute)
    if left is None and _as_attention(x, head):
        _by_attention(x, head.scale, per_token, d_hidden)
    else:
        w, side = x.weight.to(compute), None if left is None else left.to(compute)
        for at, losses, d_logits in chunks(x, head):
            per_token.index_copy_(0, at, losses)
            d_hidden.index_copy_(0, at, d_logits @ w)
            if side is not None:
                rows.index_copy_(0, at, d_logits @ side.T)
    shape = (examples, tokens)
    loss = per_token.reshape(shape).sum(1)
    return loss, d_hidden.reshape(*shape, width).to(x.hidden.dtype), rows.unflatten(0, shape).to(x.hidden.dtype)


def _as_attention(x: Operands, head: Head) -> bool:
    plain = head.kind == "ce" and not head.smoothing and head.softcap is None and x.bias is None
    return plain and x.hidden.device.type == "cpu"


def _by_attention(x: Operands, scale: float, per_token: Tensor, d_hidden: Tensor) -> None:
    """Queries h, keys and values W: the output is E_p[W], its log-sum-exp that of the logits. Fills the last two."""
    at = labelled(x.target, x.token_weights)
    if not len(at):
        return
    h, w = x.hidden.flatten(0, 1)[at].to(per_token.dtype), x.weight.to(per_token.dtype)
    target, vocabulary = w[x.target.reshape(-1)[at]], w[None, None]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        h[None, None], vocabulary, vocabulary, 0.0, False, scale=scale
    )
    losses, d_h = lse[0, 0].to(h.dtype) - scale * (h * target).sum(1), (out[0, 0] - target).mul_(scale)
    if x.token_weights is not None:
        factor = x.token_weights.reshape(-1)[at].to(h.dtype)
        losses, d_h = losses * factor, d_h * factor[:, None]
    per_token.index_copy_(0, at, losses)
    d_hidden.index_copy_(0, at, d_h)
