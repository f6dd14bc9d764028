"""Lifted parameters: leaves of the functional parameter dict that read transformed gradients off a backward pass."""

from funcattrib.lift.coordinates import Measured, Reading, Scale, Then, TwoSided
from funcattrib.lift.lifting import Lowered, Lowering, lift, own, unpack, zero_probes
from funcattrib.lift.parameter import Lifted

__all__ = [
    "Lifted",
    "Lowered",
    "Lowering",
    "Measured",
    "Reading",
    "Scale",
    "Then",
    "TwoSided",
    "lift",
    "own",
    "unpack",
    "zero_probes",
]
