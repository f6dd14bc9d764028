"""Lifted parameters: leaves of the functional parameter dict that read transformed gradients off a backward pass."""

from funcattrib.lift.lifted import Lifted
from funcattrib.lift.maps.base import Reading
from funcattrib.lift.maps.composed import Then
from funcattrib.lift.maps.elementwise import Scale
from funcattrib.lift.maps.heads import Heads, Split
from funcattrib.lift.maps.inner_products import Against
from funcattrib.lift.maps.measured import Measured
from funcattrib.lift.maps.two_sided import TwoSided
from funcattrib.lift.probes import Lowered, Lowering, extend, lift, own, unpack, zero_probes

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
