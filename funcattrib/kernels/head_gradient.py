"""Gradients of a head's weight and bias: G_W = Σ_n (∂ℓ/∂z)_n hᵀ_n, added up chunk by chunk of tokens.

Where every example's own G_W is wanted, one (V, d) at a time is formed and handed to a function of it.

Shapes: E examples, d hidden width, V vocabulary; G groups of E/G consecutive examples.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from funcattrib.kernels.fold import fold, unfold
from funcattrib.kernels.head_tokens import Chunk, Operands, chunks
from funcattrib.kernels.logit_loss import Head

Function = Callable[[Tensor], Tensor]


def form(x: Operands, head: Head, function: Function, per_token: Tensor, d_hidden: Tensor) -> Tensor:
    """Compute ``function`` of each example's gradient of W, (1, V, d), formed one example at a time, in the pass that
    computes the losses (E·N,) and ∂loss/∂hidden (E·N, d), which are filled.
    """
    w, tokens = x.weight.to(per_token.dtype), x.hidden.shape[1]
    read: list[Tensor] = []
    gradient = torch.empty_like(x.weight)[None]
    for example in range(x.hidden.shape[0]):
        member = x.examples(example, example + 1)
        if read and read[-1].untyped_storage().data_ptr() == gradient.untyped_storage().data_ptr():
            gradient = torch.empty_like(gradient)  # the function returned it, or a view of it
        gradient.zero_()
        for at, losses, d_logits in chunks(member, head):
            per_token.index_copy_(0, at + example * tokens, losses)
            d_hidden.index_copy_(0, at + example * tokens, d_logits @ w)
            gradient[0].addmm_(d_logits.T.to(x.weight.dtype), member.hidden.flatten(0, 1)[at])
        read.append(function(gradient))
    return torch.cat(read)


def weight_gradient(scale: Tensor, x: Operands, head: Head) -> Tensor:
    """Compute Σ_e scale_e G_W(e), (V, d)."""
    whole: Tensor = _Weight.apply(scale, *x, head, 1)
    return whole[0]


def bias_gradients(scale: Tensor, x: Operands, head: Head) -> Tensor:
    """Compute scale_e Σ_n (∂ℓ/∂z)_n of each example, (E, V)."""
    rows: Tensor = _Bias.apply(scale, *x, head, len(scale))
    return rows


def bias_gradient(scale: Tensor, x: Operands, head: Head) -> Tensor:
    """Compute the same summed over the examples, (V,)."""
    whole: Tensor = _Bias.apply(scale, *x, head, 1)
    return whole[0]


class _Weight(torch.autograd.Function):
    """The sum over each group, (G, V, d)."""

    @staticmethod
    def forward(scale: Tensor, *inputs: Any) -> Tensor:
        *operands, head, groups = inputs
        x = Operands(*operands)
        whole = x.weight.new_zeros(groups, *x.weight.shape)
        for gradient, (members, scales) in zip(whole, _groups(scale, x, groups), strict=True):
            for at, d_logits in _scaled(chunks(members, head), scales, x.hidden.shape[1]):
                gradient.addmm_(d_logits.T.to(x.weight.dtype), members.hidden.flatten(0, 1)[at])
        return whole

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], scale: Tensor, *inputs: Any) -> tuple[Any, Any]:
        *operands, head, groups = inputs
        size = info.batch_size
        x = Operands(*operands).folded(Operands(*in_dims[1:-2]), size)
        return unfold(_Weight.apply(fold(scale, in_dims[0], size), *x, head, groups * size), size), 0


class _Bias(torch.autograd.Function):
    """The sum over each group, (G, V)."""

    @staticmethod
    def forward(scale: Tensor, *inputs: Any) -> Tensor:
        *operands, head, groups = inputs
        x = Operands(*operands)
        gradient = scale.new_zeros(groups, x.weight.shape[0])
        for row, (members, scales) in zip(gradient, _groups(scale, x, groups), strict=True):
            for _, d_logits in _scaled(chunks(members, head), scales, x.hidden.shape[1]):
                row += d_logits.sum(0)
        return gradient if x.bias is None else gradient.to(x.bias.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], scale: Tensor, *inputs: Any) -> tuple[Any, Any]:
        *operands, head, groups = inputs
        size = info.batch_size
        x = Operands(*operands).folded(Operands(*in_dims[1:-2]), size)
        return unfold(_Bias.apply(fold(scale, in_dims[0], size), *x, head, groups * size), size), 0


def _groups(scale: Tensor, x: Operands, groups: int) -> Iterator[tuple[Operands, Tensor]]:
    """Yield the examples of each group, and their scales."""
    size = len(scale) // groups
    for start in range(0, len(scale), size):
        yield x.examples(start, start + size), scale[start : start + size]


def _scaled(parts: Iterator[Chunk], scale: Tensor, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield positions, and the gradients of the logits times their example's scale."""
    for at, _, d_logits in parts:
        yield at, d_logits.mul_(scale[at // tokens, None].to(d_logits.dtype))
