"""Lifted parameters: leaves of the functional parameter dict that read transformed gradients off a backward pass."""

from funcattrib.lift.coordinates import Measured, Reading, TwoSided
from funcattrib.lift.lifting import Readings, lift, zero_probes
from funcattrib.lift.parameter import Lifted

__all__ = ["Lifted", "Measured", "Reading", "Readings", "TwoSided", "lift", "zero_probes"]
