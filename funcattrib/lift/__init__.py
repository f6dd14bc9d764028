"""Lifted parameters: leaves of the functional parameter dict that read transformed gradients off a backward pass."""

from funcattrib.lift.coordinates import Measured, Reading, Scale, Then, TwoSided
from funcattrib.lift.lifting import Lowered, Lowering, lift, own, unpack, zero_probes
from funcattrib.lift.parameter import Lifted
from funcattrib.lift.split import Heads, Split, each

__all__ = [
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
    "each",
    "lift",
    "own",
    "unpack",
    "zero_probes",
]
