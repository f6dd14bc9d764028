"""The tap: y' = y, and in backward dθ = C read off (g, what was kept).

It stands behind an operation that ran as the model would run it. The gradient of y passes through untouched;
the probe θ receives its coordinates. ``read`` is a pure function of g and of the kept tensors, and every
operation in it has a batching rule, so that the same code serves ``vmap(grad(...))`` and batched autograd.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Read = Callable[..., Tensor]


def tap(y: Tensor, theta: Tensor, read: Read, *kept: Tensor | None) -> Tensor:
    """``y`` unchanged; the gradient of ``theta`` becomes ``read(g, *kept)``.

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
        return y.view_as(y)

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
        info: Any, in_dims: tuple[Any, ...], y: Tensor, theta: Tensor, read: Read, *kept: Any
    ) -> tuple[Tensor, int]:
        # Forward does nothing but pass y on; theta and what is kept play no part in it.
        size = info.batch_size
        y = y.movedim(in_dims[0], 0) if in_dims[0] is not None else y.expand(size, *y.shape)
        return y.view_as(y), 0
