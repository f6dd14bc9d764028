"""Curvature: fitted operators and what is made of them."""

from funcattrib.curvature.gram import gram_of, spectrum
from funcattrib.curvature.mix import Mixed, mix
from funcattrib.curvature.owners import owned, owners

__all__ = ["Mixed", "gram_of", "mix", "owned", "owners", "spectrum"]
