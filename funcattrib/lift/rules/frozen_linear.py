"""A matrix product by a frozen weight, with its tap, as one ``autograd.Function``.

Forward makes y = x Wᵀ + b and what the map keeps of x; backward makes dx = g W and dθ = C read off (g, kept).
The vmapped axis is folded into the rows of one ``addmm``, where vmap by itself would multiply, then add, then tap.
Equal to the operation followed by ``tap``, which serves weights that are trained. A stored weight is made dense for
each of the two passes, and dropped after it.

Legend: M rows (all examples' tokens), I/O input and output width, E examples.
"""

from typing import Any

import torch
from torch import Tensor

from funcattrib.kernels.fold import fold, unfold
from funcattrib.lift.factors import alike
from funcattrib.lift.maps.base import GradientMap
from funcattrib.weights.stored import WeightSource, dense, made, source


def frozen_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, theta: Tensor, gradient_map: GradientMap, weight_is_in_out: bool
) -> Tensor:
    """Compute y, with θ tapped. ``weight_is_in_out``: W is stored (I, O), as HF ``Conv1D`` does, not (O, I)."""
    bias = dense(bias)
    return _FrozenLinear.apply(x, source(weight), bias, theta, gradient_map, weight_is_in_out, theta.shape[0])[0]


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: WeightSource,
        bias: Tensor | None,
        theta: Tensor,
        gradient_map: Any,
        in_out: bool,
        examples: int,
    ) -> tuple[Tensor, Tensor]:
        x_MI = x.reshape(-1, x.shape[-1])
        w_IO = made(weight) if in_out else made(weight).T
        y = x_MI @ w_IO if bias is None else torch.addmm(bias, x_MI, w_IO)
        x_ENI = x.reshape(examples, -1, x.shape[-1])
        kept = gradient_map.reduce_rows(x_ENI) if in_out else gradient_map.reduce_cols(x_ENI)
        return y.reshape(*x.shape[:-1], -1).detach(), kept  # not a view: the model may modify it in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, weight, _, _, ctx.map, ctx.in_out, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.storage, weight = (None, weight) if isinstance(weight, Tensor) else (weight, None)
        ctx.save_for_backward(weight, output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        weight, kept = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0]
        weight = weight if ctx.storage is None else ctx.storage
        d_x, d_theta = _FrozenLinearBackward.apply(g, kept, weight, ctx.map, ctx.in_out, wanted)
        return d_x if wanted else None, None, None, d_theta, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *operands: Any) -> tuple[Any, Any]:
        x, weight, bias, theta, gradient_map, in_out, examples = operands
        size = info.batch_size
        x = x.movedim(in_dims[0], 0) if in_dims[0] is not None else x.expand(size, *x.shape)
        if in_dims[3] is not None:
            theta = fold(theta, in_dims[3], size)
        y, kept = _FrozenLinear.apply(x, weight, bias, theta, gradient_map, in_out, size * examples)
        return (y, unfold(kept, size)), (0, 0)


class _FrozenLinearBackward(torch.autograd.Function):
    """(dx, dθ); dx is empty where nobody wants it."""

    @staticmethod
    def forward(
        g: Tensor, kept: Tensor, weight: WeightSource, gradient_map: Any, in_out: bool, wanted: bool
    ) -> tuple[Tensor, Tensor]:
        g_MO = g.reshape(-1, g.shape[-1])
        g_ENO = g.reshape(kept.shape[0], -1, g.shape[-1])
        d_theta = (
            gradient_map.from_factors(*alike(kept, gradient_map.reduce_cols(g_ENO)))
            if in_out
            else gradient_map.from_factors(*alike(gradient_map.reduce_rows(g_ENO), kept))
        )
        if not wanted:
            return g.new_empty(0).expand(*g.shape[:-1], 0), d_theta
        w = made(weight).to(g.dtype)  # under autocast, as the product was computed
        return (g_MO @ (w.T if in_out else w)).reshape(*g.shape[:-1], -1), d_theta

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *operands: Any) -> tuple[Any, Any]:
        g, kept, *rest = operands
        size = info.batch_size
        g = g.movedim(in_dims[0], 0) if in_dims[0] is not None else g.expand(size, *g.shape)
        d_x, d_theta = _FrozenLinearBackward.apply(g, fold(kept, in_dims[1], size), *rest)
        return (d_x, unfold(d_theta, size)), (0, 0)
