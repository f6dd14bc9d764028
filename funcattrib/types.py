"""Names for what is passed around: parameters, examples, losses, gradients and their specs."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

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


class PerExample(NamedTuple):
    """Results of one batch: ``grads`` name → (B, *shape), and ``losses`` (B,), in nats."""

    grads: Grads
    losses: Tensor
