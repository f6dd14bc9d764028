"""The tap: y' = y, and in backward dθ = C read off (g, what was kept).

It follows an operation that ran as the model would run it. The gradient of y passes through untouched;
the probe θ receives its coordinates. ``read`` is a pure function of g and of the kept tensors, and every
operation in it has a batching rule, so that the same code serves ``vmap(grad(...))`` and batched autograd.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

Read = Callable[..., Tensor]


def tap(y: Tensor, theta: Tensor, read: Read, *kept: Tensor | None) -> Tensor:
    """Return ``y`` unchanged; the gradient of ``theta`` becomes ``read(g, *kept)``.

    Example:
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> tap(torch.ones(3, requires_grad=True), theta, lambda g, x: g[:2] * x, torch.tensor(5.0)).sum().backward()
        >>> theta.grad
        tensor([5., 5.])
    """
    return _Tap.apply(y, theta, read, *kept)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, theta: Tensor, read: Read, *kept: Tensor | None) -> Tensor:
        return y.detach()  # not a view, which the model could not modify in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.read, *kept = inputs
        ctx.unused = len(kept)
        ctx.save_for_backward(*kept)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        d_theta = ctx.read(g, *ctx.saved_tensors) if ctx.needs_input_grad[1] else None
        return g, d_theta, None, *([None] * ctx.unused)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], y: Tensor, theta: Tensor, read: Read, *kept: Tensor | None
    ) -> tuple[Tensor, int]:
        size, dims = info.batch_size, in_dims[3:]
        y = y.movedim(in_dims[0], 0) if in_dims[0] is not None else y.expand(size, *y.shape)
        front = [k if axis is None or k is None else k.movedim(axis, 0) for k, axis in zip(kept, dims, strict=True)]
        over = (0, *(None if axis is None or k is None else 0 for k, axis in zip(kept, dims, strict=True)))
        theta = theta.movedim(in_dims[1], 0) if in_dims[1] is not None else theta.expand(size, *theta.shape)
        return _Tap.apply(y, theta, partial(_read_each, read, over), *front), 0


def _read_each(read: Read, over: tuple[int | None, ...], g: Tensor, *kept: Tensor | None) -> Tensor:
    """Call ``read`` for every entry of the axis that vmap hid."""
    return vmap(read, in_dims=over)(g, *kept)
