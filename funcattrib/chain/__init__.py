"""Chains of transforms after a source of per-example gradients, and how they are fitted."""
