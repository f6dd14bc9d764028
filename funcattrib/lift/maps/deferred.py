"""Factors of a weight's gradient as backward has them, kept to be read once the map is known.

Outside vmap only: factors are saved in backward, and the probe receives zeros.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcattrib.kernels.safe_norm import float32_at_least
from funcattrib.lift.factors import Factor, OneHot
from funcattrib.lift.maps.base import GradientMap

SavedPart = tuple[Factor, Tensor | None] | tuple[Tensor]
"""(rows, cols) of a use of the weight, or a formed gradient."""


@dataclass(frozen=True)
class SavedFactors(GradientMap):
    """A map that saves the factors or gradients it receives, in ``parts``."""

    parts: list[SavedPart]

    @property
    def linear(self) -> bool:
        return False

    def coordinates_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that the probe receives: one zero an example."""
        return (1,)

    def from_factors(self, rows: Factor, cols: Tensor | None) -> Tensor:
        """Save factors."""
        self.parts.append((rows, cols))
        like = rows if isinstance(rows, Tensor) else rows.weight if cols is None else cols
        examples = (rows.ids if isinstance(rows, OneHot) else rows).shape[0]
        return torch.zeros(examples, 1) if like is None else like.new_zeros(examples, 1)

    def from_gradient(self, gradient: Tensor) -> Tensor:
        """Save formed gradients."""
        self.parts.append((gradient,))
        return gradient.new_zeros(gradient.shape[0], 1)

    def adjoint(self, theta: Tensor) -> Tensor:
        """Raise: there is no adjoint."""
        raise AssertionError("factors are put aside outside vmap, where W + C*(θ) is not formed")

    def __matmul__(self, first: Any) -> GradientMap:
        """Raise: factors are saved as backward has them, never after another map."""
        raise AssertionError("factors are put aside as backward has them")


def read_saved(gradient_map: GradientMap, parts: list[SavedPart], examples: int) -> Tensor | None:
    """Compute (E, …) coordinates of saved factors, summed over uses, in float32 at least; None where nothing was saved.

    Gradients formed one example at a time follow one another until they are ``examples``.
    """
    total: Tensor | None = None
    waiting: list[Tensor] = []
    for part in parts:
        if len(part) == 2:
            rows, cols = part
            kept = None if cols is None else gradient_map.reduce_cols(_wide(cols))  # type: ignore[arg-type]
            waiting.append(gradient_map.from_factors(gradient_map.reduce_rows(_wide(rows)), kept))
        else:
            waiting.append(gradient_map.from_gradient(_wide(part[0])))  # type: ignore[arg-type]
        if sum(len(each) for each in waiting) == examples:
            whole = torch.cat(waiting)
            total, waiting = whole if total is None else total + whole, []
    assert not waiting, "every use hands over all examples"
    return total


def _wide(factor: Factor) -> Factor:
    if isinstance(factor, Tensor):
        return float32_at_least(factor)
    return factor if factor.weight is None else factor._replace(weight=factor.weight.float())
