"""Scaled dot-product attention under ``vmap(grad(...))``.

PyTorch's attention kernels have no batching rule on CPU (a slow loop and a warning) and their backward has
none anywhere. Here the vmapped axis is folded into the batch axis before the kernel is called, forward and
backward.

Shapes: E examples, H query heads, G key/value heads (H a multiple of G), T queries, S keys, D head width.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from funcattrib.kernels.fold import fold, unfold
from funcattrib.kernels.safe_norm import float32_at_least


def attention(
    query: Float[Tensor, "E H T D"],
    key: Float[Tensor, "E G S D"],
    value: Float[Tensor, "E G S D"],
    mask: Bool[Tensor, "E #H T S"] | Float[Tensor, "E #H T S"] | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
) -> Float[Tensor, "E H T D"]:
    """Compute softmax(scale · Q Kᵀ + mask) V, per example and head.

    Args:
        mask: True where a key is seen, or a float added to the logits. Not together with ``causal``.
        scale: 1/√D when not given.

    Example:
        >>> q = k = v = torch.ones(1, 2, 3, 4)
        >>> attention(q, k, v, causal=True).shape
        torch.Size([1, 2, 3, 4])
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # The fused kernels want one head width, and give no gradient to a float mask, which may depend on parameters.
    if value.shape[-1] != query.shape[-1] or (mask is not None and mask.is_floating_point()):
        return attention_formula(query, key, value, mask, scale, causal)
    out, _ = _Attention.apply(query, key, value, mask, scale, causal)
    return out


class _Attention(torch.autograd.Function):
    """Attention, and the log-sum-exp of the logits for backward (an empty tensor where it is not kept)."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        groups = query.shape[1] // key.shape[1]
        if query.device.type == "cpu":
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query,
                _repeat(key, groups),
                _repeat(value, groups),
                0.0,
                causal,
                attn_mask=_bias(mask, query),
                scale=scale,
            )
        return _native(query, key, value, mask, scale, causal), query.new_empty(query.shape[0], 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, mask, ctx.scale, ctx.causal = inputs
        ctx.save_for_backward(query, key, value, mask, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *_AttentionBackward.apply(grad, *ctx.saved_tensors, ctx.scale, ctx.causal), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *operands: Any) -> tuple[Any, Any]:
        size = info.batch_size
        tensors = _fold_operands(operands[:4], in_dims[:4], size, mask_at=3)
        out, lse = _Attention.apply(*tensors, *operands[4:])
        return (unfold(out, size), unfold(lse, size)), (0, 0)


class _AttentionBackward(torch.autograd.Function):
    """d(query), d(key), d(value); not differentiated again."""

    @staticmethod
    def forward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        out: Tensor,
        lse: Tensor,
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups = query.shape[1] // key.shape[1]
        if query.device.type == "cpu":
            d_query, d_key, d_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad,
                query,
                _repeat(key, groups),
                _repeat(value, groups),
                out,
                lse,
                0.0,
                causal,
                attn_mask=_bias(mask, query),
                scale=scale,
            )
            return d_query, _regroup(d_key, groups), _regroup(d_value, groups)
        # The other devices' kernels differ in what they save; running the forward again serves them all.
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (query, key, value)]
            again = _native(leaves[0], leaves[1], leaves[2], mask, scale, causal)
            return torch.autograd.grad(again, leaves, grad)  # type: ignore[return-value]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *operands: Any) -> tuple[Any, Any]:
        size = info.batch_size
        tensors = _fold_operands(operands[:7], in_dims[:7], size, mask_at=4)
        grads = _AttentionBackward.apply(*tensors, *operands[7:])
        return tuple(unfold(g, size) for g in grads), (0, 0, 0)


def _fold_operands(tensors: Any, axes: Any, size: int, mask_at: int) -> list[Tensor | None]:
    """Apply ``fold`` to all; a mask that no example owns stays (1, …) and broadcasts instead of being copied."""
    shared = (
        {mask_at} if axes[mask_at] is None and tensors[mask_at] is not None and tensors[mask_at].shape[0] == 1 else ()
    )
    return [t if i in shared else fold(t, axis, size) for i, (t, axis) in enumerate(zip(tensors, axes, strict=True))]


def _native(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=groups > 1
    )


def attention_formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute the plain formula, for what the fused kernels cannot serve; every step has a batching rule."""
    groups = query.shape[1] // key.shape[1]
    logits = query @ _repeat(key, groups).transpose(-1, -2) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if position_bias is not None:
        logits = logits + position_bias
    if causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    logits = float32_at_least(logits)
    if sinks is not None:  # one more logit a head, that takes probability and has no value
        extra = sinks.reshape(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        weights = torch.softmax(torch.cat([logits, extra.to(logits.dtype)], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(logits, -1)
    weights = F.dropout(weights.to(value.dtype), dropout, training=dropout > 0)
    return weights @ _repeat(value, groups)


def _repeat(heads: Tensor, groups: int) -> Tensor:
    """Repeat heads, (E, G, S, D) → (E, G·groups, S, D)."""
    return heads if groups == 1 else heads.repeat_interleave(groups, dim=1)


def _regroup(grad: Tensor, groups: int) -> Tensor:
    """Sum the gradients of the query heads that share a key/value head: the adjoint of ``_repeat``."""
    return grad if groups == 1 else grad.unflatten(1, (-1, groups)).sum(2)


def _bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Convert a mask to the bias that the CPU kernel adds: booleans become 0 and −∞."""
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.to(query.dtype)
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, float("-inf"))
