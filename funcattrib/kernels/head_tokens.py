"""The labelled tokens of some examples, through the head chunk by chunk.

Chunks go through one reused buffer, in float32 (float64 for float64 models) whatever the model's dtype. Tokens without
a label, or with weight 0, are never computed.

Shapes: E examples, N tokens each, d hidden width, V vocabulary, d' the reference's width.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcattrib.kernels.fold import fold
from funcattrib.kernels.logit_loss import Head, logits_in_place, loss_in_place

IGNORED = -100


class Operands(NamedTuple):
    """Operands of the loss of a head.

    Attributes:
        hidden: (E, N, d).
        weight: (V, d).
        target: (E, N), -100 where there is none.
        bias: (V,).
        token_weights: (E, N), multiplies each token's loss.
        reference_hidden, reference_weight, reference_bias: (E, N, d'), (V, d'), (V,): where q of ``kl`` comes from.
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None = None
    token_weights: Tensor | None = None
    reference_hidden: Tensor | None = None
    reference_weight: Tensor | None = None
    reference_bias: Tensor | None = None

    def examples(self, start: int, stop: int) -> "Operands":
        """Return some of the examples."""
        return self._by_example(lambda name, tensor: tensor[start:stop])

    def folded(self, axes: "Operands", size: int) -> "Operands":
        """Fold the axis that vmap hides into the examples; the heads are shared by all of them."""
        return self._by_example(lambda name, tensor: fold(tensor, getattr(axes, name), size))

    def _by_example(self, change: Callable[[str, Tensor], Tensor | None]) -> "Operands":
        names = ("hidden", "target", "token_weights", "reference_hidden")
        changed: Any = {name: change(name, tensor) for name in names if (tensor := getattr(self, name)) is not None}
        return self._replace(**changed)


class Chunk(NamedTuple):
    """Some tokens: flat positions ``at`` in (E · N), losses, and ∂loss/∂(W h), which the next chunk overwrites."""

    at: Tensor
    losses: Tensor
    d_logits: Tensor


def labelled(target: Tensor, token_weights: Tensor | None) -> Tensor:
    """Return flat positions of the tokens that have a label and a weight."""
    flat = target.reshape(-1) != IGNORED
    if token_weights is not None:
        flat = flat & (token_weights.reshape(-1) != 0)
    return flat.nonzero()[:, 0]


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype in which losses and gradients of logits are computed."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def chunks(x: Operands, head: Head) -> Iterator[Chunk]:
    """Yield the labelled tokens in order, some at a time."""
    compute, at = compute_dtype(x.hidden), labelled(x.target, x.token_weights)

    def rows(tokens: Tensor | None) -> Tensor | None:
        return None if tokens is None else tokens.flatten(0, 1)[at].to(compute)

    def whole(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(compute)

    h, y, factor = rows(x.hidden), x.target.reshape(-1)[at], rows(x.token_weights)
    w, bias = whole(x.weight), whole(x.bias)
    h_ref, w_ref, bias_ref = rows(x.reference_hidden), whole(x.reference_weight), whole(x.reference_bias)
    most = 128 if at.device.type == "cpu" else max(128, 2**28 // x.weight.shape[0])
    buffer = _buffer(h, w, most)
    reference = None if h_ref is None else _buffer(h_ref, w_ref, most)
    for start in range(0, len(at), most):
        span = slice(start, min(start + most, len(at)))
        z, q = _product(h, w, span, buffer), None
        if reference is not None:
            q = _product(h_ref, w_ref, span, reference)
            logits_in_place(q, bias_ref, *head.reference)
        losses = loss_in_place(z, y[span, None], bias, head, q)
        if factor is not None:
            losses = losses * factor[span]
            z.mul_(factor[span, None])
        yield Chunk(at[span], losses, z)


def _buffer(h: Any, w: Any, most: int) -> Tensor:
    buffer: Tensor = h.new_empty(min(most, len(h)), w.shape[0])
    return buffer


def _product(h: Any, w: Any, span: slice, buffer: Tensor) -> Tensor:
    return torch.mm(h[span], w.T, out=buffer[: span.stop - span.start])
