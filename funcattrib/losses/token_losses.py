"""The loss of tokens from a model's logits, summed over each example: where head and loss are not fused."""

import torch
from torch import Tensor

from funcattrib.kernels.head_tokens import IGNORED
from funcattrib.kernels.logit_loss import Head


def sum_of_token_losses(
    logits: Tensor,
    target: Tensor,
    token_weights: Tensor | None,
    head: Head,
    reference: Tensor | None = None,
) -> Tensor:
    """Compute the loss of every example (E,) on logits (E, N, V), by the formulas of the fused head.

    Args:
        target: (E, N), -100 where a token does not count.
        token_weights: (E, N).
        reference: the reference's logits, for ``kl``.

    Example:
        >>> sum_of_token_losses(torch.zeros(1, 2, 4), torch.tensor([[3, -100]]), None, Head())
        tensor([1.3863])
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    counted = target != IGNORED
    y = target.clamp(min=0)[..., None]
    z_y = z.gather(-1, y)[..., 0]
    if reference is not None:
        log_p, log_q = torch.log_softmax(z, -1), torch.log_softmax(reference.to(z.dtype), -1)
        per_token = (log_p.exp() * (log_p - log_q)).sum(-1)
    elif head.kind == "log_odds":
        others = torch.logsumexp(z.scatter(-1, y, float("-inf")), -1)
        per_token = others - z_y
    else:
        smoothing = head.smoothing
        per_token = torch.logsumexp(z, -1) - (1 - smoothing) * z_y - (smoothing * z.mean(-1) if smoothing else 0.0)
    factor = counted.to(z.dtype) if token_weights is None else counted * token_weights.to(z.dtype)
    return torch.where(counted, per_token * factor, 0.0).sum(-1)
