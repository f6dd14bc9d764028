"""Gradients while training: lifted parameters under the user's own forward and backward pass."""

from funcattrib.training.callback import GradientCollectorCallback
from funcattrib.training.loop import GradientCollector, capture_gradients, token_mean
from funcattrib.training.prepare import prepare_for_gradient_collection
from funcattrib.training.recover import recover

__all__ = [
    "GradientCollector",
    "GradientCollectorCallback",
    "capture_gradients",
    "prepare_for_gradient_collection",
    "recover",
    "token_mean",
]
