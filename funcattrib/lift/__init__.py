"""Lifted parameters: leaves of the functional parameter dict that read transformed gradients off a backward pass."""

from funcattrib.lift.lifted import Lifted
from funcattrib.lift.maps.base import Composed, GradientMap
from funcattrib.lift.maps.elementwise import Scale
from funcattrib.lift.maps.heads import Heads, Split
from funcattrib.lift.maps.inner_products import InnerProducts
from funcattrib.lift.maps.measured import Measured
from funcattrib.lift.maps.two_sided import TwoSided
from funcattrib.lift.probes import Readout, Readouts, extend, from_gradients, lift, readout, unpack, zero_probes

__all__ = [
    "InnerProducts",
    "Heads",
    "Lifted",
    "Readouts",
    "Readout",
    "Measured",
    "GradientMap",
    "Scale",
    "Split",
    "Composed",
    "TwoSided",
    "extend",
    "from_gradients",
    "lift",
    "readout",
    "unpack",
    "zero_probes",
]
