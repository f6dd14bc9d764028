"""Per-example gradients: ``vmap(grad(loss))`` of the parameters, or one backward pass to a probe an example.

plain     g_b      = ∂ loss(W, example_b) / ∂W                    (B, *shape of W)
lifted    C(g_b)   = ∂ loss(W + C*(θ), example_b) / ∂θ at θ = 0    (B, *coordinates)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from funcattrib.functional import Example, Loss, Params
from funcattrib.lift import Lowered, lift, unpack, zero_probes

Batch = Example
Grads = dict[str, Tensor]


class Leaf(NamedTuple):
    """Shape (without the example axis) and dtype of one entry of ``Grads``.

    ``split`` is the axis along which a parameter was divided into leaves (heads); its other axes are common to them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    split: int | None = None


Spec = dict[str, Leaf]


class PerExample(NamedTuple):
    """What one batch yields: ``grads`` name → (B, *shape), and ``losses`` (B,), in nats."""

    grads: Grads
    losses: Tensor


class Source(NamedTuple):
    """Where a chain's gradients come from: the functions a framework supplies.

    Attributes:
        name: goes into the manifest.
        spec: parameters → the gradients' names, shapes and dtypes.
        rows: (loss, params, batch, lowered maps or None) → gradients and losses of a batch.
    """

    name: str
    spec: Callable[[Params], Spec]
    rows: Callable[[Loss, Params, Batch, Lowered | None], PerExample]

    def __call__(self, loss: Loss, params: Params, batch: Batch) -> Grads:
        """Gradients of every parameter for every example of ``batch``, (B, *shape) each."""
        return self.rows(loss, params, batch, None).grads


def rows(loss: Loss, params: Params, batch: Batch, lowered: Lowered | None = None) -> PerExample:
    """Gradients and losses of every example of a batch.

    Args:
        loss: ``loss(params, example) -> scalar``, for one example without a batch axis.
        params: name → tensor; only these are differentiated.
        batch: the examples stacked along the first axis.
        lowered: linear maps to read off the gradients, by name; parameters without one are left out.
            None gives the gradients themselves.
    """
    params = {name: tensor.detach() for name, tensor in params.items()}
    if lowered is None:
        grads, losses = vmap(grad_and_value(loss), in_dims=(None, 0))(params, dict(batch))
        return PerExample(grads, losses)

    def of_probes(probes: Params, example: Example) -> Tensor:
        return loss(lift(params, lowered, probes), example)

    # One probe an example: the losses are independent of each other's probes, so one ordinary backward pass gives
    # every example's gradient, and frees what it has used as it goes (torch.func.grad keeps its graph).
    size = next(iter(batch.values())).shape[0]
    probes = {
        name: probe.expand(size, *probe.shape).clone().requires_grad_()
        for name, probe in zero_probes(params, lowered).items()
    }
    with torch.enable_grad():
        losses = vmap(of_probes)(probes, dict(batch))
    if not losses.requires_grad:  # the loss uses none of them
        return PerExample(unpack(lowered, {name: probe.detach()[:, 0] for name, probe in probes.items()}), losses)
    read = torch.autograd.grad(
        losses, list(probes.values()), torch.ones_like(losses), allow_unused=True, materialize_grads=True
    )
    coordinates = {name: grad[:, 0] for name, grad in zip(probes, read, strict=True)}
    return PerExample(unpack(lowered, coordinates), losses.detach())


def spec(params: Params) -> Spec:
    """Name → shape and dtype, in the parameters' order."""
    return {name: Leaf(tuple(tensor.shape), tensor.dtype) for name, tensor in params.items()}


per_example_grad = Source("torch", spec, rows)
"""``per_example_grad(loss, params, batch)``: ``vmap(grad(loss))``, the first link of a chain.

Example:
    >>> loss = lambda params, example: (params["w"] * example["x"]).sum() ** 2
    >>> per_example_grad(loss, {"w": torch.ones(2)}, {"x": torch.eye(2)})["w"]
    tensor([[2., 0.],
            [0., 2.]])
"""
