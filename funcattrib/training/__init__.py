"""Gradients while training: lifted parameters under the user's own forward and backward pass."""

from funcattrib.training.collect import GradientCollector, collect, token_mean

__all__ = ["GradientCollector", "collect", "token_mean"]
