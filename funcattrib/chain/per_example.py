"""Per-example gradients of the parameters, or of a probe an example that reads a linear map of them.

plain     g_b      = ∂ loss(W, example_b) / ∂W                    (B, *shape of W)
lifted    C(g_b)   = ∂ loss(W + C*(θ), example_b) / ∂θ at θ = 0    (B, *coordinates)
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from funcattrib.chain.evaluation import Way, find_way
from funcattrib.errors import FuncattribError
from funcattrib.lift import Readouts
from funcattrib.lift.single_use import single_use
from funcattrib.types import Batch, Grads, Leaf, Loss, Params, PerExample, Spec

_OTHERS = "\nof JAX, begin the chain at funcattrib.jax.per_example_grad"


class GradientSource(NamedTuple):
    """The source of a chain's gradients: the functions a framework supplies.

    A framework has its parameters, losses and batches; gradients and losses that come out are torch's.

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
    """Return ``rows`` as a function of the batch, which goes on in the way that its first batch was computed."""
    params = {name: tensor.detach() for name, tensor in params.items()}
    way: Way | None = None

    def compute(batch: Batch) -> PerExample:
        nonlocal way
        if way is not None:
            return way(loss, params, lowered, batch)
        way, result = find_way(loss, params, lowered, batch)
        return result

    return compute


def rows(loss: Loss, params: Params, batch: Batch, lowered: Readouts | None = None) -> PerExample:
    """Compute gradients and losses of every example of a batch.

    Args:
        loss: ``loss(params, example) -> scalar``, for one example without a batch axis.
        params: name → tensor; only these are differentiated.
        batch: the examples stacked along the first axis.
        lowered: linear maps to read off the gradients, by name; parameters without one are left out.
            None gives the gradients themselves.
    """
    return bind(loss, params, lowered)(batch)


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
    >>> import torch
    >>> loss = lambda params, example: (params["w"] * example["x"]).sum() ** 2
    >>> per_example_grad(loss, {"w": torch.ones(2)}, {"x": torch.eye(2)})["w"]
    tensor([[2., 0.],
            [0., 2.]])
"""
