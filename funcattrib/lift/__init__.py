"""Lifted parameters: leaves of the functional parameter dict that read transformed gradients off a backward pass."""

from funcattrib.lift.against import Against
from funcattrib.lift.coordinates import Measured, Reading, Scale, Then, TwoSided
from funcattrib.lift.extend import extend
from funcattrib.lift.lifting import Lowered, Lowering, lift, own, unpack, zero_probes
from funcattrib.lift.parameter import Lifted
from funcattrib.lift.split import Heads, Split

__all__ = [
    "Against",
    "Heads",
    "Lifted",
    "Lowered",
    "Lowering",
    "Measured",
    "Reading",
    "Scale",
    "Split",
    "Then",
    "TwoSided",
    "extend",
    "lift",
    "own",
    "unpack",
    "zero_probes",
]
