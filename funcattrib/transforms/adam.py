"""Normalisation by Adam's second moments.

    v = E[G²], entry by entry        C(G) = G ⊙ (√v + ε)⁻¹

A linear map that is not two-sided: each weight's gradient is formed in its turn and dropped, never all of them. An
entry that never had a gradient (v = 0) stays zero, as a row or column does in ``adafactor_norm``.

The sums are in float64, 8 bytes a parameter: as much as Adam's own state takes in training, so a model that could be
trained with Adam can be fitted, and small terms are not lost in long passes.

Reference: Adam, arXiv 1412.6980.
"""

import torch
from torch import Tensor

from funcattrib.chain.transform import State, Transform
from funcattrib.kernels.safe_norm import float32_at_least
from funcattrib.lift import GradientMap, Readouts, Scale, TwoSided, readout
from funcattrib.transforms.moments import Moment, Moments, entries, moment_norm, start
from funcattrib.types import Leaf, Spec


def adam_norm(moments: Moments | None = None, eps: float = 1e-8) -> Transform:
    """Divide every entry by the root of its second moment.

    Args:
        moments: v of each leaf (``optimizer_state`` reads an optimizer's), or Adafactor's factors of it; fitted in a
            pass over data when not given.
        eps: added to the root.

    Raises:
        ChainError: moments that are missing or do not fit.

    Example:
        >>> stage = adam_norm({"w": torch.tensor([[4.0, 0.25]])}, eps=0)
        >>> state, _ = stage.init({"w": Leaf((1, 2), torch.float32)})
        >>> stage(state, {"w": torch.ones(1, 1, 2)})["w"]
        tensor([[[0.5000, 2.0000]]])
    """
    return moment_norm("adam_norm", moments, eps, init=_init, statistic=_squares, maps=_maps)


def _init(moments: Moments | None, spec: Spec) -> tuple[State, Spec]:
    return start(spec, moments, _entries), spec


def _entries(name: str, leaf: Leaf, moment: Moment | None) -> Tensor:
    return torch.zeros(leaf.shape, dtype=torch.float64) if moment is None else entries(moment)


def _squares(name: str, grad: Tensor) -> Tensor:
    """Compute the mean square over these examples for each of them, (B, *shape): their sum is that of the squares.

    One tensor of the weight's shape, seen B times, so that squares do not add up to (B, every parameter); of examples
    that are not all finite each has its own, as some will be left out.
    """
    squares = float32_at_least(grad).square()
    if len(squares) == 1:  # also inside ``vmap``, where no value can be asked for
        return squares
    mean = squares.mean(0, keepdim=True)
    return mean.expand_as(squares) if bool(mean.isfinite().all()) else squares


def _maps(state: State, spec: Spec, eps: float) -> Readouts:
    return {name: readout(name, _as_map(_factor(state["sums"][name], eps))) for name in spec}


def _as_map(factor: Tensor) -> GradientMap:
    return TwoSided(factor) if factor.ndim == 1 else Scale(factor)


def _factor(v: Tensor, eps: float) -> Tensor:
    return torch.where(v > 0, 1 / (v.sqrt() + eps), 0.0)
