"""Loss and hidden-state gradient of a linear language-model head, without the (tokens, vocabulary) logits.

The formulas are those of ``logit_loss``; chunks of tokens go through one buffer (``head_tokens``), or where it serves
through an attention over the vocabulary (``head_attention``).

Shapes: E examples, N tokens, d hidden width, V vocabulary, P rows of ``left``.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from funcattrib.kernels.fold import unfold
from funcattrib.kernels.head_attention import by_attention, by_logits, serves
from funcattrib.kernels.head_gradient import Function, bias_gradient, form, weight_gradient
from funcattrib.kernels.head_tokens import Operands, compute_dtype, labelled
from funcattrib.kernels.logit_loss import Head

CROSS_ENTROPY = Head()


class Reference(NamedTuple):
    """Source of the distributions that ``kl`` compares with: hidden states (E, N, d'), W (V, d'), b (V,)."""

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
    """Compute the losses (E,), and ∂loss/∂z · leftᵀ, (E, N, P), for ``left`` (P, V); (E, N, 0) where it is None."""
    loss, _, rows, _ = _Head.apply(*x, left, head, None)
    return loss, rows


def head_loss_forming(x: Operands, head: Head, function: Function) -> tuple[Tensor, Tensor]:
    """Compute the losses (E,), and ``function`` of each example's G_W (1, V, d), (E, …), formed one at a time."""
    loss, _, _, formed = _Head.apply(*x, None, head, function)
    return loss, formed


class _Head(torch.autograd.Function):
    """(loss, ∂loss/∂hidden, ∂loss/∂z · leftᵀ, function of G_W); all made in forward, from the same logits."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        *operands, left, head, function = inputs
        return _forward(Operands(*operands), left, head, function)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *operands, _, ctx.head, _ = inputs
        _, d_hidden, rows, formed = output
        ctx.mark_non_differentiable(d_hidden, rows, formed)
        x = Operands(*ctx.needs_input_grad[: len(operands)])
        # Frozen weights are not kept for backward: one that is made for its use is dropped after it.
        ctx.save_for_backward(d_hidden, *(operands if x.weight or x.bias else [None] * len(operands)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        d_hidden, *operands = ctx.saved_tensors
        x, wanted = Operands(*operands), dict(zip(Operands._fields, ctx.needs_input_grad, strict=False))
        gradients: dict[str, Tensor] = {"hidden": d_hidden * grad[:, None, None].to(d_hidden.dtype)}
        if wanted["weight"]:
            gradients["weight"] = weight_gradient(grad, x, ctx.head)
        if wanted["bias"]:
            gradients["bias"] = bias_gradient(grad, x, ctx.head)
        return *(gradients.get(name) for name in Operands._fields), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        *operands, left, head, function = inputs
        size = info.batch_size
        x = Operands(*operands).folded(Operands(*in_dims[:-3]), size)
        return tuple(unfold(out, size) for out in _Head.apply(*x, left, head, function)), (0, 0, 0, 0)


def _forward(x: Operands, left: Tensor | None, head: Head, function: Function | None) -> tuple[Tensor, ...]:
    examples, tokens, width = x.hidden.shape
    compute, count = compute_dtype(x.hidden), examples * tokens
    per_token = x.hidden.new_zeros(count, dtype=compute)
    d_hidden = x.hidden.new_zeros(count, width, dtype=compute)
    rows = x.hidden.new_zeros(count, 0 if left is None else left.shape[0], dtype=compute)
    formed = x.hidden.new_zeros(examples, 0)
    if function is not None:
        formed = form(x, head, function, per_token, d_hidden)
    elif serves(x, head):
        by_attention(x, left, head, per_token, d_hidden, rows)
    else:
        by_logits(x, labelled(x.target, x.token_weights), left, head, per_token, d_hidden, rows)
    shape = (examples, tokens)
    loss = per_token.reshape(shape).sum(1)
    d_hidden = d_hidden.reshape(*shape, width).to(x.hidden.dtype)
    return loss, d_hidden, rows.unflatten(0, shape).to(x.hidden.dtype), formed
