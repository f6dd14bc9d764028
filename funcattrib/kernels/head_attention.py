"""The head's loss as an attention over the vocabulary: queries h, keys W, values W (and ``left`` beside it), on a CPU.

    E_p[W] = softmax(h Wᵀ) W        lse = logsumexp(h Wᵀ)

    ce        ℓ = lse − z_y                          ∂ℓ/∂h = E_p[W] − W_y
    log_odds  ℓ = lse + log(1 − p_y) − z_y           ∂ℓ/∂h = (E_p[W] − p_y W_y) / (1 − p_y) − W_y

The flash kernel never writes the logits to memory. Where p_y is near 1 the second form loses digits: such tokens go
through the logits, and so does everything where a first few tokens show that most are like that.

Shapes: E examples, N tokens, d hidden width, V vocabulary, P rows of ``left``.
"""

import torch
from torch import Tensor

from funcattrib.kernels.head_tokens import Operands, chunks, labelled
from funcattrib.kernels.logit_loss import Head

_SURE = 0.9
"""Bound of p_y: beyond it, log-odds are computed from the logits."""
_FIRST = 128
"""Labelled tokens by which it is judged how many are like that."""


def serves(x: Operands, head: Head) -> bool:
    """Return whether the kernel computes this loss."""
    plain = head.kind in ("ce", "log_odds") and not head.smoothing and head.softcap is None and x.bias is None
    return plain and x.hidden.device.type == "cpu"


def by_attention(
    x: Operands, left: Tensor | None, head: Head, per_token: Tensor, d_hidden: Tensor, rows: Tensor
) -> None:
    """Fill losses (E·N,), ∂loss/∂hidden (E·N, d) and ∂loss/∂z · leftᵀ (E·N, P), where a token has a label."""
    at = labelled(x.target, x.token_weights)
    if head.kind == "log_odds":
        losses = by_logits(x, at[:_FIRST], left, head, per_token, d_hidden, rows)
        at = at[_FIRST:]
        if float((losses < _log_odds(_SURE)).float().mean() if len(losses) else 0.0) > 0.5:
            by_logits(x, at, left, head, per_token, d_hidden, rows)
            return
    if not len(at):
        return
    width, dtype = x.hidden.shape[-1], per_token.dtype
    h, w = x.hidden.flatten(0, 1)[at].to(dtype), x.weight.to(dtype)
    y = x.target.reshape(-1)[at]
    values = w if left is None else torch.cat([w, left.T.to(dtype)], 1)
    padding = values.shape[1] - width
    keys, queries = (torch.nn.functional.pad(t, (0, padding)) if padding else t for t in (w, h))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries[None, None], keys[None, None], values[None, None], 0.0, False, scale=head.scale
    )
    mean, lse, of_target = out[0, 0], lse[0, 0].to(dtype), values[y]
    z_y = head.scale * (h * of_target[:, :width]).sum(1)
    losses = lse - z_y
    if head.kind == "log_odds":
        p = torch.exp(-losses)
        sure = p > _SURE
        q = torch.where(sure, 0.0, p)[:, None]
        mean = (mean - q * of_target) / (1 - q)
        losses = losses + torch.log1p(-q[:, 0])
    factor = torch.ones_like(losses) if x.token_weights is None else x.token_weights.reshape(-1)[at].to(dtype)
    change = (mean - of_target).mul_(head.scale).mul_(factor[:, None])
    per_token.index_copy_(0, at, losses * factor)
    d_hidden.index_copy_(0, at, change[:, :width])
    if left is not None:
        rows.index_copy_(0, at, change[:, width:])
    if head.kind == "log_odds":
        by_logits(x, at[sure], left, head, per_token, d_hidden, rows)


def by_logits(
    x: Operands, at: Tensor, left: Tensor | None, head: Head, per_token: Tensor, d_hidden: Tensor, rows: Tensor
) -> Tensor:
    """Fill the same through the logits, for the tokens at ``at``; return their losses before their weights."""
    if not len(at):
        return per_token.new_zeros(0)
    chosen = torch.full_like(x.target, -100).reshape(-1).index_copy_(0, at, x.target.reshape(-1)[at])
    x = x._replace(target=chosen.reshape(x.target.shape))
    w, side = x.weight.to(per_token.dtype), None if left is None else left.to(per_token.dtype)
    for where, losses, d_logits in chunks(x, head):
        per_token.index_copy_(0, where, losses)
        d_hidden.index_copy_(0, where, d_logits @ w)
        if side is not None:
            rows.index_copy_(0, where, d_logits @ side.T)
    losses = per_token[at]
    return losses if x.token_weights is None else losses / x.token_weights.reshape(-1)[at].to(losses.dtype)


def _log_odds(p: float) -> float:
    """Compute the loss of a token of probability p."""
    return float(torch.tensor((1 - p) / p).log())
