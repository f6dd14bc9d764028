"""Lifting a functional parameter dict: W becomes W + C*(θ) for every parameter that is read."""

from collections.abc import Mapping

import torch
from torch import Tensor

from funcattrib.lift.coordinates import Reading
from funcattrib.lift.ops import RULES
from funcattrib.lift.parameter import Lifted

Readings = Mapping[str, Reading]
Params = Mapping[str, Tensor]


def lift(params: Params, readings: Readings, probes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``params`` with a lifted leaf for every name in ``readings``."""
    return {
        name: Lifted(weight, probes[name], readings[name], RULES) if name in readings else weight
        for name, weight in params.items()
    }


def zero_probes(params: Params, readings: Readings, examples: int = 1) -> dict[str, Tensor]:
    """θ₀ = 0, (E, *coordinates), one probe for every name in ``readings``."""
    return {
        name: torch.zeros(
            examples,
            *reading.coordinates_shape(tuple(params[name].shape)),
            dtype=params[name].dtype,
            device=params[name].device,
        )
        for name, reading in readings.items()
    }
