"""Chains of transforms behind a source of per-example gradients, and how they are fitted."""
