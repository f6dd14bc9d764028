"""Per-example gradients: ``vmap(grad(loss))`` of the parameters, or one backward pass to a probe an example.

plain     g_b      = ∂ loss(W, example_b) / ∂W                    (B, *shape of W)
lifted    C(g_b)   = ∂ loss(W + C*(θ), example_b) / ∂θ at θ = 0    (B, *coordinates)
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from funcattrib.errors import FuncattribError
from funcattrib.lift import Readouts, lift, unpack, zero_probes
from funcattrib.lift.single_use import single_use
from funcattrib.types import Batch, Example, Grads, Leaf, Loss, Params, PerExample, Spec
from funcattrib.weights.stored import dense

_OTHERS = "\nof JAX, begin the chain at funcattrib.jax.per_example_grad"


class GradientSource(NamedTuple):
    """The source of a chain's gradients: the functions a framework supplies.

    A framework has parameters, losses and batches of its own; gradients and losses that come out are torch's.

    Attributes:
        name: of the framework, for messages.
        bind: (loss, params, lowered maps or None) → gradients and losses as a function of the batch.
        named: parameters as the framework has them → name → tensor, in the order of the gradients; nothing is copied.
        measurable: (loss, params, names, batch) → those of the names whose gradients a map that is not linear may
            be given for: it is read once, off the whole gradient.
    """

    name: str
    bind: Callable[[Loss, Params, Readouts | None], Callable[[Batch], PerExample]]
    named: Callable[[Any], Params]
    measurable: Callable[[Loss, Params, Iterable[str], Batch], set[str]]

    def spec(self, params: Params) -> Spec:
        """Return the gradients' names, shapes and dtypes."""
        return spec(self.named(params))

    def __call__(self, loss: Loss, params: Params, batch: Batch) -> Grads:
        """Compute gradients of every parameter for every example of ``batch``, (B, *shape) each."""
        return self.bind(loss, params, None)(batch).grads


def bind(loss: Loss, params: Params, lowered: Readouts | None) -> Callable[[Batch], PerExample]:
    """Return ``rows`` as a function of the batch."""
    return partial(rows, loss, params, lowered=lowered)


def rows(loss: Loss, params: Params, batch: Batch, lowered: Readouts | None = None) -> PerExample:
    """Compute gradients and losses of every example of a batch.

    Args:
        loss: ``loss(params, example) -> scalar``, for one example without a batch axis.
        params: name → tensor; only these are differentiated.
        batch: the examples stacked along the first axis.
        lowered: linear maps to read off the gradients, by name; parameters without one are left out.
            None gives the gradients themselves.
    """
    params = {name: tensor.detach() for name, tensor in params.items()}
    if lowered is None:
        # What is differentiated is the dense weight: all of them at a time, which the lowered form never has.
        grads, losses = vmap(grad_and_value(partial(_scalar, loss)), in_dims=(None, 0))(dense(params), dict(batch))
        return PerExample(grads, losses)

    def of_probes(probes: Params, example: Example) -> Tensor:
        return _scalar(loss, lift(params, lowered, probes), example)

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


def _scalar(loss: Loss, params: Params, example: Example) -> Tensor:
    """Compute the loss of one example, which must be one number: of several, gradients would be those of their sum."""
    value: Any = loss(params, example)
    if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
        found = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise FuncattribError(
            f"expected a loss that returns a scalar tensor of floating point for one example, found {found}\n"
            "add up or average over what it returns"
        )
    return value


def spec(params: Params) -> Spec:
    """Return name → shape and dtype, in the parameters' order."""
    return {name: Leaf(tuple(tensor.shape), tensor.dtype) for name, tensor in params.items()}


def named(params: Params) -> Params:
    """Check that parameters are name → tensor, and return them.

    Raises:
        FuncattribError: they are something else, or none.
    """
    if not isinstance(params, Mapping) or not params:
        found = "none" if isinstance(params, Mapping) else f"a {type(params).__name__}"
        raise FuncattribError(f"expected parameters as a dict of name → tensor, found {found}{_OTHERS}")
    for name, tensor in params.items():
        if not isinstance(tensor, Tensor):
            found = f"{type(tensor).__module__.partition('.')[0]}'s {type(tensor).__name__}"
            raise FuncattribError(f"expected the parameter {name} as a tensor, found {found}{_OTHERS}")
    return params


def measurable(loss: Loss, params: Params, names: Iterable[str], batch: Batch) -> set[str]:
    """Find the matrices that one tapped operation alone uses; a forward pass over the batch's first example shows."""
    whole = {name for name in names if len(params[name].shape) > 1}
    return single_use(loss, params, whole, {key: value[0] for key, value in batch.items()}) if whole else whole


per_example_grad = GradientSource("torch", bind, named, measurable)
"""``per_example_grad(loss, params, batch)``: ``vmap(grad(loss))``, the first link of a chain.

Example:
    >>> loss = lambda params, example: (params["w"] * example["x"]).sum() ** 2
    >>> per_example_grad(loss, {"w": torch.ones(2)}, {"x": torch.eye(2)})["w"]
    tensor([[2., 0.],
            [0., 2.]])
"""
