"""The loss of a chunk of tokens from their logits, and its gradient, made in place of the logits.

For one token with raw products x = W h and logits z = cap(scale · (x + b)), p = softmax(z), target y:

    ce        ℓ = logsumexp(z) − (1 − ε) z_y − ε mean(z)        ∂ℓ/∂z = p − (1 − ε) e_y − ε/V
    log_odds  ℓ = logsumexp_{j≠y}(z) − z_y                      ∂ℓ/∂z = softmax_{j≠y}(z) − e_y
    kl        ℓ = Σ_j p_j (log p_j − log q_j)                   ∂ℓ/∂z = p ⊙ (log p − log q − ℓ)

q is a reference's distribution of the same token, a constant.

Shapes: N tokens, V vocabulary.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

LossKind = Literal["ce", "kl", "log_odds"]


class Head(NamedTuple):
    """Scale and cap of the head's products, and the loss taken of them; ``reference`` as the head of ``kl``'s q.

    Attributes:
        kind: of the loss.
        smoothing: ε.
        scale: of the products.
        softcap: c of cap(z) = c · tanh(z / c); None leaves them alone.
        reference: scale and softcap of the reference's head.
    """

    kind: LossKind = "ce"
    smoothing: float = 0.0
    scale: float = 1.0
    softcap: float | None = None
    reference: tuple[float, float | None] = (1.0, None)


def loss_in_place(x: Tensor, y: Tensor, bias: Tensor | None, head: Head, reference: Tensor | None) -> Tensor:
    """Compute losses (N,); ``x`` (N, V) goes in as raw products and comes out as ∂loss/∂x.

    Args:
        y: targets, (N, 1).
        reference: the reference's logits (N, V), overwritten; for ``kl`` alone.
    """
    slope = logits_in_place(x, bias, head.scale, head.softcap)
    losses = _of_target(x, y, head) if reference is None else _divergence(x, reference)
    if slope is not None:
        x.mul_(slope)
    if head.scale != 1.0:
        x.mul_(head.scale)
    return losses


def logits_in_place(x: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor | None:
    """Convert raw products to logits; return the slope of the cap at each, where there is one."""
    if bias is not None:
        x.add_(bias)
    if scale != 1.0:
        x.mul_(scale)
    if softcap is None:
        return None
    x.div_(softcap).tanh_()
    slope = 1 - x * x
    x.mul_(softcap)
    return slope


def _of_target(z: Tensor, y: Tensor, head: Head) -> Tensor:
    """Compute cross-entropy and log-odds."""
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
    return lse - target


def _divergence(z: Tensor, r: Tensor) -> Tensor:
    """Compute KL(softmax(z) ‖ softmax(r)). From normalised logarithms: the difference of raw logits loses digits."""
    torch.log_softmax(z, 1, out=z)
    torch.log_softmax(r, 1, out=r)
    ratio = torch.sub(z, r, out=r)
    z.exp_()
    losses = torch.linalg.vecdot(z, ratio)
    z.mul_(ratio.sub_(losses[:, None]))
    return losses
