"""Names for what is passed around: parameters, examples, losses, gradients and their specs."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

Params = Mapping[str, Tensor]
"""Name → tensor."""
Example = Mapping[str, Tensor]
"""One example, without a batch axis."""
Loss = Callable[[Params, Example], Tensor]
"""``loss(params, example) -> scalar``, for one example without a batch axis."""
Batch = Example
"""Examples stacked along the first axis."""
Grads = dict[str, Tensor]
"""Name of a leaf → (B, *shape), one gradient an example, in the parameters' order."""


class Leaf(NamedTuple):
    """Shape (without the example axis) and dtype of one entry of ``Grads``.

    ``split`` is the axis along which a parameter was divided into leaves (heads); its other axes are common to them.

    Example:
        >>> Leaf((16, 16), torch.float32).shape
        (16, 16)
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    split: int | None = None


Spec = dict[str, Leaf]
"""Name of a leaf → its shape and dtype, in the parameters' order: the gradients that a stage receives."""


def not_scalar(value: Any) -> str | None:
    """Return what a loss returned in place of a scalar tensor of floating point; None where it is one.

    Example:
        >>> not_scalar(torch.zeros(2)), not_scalar(torch.tensor(1.0))
        ('shape (2,), torch.float32', None)
    """
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"shape {tuple(value.shape)}, {value.dtype}" if value.ndim or not value.is_floating_point() else None


@runtime_checkable
class BatchedLoss(Protocol):
    """A loss that computes several examples in one forward pass too, (E,)."""

    def __call__(self, params: Params, example: Example, /) -> Tensor:
        """Compute one example's loss."""

    def batched(self, params: Params, batch: Batch, /) -> Tensor:
        """Compute the loss of every example, (E,)."""


class PerExample(NamedTuple):
    """Results of one batch: ``grads`` name → (B, *shape), and ``losses`` (B,), in nats."""

    grads: Grads
    losses: Tensor
