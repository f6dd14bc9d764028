"""Gradients while training: lifted parameters under the user's own forward and backward pass."""

from funcattrib.training.callback import GradientCollectorCallback
from funcattrib.training.loop import GradientCollector, collect, token_mean
from funcattrib.training.prepare import prepare_for_gradient_collection

__all__ = [
    "GradientCollector",
    "GradientCollectorCallback",
    "collect",
    "prepare_for_gradient_collection",
    "token_mean",
]
